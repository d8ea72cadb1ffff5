#!/usr/bin/env python
"""Train: a feature store becomes a tracked model, on any number of workers (Ray Train).

Run again with the same options and it goes on from the last checkpoint; a finished run only prints its result.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.torch
import torch
import tyro
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from rich.console import Console
from rich.table import Table

import clcr
from clcr import metrics as M
from clcr.config import BudgetConfig, CLCRConfig, LossConfig, ModelConfig, StemConfig
from clcr.registry import MODELS
from clcr.training import Epoch, OptimConfig, Trainer
from features.files import open_fs, read_json, read_text, write_text
from features.store import Store
from infra.doctor import mlflow_server, ray_access, require, storage, torch_pairing
from pipelines import tracking
from pipelines.cli import JobError, Progress, flatten, main, require_at_least, resolve_uri, start_ray, to_yaml
from pipelines.figures import confusion_figure
from pipelines.loading import LoaderConfig, SplitLoader, feature_specs, task_specs

SPLITS = ("train", "val", "test")
STATISTICS_CLIPS = 256  # clips from which the stems learn the mean and spread of their inputs


@dataclass(frozen=True)
class Recipe:
    """What is learned and how: the options that train and sweep share."""

    architecture: Annotated[str, tyro.conf.arg(name="model")] = "clcr"
    """clcr, concat, mult, or the name of one modality (video, audio): that modality alone"""
    tasks: tuple[str, ...] = ()
    """tasks to learn together; none named = all that the store declares"""
    seed: int = 0
    """of the initial weights, the order of the clips and dropout"""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stem: StemConfig = field(default_factory=StemConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def network(self) -> CLCRConfig:
        """The network's part. Raises ConfigError when the options do not fit together."""
        return CLCRConfig(model=self.model, stem=self.stem, budget=self.budget, loss=self.loss)


@dataclass(frozen=True)
class TrainConfig:
    """Options of the train job."""

    store: str
    """feature store; path or URI"""
    out: str
    """folder of this run; path or URI that every host can write"""
    experiment: str = "clcr"
    """MLflow experiment"""
    workers: int = 1
    """data-parallel workers"""
    cpus_per_worker: int = 0
    """CPUs of each worker; 0 = an equal share of the cluster's"""
    checkpoint_seconds: float = 30.0
    """least time between checkpoints: what a dead worker costs at most, beside one epoch"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        require_at_least(self, {"workers": 1, "cpus_per_worker": 0, "checkpoint_seconds": 0})


class Learner:
    """One worker's part of a run: the store's loaders, the model and its trainer. Train and sweep both use it.

    Never opens the test split before `test` is called, and a split that is not among `splits` never.
    """

    def __init__(
        self,
        store_uri: str,
        recipe: Recipe,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        splits: tuple[str, ...] = SPLITS,
    ) -> None:
        self.recipe, self.rank, self.world, self.splits = recipe, rank, world, splits
        self.store = Store(store_uri)
        self.tasks = task_specs(self.store, recipe.tasks)
        self.features = feature_specs(self.store, modalities_of(recipe.architecture, self.store))
        torch.manual_seed(recipe.seed)
        self.train, self.val = self.loader("train"), self.loader("val")
        model = clcr.build(recipe.architecture, recipe.network(), self.features, self.tasks)
        model.fit_statistics(self.train.sample_batches(STATISTICS_CLIPS))
        self.trainer = Trainer(model, self.tasks, recipe.optim, self.train.steps, seed=recipe.seed, device=device)

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

    def fit(self) -> Iterator[Epoch]:
        """Epoch by epoch, from where the trainer stands."""
        return self.trainer.fit(self.train, self.val)

    def test(self) -> tuple[dict[str, dict[str, float]], dict[str, M.Predictions], dict[str, float]]:
        """Metrics by task, predictions and diagnostics of the best epoch's weights on the test split."""
        self.trainer.load_best()
        predictions, diagnostics = self.trainer.evaluate(self.loader("test").batches(0))
        return M.split_metrics(self.tasks, predictions), predictions, diagnostics


