#!/usr/bin/env python
"""Explain: what a trained CLCR attends to, as four pictures in the run's folder and in its MLflow run.

levels.png         the levels that each task is answered from, and the weights of the modalities, on the test split
exchange.png       whether the exchange is used: how loud, from how far in time, and what the model answers without it
participation.png  the share of tokens that take part, by level and modality, over training
clips.png          some clips: which tokens the budget admits, under their frames and log-mel
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import yaml

import clcr
from clcr.batches import Batch
from features.files import open_fs, read_json, read_text, resolve
from features.store import Store, open_store
from features.store.sheet import contact_sheet, write_figure
from pipelines.common.cli import main, require_at_least, resolve_uri
from pipelines.common.errors import JobError
from pipelines.evaluation.exchange import exchange_figure, exchange_use
from pipelines.evaluation.models import PATIENCE
from pipelines.evaluation.strips import alpha_strips
from pipelines.tracking import run as tracking
from pipelines.tracking.figures import participation_figure, weights_figure
from pipelines.training.loading import LoaderConfig, SplitLoader
from pipelines.training.trained import TrainedModel, open_model

BATCH = 32


@dataclass(frozen=True)
class ExplainConfig:
    """Options of the explain job."""

    run: str
    """--out of a finished pipelines/train.py with --architecture clcr; path or URI"""
    store: str
    """feature store of the clips, or a YAML file of several; path or URI"""
    clips: int = 4
    """clips in clips.png, randomly sampled from the test split"""
    seed: int = 0
    """random seed for the sample of clips"""

    def __post_init__(self) -> None:
        require_at_least(self, {"clips": 1, "seed": 0})


def explain(config: ExplainConfig) -> None:
    """The job: load the model, read the test split once, draw."""
    folder = resolve_uri("--run", config.run)
    store = open_store(resolve_uri("--store", config.store))
    trained, fold = load_model(folder), fold_of(folder)
    require_learned(trained, store)
    model = trained.model
    assert isinstance(model, clcr.CLCR)  # load_model gives no other
    figures = {
        "levels.png": weights_figure(*mean_weights(model, store, fold)),
        "exchange.png": exchange_figure(model, exchange_use(model, held_out_batches(model, store, fold))),
        "clips.png": contact_sheet(store, config.clips, config.seed, "test", alpha_strips(model), fold),
    }
    out, run = resolve("explained", folder), find_run(folder)
    if run:
        figures["participation.png"] = participation_figure(participation_history(run, model))
    fs, path = open_fs(out)
    fs.create_dir(path, recursive=True)
    for name, figure in figures.items():
        write_figure(resolve(name, out), figure)
        if run:
            run.log_figure(figure, f"explained/{name}")
        print(resolve(name, out), flush=True)


def find_run(folder: str) -> tracking.Run | None:
    """The training's run; None, and a line, where its folder has outlived MLflow: the history is not drawn then."""
    if (started := read_json(folder, "run.json")) is None:
        return None
    run = tracking.Run(started["tracking_uri"], started["run_id"])
    try:
        run.require_answer(PATIENCE)
    except JobError as error:
        print(f"without participation.png and MLflow: {error}", flush=True)
        return None
    return run


def require_learned(trained: TrainedModel, store: Store) -> None:
    """Raise JobError for a store that the model did not learn to read: other features, tasks or classes."""
    trained.require_features(store)
    declared = {task.name: task for task in store.spec.tasks}
    if missing := trained.model.tasks.keys() - declared.keys():
        raise JobError(f"--store {store.uri} has no task {', '.join(sorted(missing))}, which the model answers")
    for name, task in trained.model.tasks.items():
        if task.classes and task.classes != declared[name].classes:
            raise JobError(
                f"--store {store.uri} has the classes {', '.join(declared[name].classes)} of {name}, and the model "
                f"{', '.join(task.classes)}: explain it on the store that it learned from"
            )


def load_model(folder: str) -> TrainedModel:
    """The model of a finished run. Raises JobError where there is none, or it is no CLCR."""
    if read_text(folder, "metrics.json") is None:
        raise JobError(f"--run {folder} holds no finished training: give the --out of a pipelines/train.py that ended")
    trained = open_model("--run", folder)
    if not isinstance(trained.model, clcr.CLCR):
        name = trained.model.recipe["model"]
        raise JobError(f"--run {folder} holds a {name}, which has no token budget: only clcr has one")
    return trained


def fold_of(folder: str) -> int | None:
    """The fold that was the run's test split; None where the store's own splits were."""
    return yaml.safe_load(read_text(folder, "config.yaml") or "{}").get("loader.fold")


def held_out_batches(model: clcr.CLCR, store: Store, fold: int | None = None) -> Iterator[Batch]:
    """The test split, once."""
    options = LoaderConfig(fold=fold)
    loader = SplitLoader(store, "test", model.features, model.tasks, options, batch_size=BATCH, seed=0, rank=0, world=1)
    return loader.batches(0)


@torch.no_grad()
def mean_weights(
    model: clcr.CLCR, store: Store, fold: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Over the test split: level weights omega (clips, K) by task, and beta and eta (clips,) by modality."""
    omega: dict[str, list[np.ndarray]] = {task: [] for task in model.tasks}
    weights: dict[str, list[np.ndarray]] = {f"{w} {m}": [] for w in ("beta", "eta") for m in model.features}
    for batch in held_out_batches(model, store, fold):
        out, real = model(batch), torch.tensor([bool(clip_id) for clip_id in batch.clip_ids])
        for task, values in out.task_omega.items():
            omega[task].append(values[real].numpy())
        for name, values in (("beta", out.beta), ("eta", out.eta)):
            for i, m in enumerate(model.features):
                weights[f"{name} {m}"].append(values[real, i].numpy())
    of_tasks, of_modalities = (
        {name: np.concatenate(parts) for name, parts in group.items()} for group in (omega, weights)
    )
    return of_tasks, of_modalities


def participation_history(run: tracking.Run, model: clcr.CLCR) -> dict[str, list[tuple[int, float]]]:
    """(epoch, participation rate) by "level/modality", as training logged it on the validation split."""
    names = [f"{level}/{m}" for level in range(len(model.summaries)) for m in model.features]
    history = {n: run.client.get_metric_history(run.run_id, f"diag/participation/{n}") for n in names}
    return {name: [(point.step, point.value) for point in points] for name, points in history.items() if points}


if __name__ == "__main__":
    main(explain, ExplainConfig, "Pictures of what a trained CLCR attends to.")
