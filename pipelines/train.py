#!/usr/bin/env python
"""Train: a feature store becomes a tracked model, on any number of workers (Ray Train).

Run the same command again to resume from the last checkpoint; a finished run only prints its result.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch
import tyro
from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from rich.console import Console
from rich.table import Table

from clcr.errors import DivergedError
from features.files import open_fs, read_json, read_text
from features.store import Mixture, Store, open_store
from pipelines.common.cli import Progress, main, require_at_least, resolve_uri
from pipelines.common.cluster import count_slots, cpus_for, own_cluster
from pipelines.common.compat import plain_train_driver
from pipelines.common.errors import JobError, find_user_error
from pipelines.tracking import run as tracking
from pipelines.tracking.registry import register
from pipelines.tracking.system_metrics import log_system_metrics
from pipelines.tracking.views import runs_page
from pipelines.training.checkpoints import SNAPSHOT, Checkpoints, repair, restore
from pipelines.training.inputs import Inputs, check
from pipelines.training.learner import Recipe
from pipelines.training.loading import task_specs
from pipelines.training.run_folder import (
    as_begun,
    claim,
    description,
    finish,
    open_run,
    prepare,
    require_same_run,
    sole_owner,
    title,
    track_finished,
)
from pipelines.training.workers import worker_learner

# What a later start of the same run may change: none of it changes what is learned.
CHANGEABLE = ("workers", "min_workers", "cpus_per_worker", "checkpoint_seconds", "log_every", "register", "dry_run")
DEATHS = 3  # of workers or hosts that a run survives without a new checkpoint in between


@dataclass(frozen=True)
class TrainConfig:
    """Options of the train job."""

    store: str
    """feature store, or a YAML file of several and their weights; path or URI"""
    out: str
    """folder of this run; path or URI that every host can write"""
    experiment: str = "clcr"
    """MLflow experiment"""
    workers: int = 1
    """data-parallel workers"""
    min_workers: int = 0
    """fewest workers to continue with while the cluster has no room for more; 0 = always --workers"""
    cpus_per_worker: int = 0
    """CPUs of each worker; 0 = as many as the nodes have for each"""
    checkpoint_seconds: float = 30.0
    """seconds between checkpoints, within an epoch too: the most work that a dead worker or host costs"""
    log_every: int = 50
    """log the losses every N steps, as step/...; 0 = only the means of each epoch"""
    register: str = ""
    """register the model with MLflow under this name, as its next version; NAME@ALIAS gives that version an alias,
    unless a later version has it"""
    dry_run: bool = False
    """check the options, the store and what --out holds, print what would be trained, and end; nothing is written"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        least = {"workers": 1, "min_workers": 0, "cpus_per_worker": 0, "checkpoint_seconds": 0, "log_every": 0}
        require_at_least(self, least)
        if self.min_workers > self.workers:
            raise JobError(f"--min-workers {self.min_workers}: more than --workers {self.workers}")