def train(config: TrainConfig) -> None:
    """The job: check, claim the output folder, train on the cluster, print the test result."""
    config = replace(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    recipe, store = config.recipe, check(config.store, config.recipe)
    started = claim(config)
    if (finished := read_json(config.out, "metrics.json")) is not None:
        print(f"{config.out} holds this run, finished:")
        return print_metrics(config, finished)
    uri = prepare(config.out)
    tags = {"model": recipe.architecture, "store.fingerprint": store.spec.fingerprint}
    run = open_run(config, started, uri, f"{recipe.architecture}-seed{recipe.seed}", tags)
    print(
        f"training {recipe.architecture} on {config.workers} workers; MLflow run {run.run_id} at {run.uri}", flush=True
    )
    with run.ending():
        launch(config, run)
    print_metrics(config, read_json(config.out, "metrics.json"))
    print(
        f"compare runs: mlflow ui --backend-store-uri {run.uri}"
        if run.uri.startswith("sqlite")
        else f"MLflow: {run.uri}"
    )


def check(store_uri: str, recipe: Recipe) -> Store:
    """Everything about the input that can be wrong, before anything is started or written."""
    store = Store(store_uri)
    store.require_complete()
    task_specs(store, recipe.tasks)
    feature_specs(store, modalities_of(recipe.architecture, store))
    recipe.network()
    rows = store.index(columns=["split"])["split"].value_counts().to_pylist()
    if missing := set(SPLITS) - {row["values"] for row in rows}:
        raise JobError(f"{store_uri}: no usable clip in split {', '.join(sorted(missing))}; see its failures")
    return store


def claim(config: Any) -> dict[str, str] | None:
    """Make the folder `config.out` this run's. Returns what an earlier start of the same run left there.

    Raises JobError when another run's options lie there.
    """
    mine = to_yaml(config)
    if (theirs := read_text(config.out, "config.yaml")) is None:
        fs, path = open_fs(config.out)
        fs.create_dir(path, recursive=True)
        write_text(config.out, "config.yaml", mine)
        return None
    before, now = yaml.safe_load(theirs), yaml.safe_load(mine)
    if changed := [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]:
        what = ", ".join(f"{k} {before.get(k)} not {now.get(k)}" for k in changed[:4])
        raise JobError(f"--out {config.out} holds another run ({what}): give another --out, or the same options")
    return read_json(config.out, "run.json")


def open_run(
    config: Any, started: Mapping[str, str] | None, uri: str, name: str, tags: Mapping[str, str]
) -> tracking.Run:
    """The MLflow run of `config.out`: the one that an earlier start left there, as `claim` gave it, or a new one."""
    if started:
        return tracking.resume_run(started["tracking_uri"], started["run_id"])
    run = tracking.start_run(uri, config.experiment, name, flatten(config), tags)
    write_text(config.out, "run.json", json.dumps({"run_id": run.run_id, "tracking_uri": run.uri}))
    return run


def prepare(out: str) -> str:
    """Check what every tracked job needs, start Ray or join it, and return the tracking server's address."""
    uri = tracking.tracking_uri(out)
    require(torch_pairing(), ray_access(), storage(out), mlflow_server(uri))
    start_ray()
    hosts = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    tracking.require_reachable_by(hosts, uri)
    return uri


def launch(config: TrainConfig, run: tracking.Run) -> None:
    """Train on the cluster's workers, on GPUs where there are any."""
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) >= config.workers
    cpus = config.cpus_per_worker or max(1, int(resources["CPU"]) // config.workers)
    if cpus * config.workers > resources["CPU"]:
        raise JobError(
            f"--workers {config.workers} with {cpus} CPUs each need more than the cluster's {resources['CPU']:g} CPUs"
        )
    fs, path = open_fs(config.out)
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run": run, "cpus": cpus},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)}
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=fs,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3),
            logging_config=LoggingConfig(log_level="ERROR"),  # the job prints its own progress, once
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
        ),
    )
    trainer.fit()


