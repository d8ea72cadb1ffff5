"""What is learned and how (the recipe), and one worker's part of learning it: what every job that trains runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
import tyro

import clcr
from clcr import metrics as M
from clcr.averaging import AveragedTrainer
from clcr.base import MultimodalModel
from clcr.class_loss import ClassLossConfig, class_loss
from clcr.config import CLCRConfig
from clcr.registry import MODELS
from clcr.schedule import scale_parts
from clcr.training import Epoch, OptimConfig, Trainer
from features.corpus.manifest import SPLITS
from features.store import Store, open_store
from pipelines.common.cli import require_at_least, resolve_uri
from pipelines.common.errors import JobError
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs
from pipelines.training.start import begin, sources_of

STATISTICS_CLIPS = 256  # clips from which the stems learn the mean and spread of their inputs


@dataclass(frozen=True)
class Recipe:
    """What is learned and how: the options that train and sweep share."""

    network: Annotated[CLCRConfig, tyro.conf.arg(name="")] = field(default_factory=CLCRConfig)
    architecture: Annotated[str, tyro.conf.arg(name="architecture", aliases=("--model",))] = "clcr"
    """the model: clcr, mm_orient, concat, late, film, misa, ogm_ge, mult, or a modality's name: that alone"""
    tasks: tuple[str, ...] = ()
    """tasks to learn together; none named = all that the store declares"""
    seed: int = 0
    """random seed for the initial weights, the order of the clips and dropout"""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    classes: ClassLossConfig = field(default_factory=ClassLossConfig)
    ema: float = 0.0
    """answer with averaged weights: the decay (0-1) of their moving average over the steps; .999 is usual, 0 = off"""
    init: str = ""
    """trained model to start from, whose weights of the same name and shape are taken (of one with other modalities,
    those of the encoders): --out of a training, its folder model, models:/NAME/VERSION or models:/NAME@ALIAS; several,
    such as one of each modality alone, separated by commas; none = fresh weights"""
    freeze: tuple[str, ...] = ()
    """parts of the model that are not trained, by the names of its modules; a wrong name lists them"""

    def __post_init__(self) -> None:
        require_at_least(self, {"seed": 0, "ema": 0})
        if self.loader.balance and self.classes.weights == "balanced":
            raise JobError(
                "--loader.balance and --classes.weights balanced: each makes up for rare classes; leave one out"
            )
        if self.ema >= 1:
            raise JobError(f"--ema {self.ema}: must be below 1")
        whole = (uri if uri.startswith("models:/") else resolve_uri("--init", uri) for uri in sources_of(self.init))
        object.__setattr__(self, "init", ",".join(whole))  # workers have folders of their own


class Learner:
    """One worker's part of a run: the store's loaders, the model and its trainer. Train and sweep both use it.

    Never opens the test split before `test` is called, and a split that is not among `splits` never.
    """

    def __init__(
        self,
        store: Store | str,
        recipe: Recipe,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        splits: tuple[str, ...] = SPLITS,
    ) -> None:
        self.recipe, self.rank, self.world, self.splits = recipe, rank, world, splits
        self.store = open_store(store) if isinstance(store, str) else store
        self.tasks = task_specs(self.store, recipe.tasks)
        self.features = feature_specs(self.store, modalities_of(recipe.architecture, self.store))
        torch.manual_seed(recipe.seed)
        self.train, self.val = self.loader("train"), self.loader("val")
        model = clcr.build(recipe.architecture, recipe.network, self.features, self.tasks)
        model.fit_statistics(self.train.sample_batches(STATISTICS_CLIPS), self.train.numbers())
        begin(model, recipe.init, recipe.freeze)
        options: dict[str, Any] = {"seed": recipe.seed, "device": device}
        options |= {"class_loss": class_loss(recipe.classes, self.train.class_counts)}
        trainer = partial(AveragedTrainer, decay=recipe.ema) if recipe.ema else Trainer
        self.trainer: Trainer = trainer(model, self.tasks, recipe.optim, self.train.steps, **options)

    def loader(self, split: str) -> SplitLoader:
        """This worker's batches of a split. Raises JobError for one that is kept from it."""
        if split not in self.splits:
            raise JobError(f"the {split} split is kept from this run: it may read {', '.join(self.splits)}")
        return SplitLoader(
            self.store,
            split,
            self.features,
            self.tasks,
            self.recipe.loader,
            batch_size=self.recipe.optim.batch_size,
            seed=self.recipe.seed,
            rank=self.rank,
            world=self.world,
        )

    def fit(self, after_step: Callable[[Mapping[str, float]], None] | None = None) -> Iterator[Epoch]:
        """Epoch by epoch, from where the trainer stands; after_step: as `Trainer.fit` calls it."""
        return self.trainer.fit(self.train, self.val, after_step)

    def test(self) -> tuple[dict[str, dict[str, float]], dict[str, M.Predictions], dict[str, float]]:
        """Metrics by task, predictions and diagnostics of the best epoch's weights on the test split."""
        self.trainer.load_best()
        predictions, diagnostics = self.trainer.evaluate(self.loader("test").batches(0))
        return self.trainer.metrics(predictions), predictions, diagnostics


def build_model(store: Store, recipe: Recipe) -> MultimodalModel:
    """A recipe's model for a store, as training begins. Raises ConfigError for tasks or inputs that it cannot take."""
    features = feature_specs(store, modalities_of(recipe.architecture, store))
    model = clcr.build(recipe.architecture, recipe.network, features, task_specs(store, recipe.tasks))
    begin(model, recipe.init, recipe.freeze)
    scale_parts(model, (), recipe.optim.lr_scale)
    return model


def modalities_of(architecture: str, store: Store) -> tuple[str, ...]:
    """The modalities that a model reads: one for a single-modality model, else all of the store's."""
    if architecture in store.spec.features:
        return (architecture,)
    if architecture not in MODELS:
        raise JobError(f"--architecture {architecture}: known for this store are {', '.join(model_names(store))}")
    return ()


def model_names(store: Store) -> list[str]:
    """What `--architecture` takes for a store: every model, and each modality alone."""
    return [*MODELS, *store.spec.features]
