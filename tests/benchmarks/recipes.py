"""Recipes trained on one store, in one process, on samples held in memory: what `fusion` and its like measure.

A recipe is a model's name and options by dotted name, `clcr loader.drop=[audio=.2]`. Of modalities that have several
layers, the word `last` in it takes the last one alone, and `flat` takes all of them as one vector, which any model can
read. `pretrained` starts from models of each modality alone, trained first with the options of all recipes.
`linear`, or `linear MODALITY`, is a logistic regression on the clips' statistics (linear.py). Trains by the project's
own loop, `clcr.training.Trainer`.
"""

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import yaml

import clcr
from clcr import metrics as M
from clcr.averaging import AveragedTrainer
from clcr.batches import Batch, collate
from clcr.class_loss import class_loss
from clcr.training import Trainer
from features.store import Store
from pipelines.common.cli import flatten, override
from pipelines.training.learner import Recipe, modalities_of
from pipelines.training.loading import altered, feature_specs, task_specs
from pipelines.training.order import bucketed, chances, count_classes
from pipelines.training.start import begin, take_weights
from tests.benchmarks.answers import packed
from tests.benchmarks.linear import fit_linear

PARTS, FOLDS = 4, 5
LAYERS = ("last", "flat")  # words of a recipe: what is read of modalities that have several layers
Sample = dict[str, Any]