def train_worker(job: Mapping[str, Any]) -> None:
    """What each worker runs. Rank 0 alone writes: to MLflow, and at the end to the output folder."""
    config, run = job["config"], job["run"]
    torch.set_num_threads(job["cpus"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    learner = Learner(config.store, config.recipe, rank, context.get_world_size(), ray.train.torch.get_device())
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=learner.trainer.device, weights_only=True)
        learner.trainer.load_state_dict(state)
    progress = Progress("train", config.recipe.optim.epochs, done=learner.trainer.next_epoch, unit="epochs")
    saved = time.monotonic()
    for epoch in learner.fit():
        if rank == 0:
            run.log_metrics(epoch.metrics, epoch.number)
            progress.update(1, f"val score {epoch.metrics['val/score']:.3f}")
        last = epoch.number + 1 == config.recipe.optim.epochs
        # Rank 0's clock decides for all: a report waits for every worker, and for the controller's next look at them.
        if broadcast_from_rank_zero(last or time.monotonic() - saved > config.checkpoint_seconds):
            report(epoch, learner.trainer.state_dict() if rank == 0 else None)
            saved = time.monotonic()
    metrics, predictions, diagnostics = learner.test()
    if rank == 0:
        finish(learner, config.out, run, metrics, predictions, diagnostics)


def report(epoch: Epoch, state: Mapping[str, Any] | None) -> None:
    """Tell Ray Train how far training is, with rank 0's checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        if state is not None:
            torch.save(state, Path(folder) / "state.pt")
        metrics = {"epoch": epoch.number, "val/score": epoch.metrics["val/score"]}
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if state is not None else None)


def finish(
    learner: Learner,
    out: str,
    run: tracking.Run,
    metrics: Mapping[str, Mapping[str, float]],
    predictions: Mapping[str, M.Predictions],
    diagnostics: Mapping[str, float],
) -> None:
    """The model folder, the pictures, the test metrics; metrics.json last, because it says that the run is finished."""
    tested = M.tracked("test", metrics) | {f"test/{name}": value for name, value in diagnostics.items()}
    run.log_metrics(tested, learner.recipe.optim.epochs)
    for name, task in learner.tasks.items():
        if task.has_classes and name in metrics:
            counts = M.confusion_matrix(task, predictions[name]).numpy()
            run.log_figure(confusion_figure(counts, task.classes, f"{name}, test"), f"confusion/{name}.png")
    with tempfile.TemporaryDirectory() as folder:
        clcr.save(learner.trainer.model, folder, learner.store.spec.to_dict())
        run.log_folder(folder, "model")
        fs, path = open_fs(out)
        fs.create_dir(f"{path}/model", recursive=True)
        pafs.copy_files(folder, f"{path}/model", destination_filesystem=fs)
    write_text(out, "metrics.json", json.dumps(metrics, indent=2) + "\n")


def modalities_of(architecture: str, store: Store) -> tuple[str, ...]:
    """The modalities that a model reads: one for a single-modality model, else all of the store's."""
    if architecture in store.spec.features:
        return (architecture,)
    if architecture not in MODELS:
        known = ", ".join([*MODELS, *store.spec.features])
        raise JobError(f"--model {architecture}: known for this store are {known}")
    return ()


def print_metrics(config: TrainConfig, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """The test result as a table."""
    recipe = config.recipe
    columns = sorted({name for values in metrics.values() for name in values} - {"n"})
    table = Table("task", "labels", *columns, title=f"{recipe.architecture}, test split, seed {recipe.seed}")
    for task, values in metrics.items():
        numbers = [f"{values[c]:.3f}" if c in values else "" for c in columns]
        table.add_row(task, str(int(values["n"])), *numbers)
    Console(width=100).print(table)
    print(f"written to {config.out}/metrics.json", flush=True)


if __name__ == "__main__":
    main(train, TrainConfig, "Train a model on a feature store. Run again to go on from the last checkpoint.")