def train(config: TrainConfig) -> None:
    """The job: check, claim the output folder, train on the cluster, print the test result."""
    config = replace(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    config = as_begun(config)
    inputs = check(config.store, config.recipe)
    if config.dry_run:
        return print_plan(config, inputs)
    with sole_owner(config.out):
        started = claim(config, may_differ=CHANGEABLE)
        if (finished := read_json(config.out, "metrics.json")) is not None:
            return show_finished(config, started, finished)
        print(*inputs.lines(), sep="\n", flush=True)
        uri = prepare(config.out)
        run = open_training_run(config, started, uri)
        print(
            f"training {config.recipe.architecture} on {config.workers} workers; MLflow run {run.run_id} at {run.uri}",
            flush=True,
        )
        with run.ending():
            print(launch(config, run), flush=True)
        print_metrics(config, read_json(config.out, "metrics.json"))
        register_model(config, run)
        print(f"compare runs: {runs_page(run.uri, run.experiment_id())}", flush=True)


def print_plan(config: TrainConfig, inputs: Inputs) -> None:
    """What the same command would do without --dry-run. Raises JobError where --out holds another run."""
    if (written := read_text(config.out, "config.yaml")) is not None:
        require_same_run(config, written, may_differ=CHANGEABLE)
    if read_json(config.out, "metrics.json") is not None:
        return print(f"{config.out} holds this run, finished: nothing is left to train")
    recipe, clips = config.recipe, config.recipe.optim.batch_size
    parameters = sum(weights.numel() for weights in inputs.model.parameters())
    print(*inputs.lines(), sep="\n")
    print(
        f"would train {recipe.architecture} of {parameters:,} parameters for {recipe.optim.epochs} epochs of "
        f"{math.ceil(inputs.clips['train'] / clips)} steps of {clips} clips; nothing was written (--dry-run)"
    )


def open_training_run(config: TrainConfig, started: Mapping[str, str] | None, uri: str) -> tracking.Run:
    """The training's MLflow run, whose name, tags and description say what it is."""
    recipe = config.recipe
    tasks = task_specs(open_store(config.store), recipe.tasks)
    tags = {"model": recipe.architecture, "tasks": ", ".join(tasks), "seed": str(recipe.seed)}
    about = description(config.store, recipe, tasks)
    return open_run(config, started, uri, title(config.store, recipe), tags, about)


def show_finished(config: TrainConfig, started: Mapping[str, str] | None, metrics: Mapping[str, Any]) -> None:
    """A finished run's result again; sends MLflow what it had not taken when the run ended."""
    print(f"{config.out} holds this run, finished:")
    print_metrics(config, metrics)
    if started is not None:
        register_model(config, track_finished(config.out, started, metrics, config.recipe.optim))


def launch(config: TrainConfig, run: tracking.Run) -> str:
    """Train on the cluster's workers, again from the last checkpoint whenever a worker or a host dies.

    Returns how it ended, in a line.
    The run ends when it dies more than DEATHS times without a new checkpoint in between: long runs on many machines may
    die often, but they progress. Raises JobError or another error of ours where trying again would not help.
    """
    deaths, trainer = 0, ray_trainer(config, run)
    while True:
        newest = newest_checkpoint(config.out)
        try:
            repair(config.out)
            with plain_train_driver(own_cluster()):
                result: Any = trainer().fit()
                problem, ended = result.return_value
        except TrainingFailedError as error:
            if known := find_user_error(error):
                raise known from error
            deaths = 1 if newest_checkpoint(config.out) != newest else deaths + 1
            if deaths > DEATHS:
                raise
            print(f"a worker or host died ({_last_line(error)}): resuming from the last checkpoint", flush=True)
        else:
            if problem:
                raise JobError(problem)
            return ended


def ray_trainer(config: TrainConfig, run: tracking.Run) -> Callable[[], ray.train.torch.TorchTrainer]:
    """What makes the trainer of this cluster, on GPUs where there are any. Raises JobError when it has no room."""
    least = config.min_workers or config.workers
    gpu = {"GPU": 1} if count_slots({"GPU": 1}) >= least else {}
    cpus = config.cpus_per_worker or cpus_for(config.workers, gpu)
    if (fitting := count_slots({"CPU": cpus, **gpu})) < least:
        raise JobError(
            f"--{'min-' if config.min_workers else ''}workers {least} with {cpus} CPUs each: the cluster's nodes have "
            f"room for {fitting} such workers"
        )
    fs, path = open_fs(config.out)
    workers: Any = (config.min_workers, config.workers) if config.min_workers else config.workers
    # An object of Ray's: its controller, which starts first, does without the imports that unpickling this takes.
    job = ray.put({"config": config, "run": run, "cpus": cpus})
    # mypy reads the hints of Ray Train v1; at run time it is v2, which takes all of this.
    return lambda: ray.train.torch.TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # as above
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(gpu),
            resources_per_worker={"CPU": cpus, **gpu},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # as above
            name="checkpoints",
            storage_path=path,
            storage_filesystem=fs,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),  # the job prints its own progress, once
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
        ),
    )


def newest_checkpoint(out: str) -> str | None:
    """What Ray Train wrote down of a run's checkpoints: another text after each one."""
    return read_text(out, SNAPSHOT)