class Memory:
    """Samples in memory as the loop's loader: shuffled by (seed, epoch) in training, where --loader's options count."""

    def __init__(
        self, samples: list[Sample], model: clcr.base.MultimodalModel, size: int, recipe: Recipe | None = None
    ) -> None:
        self.samples, self.model, self.size, self.recipe = samples, model, size, recipe
        self.steps = -(-len(samples) // size)
        self.lengths = np.array([sum(map(len, sample["features"].values())) for sample in samples])

    def targets(self, task: str) -> np.ndarray:
        """Class indices of every sample, -1 where there is none."""
        return np.array([-1 if (index := sample["targets"][task]) is None else index for sample in self.samples])

    def counts(self) -> dict[str, list[int]]:
        """Clips of each class, by task."""
        known = {name: task for name, task in self.model.tasks.items() if task.kind == "classification"}
        return {name: count_classes(task, self.targets(name)) for name, task in known.items()}

    def order(self, epoch: int, recipe: Recipe) -> np.ndarray:
        """The rows of a training epoch."""
        rng, rows = np.random.default_rng((recipe.seed, epoch + 1)), len(self.samples)
        balance, buckets = recipe.loader.balance, recipe.loader.buckets
        order = rng.choice(rows, rows, p=chances(self.targets(balance))) if balance else rng.permutation(rows)
        return bucketed(order, self.lengths, self.size, buckets, recipe.seed, epoch) if buckets else order

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch."""
        order = self.order(epoch, self.recipe) if self.recipe else np.arange(len(self.samples))
        for start in range(first * self.size, len(order), self.size):
            rows = order[start : start + self.size]
            batch = collate([self.samples[row] for row in rows], self.model.features, self.model.tasks)
            yield altered(batch, self.recipe.loader, self.recipe.seed, epoch) if self.recipe and epoch >= 0 else batch

    def sample_batches(self, clips: int) -> Iterator[Batch]:
        """So many clips, in a seeded order."""
        part = Memory(self.samples, self.model, self.size, Recipe(seed=self.recipe.seed if self.recipe else 0))
        yield from (batch for batch, _ in zip(part.batches(-1), range(-(-clips // self.size)), strict=False))


def read(store: Store, tasks: dict[str, clcr.TaskSpec]) -> tuple[list[Sample], list[dict]]:
    """All samples of a store, and their rows of the index."""
    rows = store.index().to_pylist()
    stored = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
    declared = {task.name: task for task in store.spec.tasks}
    samples = []
    for row, found in zip(rows, stored, strict=True):
        targets = {name: declared[name].encode(row[f"label_{name}"]) for name in tasks}
        features = {m: found[m] for m in store.spec.features if m in found}
        samples.append({"clip_id": row["clip_id"], "features": features, "targets": targets})
    return samples, rows


def divisions(rows: list[dict], folds: str) -> Iterator[tuple[str, list[str]]]:
    """Name of each division, and the part of every clip in it: train, val, test, or nothing."""
    if folds == "official":
        yield "official", [row["split"] for row in rows]
    elif folds == "inner":
        training = sorted({row["group"] for row in rows if row["split"] in ("train", "val")})
        for left_out in training:
            yield left_out, [_part(row["group"], training, left_out) for row in rows]
    elif folds == "parts":
        opened = [row["split"] in ("train", "val") for row in rows]
        part = np.random.default_rng(0).permutation(len(rows)) % PARTS
        for left_out in range(PARTS):
            yield (
                str(left_out),
                [("val" if p == left_out else "train") if o else "" for o, p in zip(opened, part, strict=True)],
            )
    else:
        of_row = _folds(rows)
        known = sorted(set(of_row))
        for number, fold in enumerate(known):
            after = known[(number + 1) % len(known)]
            yield str(fold), [{fold: "test", after: "val"}.get(own, "train") for own in of_row]


def _folds(rows: list[dict]) -> list[int]:
    """The fold of every clip: the corpus's, or a random one of its group, or of itself."""
    if any(row["fold"] is not None for row in rows):
        return [row["fold"] for row in rows]
    grouped = any(row["group"] is not None for row in rows)
    units = sorted({row["group"] for row in rows}) if grouped else range(len(rows))
    parts = (np.random.default_rng(0).permutation(len(units)) % FOLDS).tolist()
    of_unit = dict(zip(units, parts, strict=True))
    return [of_unit[row["group"] if grouped else number] for number, row in enumerate(rows)]


def _part(group: str, training: list[str], left_out: str) -> str:
    return "val" if group == left_out else "train" if group in training else ""


def relayered(sample: Sample, layered: Set[str], layers: str) -> Sample:
    """A sample whose layered modalities have one vector per token: the `last` layer, or all of them, `flat`."""
    features = dict(sample["features"])
    for name in layered & features.keys():
        values = features[name]
        features[name] = values[:, -1] if layers == "last" else values.reshape(len(values), -1)
    return {**sample, "features": features}


def fit(
    recipe: Recipe,
    store: Store,
    samples: list[Sample],
    parts: list[str],
    layers: str = "",
    sources: Sequence[clcr.base.MultimodalModel] = (),
) -> tuple[Trainer, dict[str, Memory], list[float]]:
    """A trained model of a division, with its weights of the best epoch; its parts, and val/score of every epoch.

    layers: `last` or `flat`, see above; else all, as they are. sources: models that it takes weights of.
    """
    tasks = task_specs(store, recipe.tasks)
    features = feature_specs(store, modalities_of(recipe.architecture, store))
    if layers and (layered := {m: f.shape for m, f in features.items() if len(f.shape) == 2}):
        size = {m: shape[-1:] if layers == "last" else (prod(shape),) for m, shape in layered.items()}
        features = {m: replace(f, shape=size.get(m, f.shape)) for m, f in features.items()}
        samples = [relayered(sample, layered.keys(), layers) for sample in samples]
    torch.manual_seed(recipe.seed)
    model = clcr.build(recipe.architecture, recipe.network, features, tasks)
    by_part = {p: [s for s, part in zip(samples, parts, strict=True) if part == p] for p in ("train", "val", "test")}
    loaders = {
        part: Memory(chosen, model, recipe.optim.batch_size, recipe if part == "train" else None)
        for part, chosen in by_part.items()
    }
    model.fit_statistics(loaders["train"].sample_batches(256))
    for source in sources:
        take_weights(model, source, "pretrained")
    begin(model, recipe.init, recipe.freeze)
    made = partial(AveragedTrainer, decay=recipe.ema) if recipe.ema else Trainer
    weighing = class_loss(recipe.classes, loaders["train"].counts)
    trainer = made(model, tasks, recipe.optim, loaders["train"].steps, seed=recipe.seed, class_loss=weighing)
    scores = [epoch.metrics["val/score"] for epoch in trainer.fit(loaders["train"], loaders["val"])]
    trainer.load_best()
    return trainer, loaders, scores


def report(trainer: Trainer, loaders: dict[str, Memory], scores: list[float]) -> dict[str, Any]:
    """What `fit` gave as a row: its scores and what it showed."""
    found: dict[str, Any] = {"epochs": len(scores), "val": max(scores), "last": scores[-1]}
    last = "test" if loaders["test"].samples else "val"
    tested, diagnostics, found["right"] = score(trainer, loaders[last])
    found["test"] = tested if last == "test" else ""
    features = trainer.model.features
    alone = {m: score(trainer, loaders[last], m)[0] for m in features} if len(features) > 1 else {}
    found["alone"] = " ".join(f"{m}={value:.3f}" for m, value in alone.items())
    taken = [value for name, value in diagnostics.items() if "participation" in name]
    found["participation"] = f"{np.mean(taken):.3f}" if taken else ""
    return found


def score(trainer: Trainer, loader: Memory, left: str | None = None) -> tuple[float, dict[str, float], str]:
    """The loop's score of a part, diagnostics and `right`; left: the only modality that is left of each clip."""
    batches = (batch if left is None else _only(batch, left) for batch in loader.batches(0))
    predictions, diagnostics = trainer.evaluate(batches)
    bits, labelled = "", all(bool((found.targets >= 0).all()) for found in predictions.values())
    if all(task.kind == "classification" for task in trainer.tasks.values()) and (labelled or len(predictions) == 1):
        right = [(found.logits.argmax(dim=-1) == found.targets).numpy() for found in predictions.values()]
        bits = packed(np.stack(right, axis=1))
    return M.tracked("x", M.split_metrics(trainer.tasks, predictions))["x/score"], diagnostics, bits


def _only(batch: Batch, left: str) -> Batch:
    present = {m: there & (m == left) for m, there in batch.present.items()}
    return Batch(batch.features, present, batch.targets, batch.clip_ids, batch.bins)


class Runs:
    """Recipes on one store. parts: of each fold, the part of every clip; common: options of every recipe."""

    def __init__(self, store: Store, folds: str, common: str) -> None:
        self.store, self.common = store, common
        self.samples, rows = read(store, task_specs(store))
        self.parts = dict(divisions(rows, folds))
        self.alone: dict[tuple[str, str, int, str], clcr.base.MultimodalModel] = {}

    def run(self, text: str, fold: str, seed: int) -> dict[str, Any]:
        """One recipe on one fold."""
        architecture, *words = text.split()
        if {*LAYERS} <= {*words}:
            raise SystemExit(f"{text}: either last or flat")
        tasks, layers = task_specs(self.store), next((word for word in LAYERS if word in words), "")
        modalities = list(self.store.spec.features)
        sources = [self.trained_alone(m, fold, seed, layers) for m in modalities if "pretrained" in words]
        started = time.perf_counter()
        if architecture == "linear":
            found = fit_linear(self.samples, self.parts[fold], words or modalities, tasks)
        else:
            options = [word for word in words if word not in (*LAYERS, "pretrained")]
            recipe = parse(" ".join([architecture, *options, self.common]), seed)
            found = report(*fit(recipe, self.store, self.samples, self.parts[fold], layers, sources))
        return found | {"seconds": round(time.perf_counter() - started)}

    def trained_alone(self, modality: str, fold: str, seed: int, layers: str) -> clcr.base.MultimodalModel:
        """A model of one modality with the common options; trained once."""
        key = modality, fold, seed, layers
        if key not in self.alone:
            recipe = parse(f"{modality} {self.common}", seed)
            self.alone[key] = fit(recipe, self.store, self.samples, self.parts[fold], layers)[0].model
        return self.alone[key]


def parse(text: str, seed: int) -> Recipe:
    """`concat lr=1e-3 model.width=64` as a recipe; what is given first counts."""
    architecture, *words = text.split()
    options = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in reversed(words))}
    options = {k: float(v) if isinstance(v, str) and "e-" in v else v for k, v in options.items()}  # YAML's 1e-3
    listed = {name for name, value in flatten(Recipe()).items() if isinstance(value, tuple)}
    options = {k: tuple(str(v).split(",")) if k in listed and isinstance(v, str) else v for k, v in options.items()}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return override(Recipe(architecture=architecture, seed=seed), options)