def train_worker(loop_config: Mapping[str, ray.ObjectRef]) -> tuple[str, str]:
    """What each worker runs. Rank 0 alone writes: to MLflow, and at the end to the output folder.

    loop_config: `job`, Ray's object of the config, the MLflow run and how many CPUs each worker has. Returns why
    training cannot continue, or its result was not tracked, where trying again would not help; and how it ended.
    """
    job = ray.get(loop_config["job"])
    config, run = job["config"], job["run"]
    torch.set_num_threads(job["cpus"])
    if ray.train.get_context().get_world_rank() == 0:
        run.require_answer()  # now, and not when the training has ended
    learner = worker_learner(config.store, config.recipe)
    rank, trainer, checkpoints = learner.rank, learner.trainer, Checkpoints(config.checkpoint_seconds)
    if state := restore(trainer.device):
        trainer.load_state_dict(state["trainer"])
        if rank == 0:
            run.log_again(state["unsent"])
    total = config.recipe.optim.epochs * learner.train.steps
    progress = Progress("train", total, done=trainer.step, unit="steps")

    def save_if_due(last: bool = False) -> None:
        if checkpoints.due(last):
            state = {"trainer": trainer.state_dict(), "unsent": run.unsent()}
            checkpoints.save(state, {"step": trainer.step})

    def after_step(losses: Mapping[str, float]) -> None:
        if config.log_every and trainer.step % config.log_every == 0:
            values = trainer.mean_over_workers(losses)
            if rank == 0:
                run.log_metrics(
                    {name.replace("train/", "step/"): value for name, value in values.items()}, trainer.step
                )
        if rank == 0:
            progress.update(1, f"best val score {trainer.best_score:.3f}" if trainer.best_weights else "")
        save_if_due()

    try:
        with log_system_metrics(run) if rank == 0 else nullcontext():
            for epoch in learner.fit(after_step):
                if rank == 0:
                    run.log_metrics({"best/score": trainer.best_score} | epoch.metrics, epoch.number)
                save_if_due(trainer.finished)
    except DivergedError as error:
        run.flush()
        return str(error), ""
    metrics, predictions, diagnostics = learner.test()
    if rank == 0:
        try:
            finish(learner, config.out, run, metrics, predictions, diagnostics)
        except JobError as error:  # raised here, it would come with Ray's traceback of the worker
            return str(error), ""
    best = f"best val score {trainer.best_score:.3f}, of epoch {trainer.best_epoch + 1}"
    return "", f"trained {trainer.next_epoch} of {config.recipe.optim.epochs} epochs, {best}"


def register_model(config: TrainConfig, run: tracking.Run) -> None:
    """The finished run's model in MLflow's registry, where --register asks for it."""
    if config.register:
        print(f"registered: {', '.join(register(run, config.register))}", flush=True)


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def constant_accuracy(store: Store | Mixture, tasks: Collection[str], fold: int | None) -> dict[str, float]:
    """By task of one class per clip, the share of the test clips' labels that are of the most frequent class."""
    classes = [task.name for task in store.spec.tasks if task.name in tasks and task.kind == "classification"]
    labels = store.index("test", [f"label_{name}" for name in classes], fold)
    found = {name: labels[f"label_{name}"].drop_null().value_counts() for name in classes}
    return {
        name: pc.max(counts.field("counts")).as_py() / pc.sum(counts.field("counts")).as_py()
        for name, counts in found.items()
        if len(counts)
    }


def print_metrics(config: TrainConfig, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """The test result as a table, with the accuracy of always answering the most frequent class."""
    recipe, constant = config.recipe, constant_accuracy(open_store(config.store), metrics, config.recipe.loader.fold)
    columns = sorted({name for values in metrics.values() for name in values} - {"n"})
    heads = [*columns, *(["one class"] if constant else [])]
    table = Table("task", "labels", *heads, title=f"{recipe.architecture}, test split, seed {recipe.seed}")
    if constant:
        table.caption = "one class: accuracy of always answering the most frequent one"
    for task, values in metrics.items():
        numbers = [f"{values[c]:.3f}" if c in values else "" for c in columns]
        table.add_row(task, str(int(values["n"])), *numbers, f"{constant[task]:.3f}" if task in constant else "")
    Console(width=100).print(table)
    print(f"written to {config.out}/metrics.json", flush=True)


if __name__ == "__main__":
    main(
        train,
        TrainConfig,
        "Train a model on a feature store. Run the same command again to resume from the last checkpoint.",
    )
