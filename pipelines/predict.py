#!/usr/bin/env python
"""Predict: a trained model's answers for every clip of a feature store, as parquet, on any number of machines.

Each task takes one shard of the store and commits one file, OUT/SHARD.parquet; a run that was killed goes on with what
is missing when the same command is given again. A row is a clip: clip_id, split, and for each task of the model

    classification   TASK the class, TASK_probability of it, TASK_probabilities of every class by its name
    numbers          TASK
    events           TASK a list of {start, end, label} in seconds, as a manifest has them: bins of one class in a row

The clips need no labels: extract new ones with the options of the store that the model learned from.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from clcr.base import MultimodalModel
from clcr.batches import collate
from clcr.tasks import TaskSpec
from features.events import BACKGROUND, EVENTS, bin_events
from features.files import open_fs, read_json, write_atomic, write_text
from features.store import Store
from pipelines.cli import JobError, Progress, find_user_error, main, require_at_least, resolve_uri
from pipelines.cluster import room, start_ray
from pipelines.models import TrainedModel, open_model

SPLITS = ("train", "val", "test")
CLAIM = "predictions.json"  # what the parts are of


@dataclass(frozen=True)
class PredictConfig:
    """Options of the predict job."""

    model: str
    """--out of a finished pipelines/train.py, its folder `model`, or models:/NAME/VERSION of MLflow's registry"""
    store: str
    """feature store of the clips; path or URI"""
    out: str
    """folder for the predictions; path or URI"""
    split: str = ""
    """train, val or test: those clips alone; none = all"""
    batch_size: int = 64
    """clips that a process passes through the model at once"""
    concurrency: int = 0
    """processes over the whole cluster; 0 = one per GPU, or per CPU where there is none"""
    gpus_per_process: float = 1.0
    """GPUs of each process, on a cluster that has any; a fraction shares one"""

    def __post_init__(self) -> None:
        require_at_least(self, {"batch_size": 1, "concurrency": 0, "gpus_per_process": 0})
        if self.split and self.split not in SPLITS:
            raise JobError(f"--split {self.split}: choose one of {', '.join(SPLITS)}, or leave it out for all")


def predict(config: PredictConfig) -> None:
    """The job: check that model and store fit, predict the shards that are missing, count."""
    out = resolve_uri("--out", config.out)
    store, trained = Store(resolve_uri("--store", config.store)), open_model("--model", config.model)
    store.require_complete()
    trained.require_features(store)
    shards = [name for name in store.spec.shards() if not config.split or name.startswith(f"{config.split}-")]
    if not shards:
        raise JobError(f"--split {config.split}: {store.uri} has no clip in it")
    claim(out, trained, store)
    missing = [name for name in shards if not exists(out, name)]
    print(f"{', '.join(trained.model.tasks)}: {len(missing)} of {len(shards)} shards to predict", flush=True)
    if missing:
        start_ray()
        run(config, trained.model, store, missing, out)
    rows = sum(read_part(out, name).num_rows for name in shards)
    print(f"{out}: predictions of {rows} clips ({', '.join(f'{name}.parquet' for name in shards[:2])}, ...)")


def claim(out: str, trained: TrainedModel, store: Store) -> None:
    """Make the folder this model's and this store's. Raises JobError where another's predictions lie there."""
    mine = {"model": trained.digest, "store": store.spec.fingerprint}
    if (theirs := read_json(out, CLAIM)) is None:
        fs, path = open_fs(out)
        fs.create_dir(path, recursive=True)
        return write_text(out, CLAIM, json.dumps(mine, indent=2) + "\n")
    if differ := [what for what, digest in mine.items() if theirs.get(what) != digest]:
        raise JobError(f"--out {out} holds predictions of another {' and another '.join(differ)}: give another --out")


def run(config: PredictConfig, model: MultimodalModel, store: Store, shards: Sequence[str], out: str) -> None:
    """Predict the shards on the whole cluster."""
    gpus = config.gpus_per_process if ray.cluster_resources().get("GPU", 0) else 0
    most = room({"CPU": 1, "GPU": gpus})
    if not most:
        raise JobError(f"--gpus-per-process {gpus:g}: no node has room for such a process")
    workers = min(config.concurrency or most, most, len(shards))
    rows = {name: store.part("index", name).num_rows for name in shards}
    progress = Progress("predict", sum(rows.values()))
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Only names travel, one to a block: a block is what a dead process costs.
    names = ray.data.from_items([{"shard": name} for name in shards], override_num_blocks=len(shards))
    done = names.map_batches(
        Predictor,
        fn_constructor_args=(ray.put(model), store.uri, out, config.batch_size),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise JobError(row["error"])
        progress.update(rows[row["shard"]])


class Predictor:
    """One process: it holds the model and predicts shard after shard."""

    def __init__(self, model: ray.ObjectRef, store_uri: str, out: str, batch_size: int) -> None:
        torch.set_num_threads(1)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: MultimodalModel = ray.get(model).to(self.device).eval()
        self.store_uri, self.out, self.batch_size = store_uri, out, batch_size

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with one shard's name in, the same and what went wrong out: Ray would wrap an error in its own."""
        error = ""
        try:
            self.predict(batch["shard"][0].as_py())
        except Exception as failure:
            known = find_user_error(failure) or (failure if isinstance(failure, OSError) and failure.errno else None)
            if known is None:
                raise
            error = str(known)
        return pa.table({"shard": batch["shard"], "error": [error]})

    def predict(self, shard: str) -> None:
        """Predict one shard's clips and commit their part."""
        store, tasks = Store(self.store_uri), self.model.tasks
        index = store.part("index", shard).select(["clip_id", "split", "shard", "offset", "nbytes", "duration"])
        parts = [to_table(tasks, [], no_logits(tasks))]  # of a shard without clips too, all columns
        for first in range(0, len(index), self.batch_size):
            rows = index.slice(first, self.batch_size).to_pylist()
            parts.append(to_table(tasks, rows, logits_of(self.model, store, rows, self.device)))
        buffer, (fs, path) = io.BytesIO(), open_fs(self.out)
        pq.write_table(pa.concat_tables(parts), buffer)
        write_atomic(fs, f"{path}/{shard}.parquet", buffer.getvalue())


@torch.no_grad()
def logits_of(
    model: MultimodalModel, store: Store, rows: Sequence[Mapping[str, Any]], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """What the model says of some clips, given as rows of the index: by task (B, outputs) or (B, bins, outputs)."""
    rates = {name: task.rate for name, task in model.tasks.items() if task.rate}
    stored = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
    samples = [
        {
            "clip_id": row["clip_id"],
            "features": {m: sample[m] for m in model.features if m in sample},
            "targets": {name: bin_events(None, row["duration"], rate, {}) for name, rate in rates.items()},
        }
        for row, sample in zip(rows, stored, strict=True)
    ]
    out = model(collate(samples, model.features, model.tasks).to(device))
    return {name: logits.float().cpu() for name, logits in out.logits.items()}


def no_logits(tasks: Mapping[str, TaskSpec]) -> dict[str, torch.Tensor]:
    """The same of no clips."""
    return {name: torch.zeros(0, *[1] * bool(task.rate), task.outputs) for name, task in tasks.items()}


def to_table(
    tasks: Mapping[str, TaskSpec], rows: Sequence[Mapping[str, Any]], logits: Mapping[str, torch.Tensor]
) -> pa.Table:
    """Predictions as rows of a part."""
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("clip_id", "split")}
    seconds = [row["duration"] for row in rows]
    for name, task in tasks.items():
        columns |= answers(task, logits[name], seconds)
    return pa.table(columns)


def answers(task: TaskSpec, logits: torch.Tensor, seconds: Sequence[float]) -> dict[str, pa.Array]:
    """Logits (B, outputs), of events (B, bins, outputs), as the columns of a task; seconds: the clips' lengths."""
    if not task.has_classes:
        return {task.name: pa.array(logits.squeeze(-1).numpy())}
    if task.rate:
        best = logits.argmax(-1).numpy()
        return {task.name: pa.array([to_events(task, *clip) for clip in zip(best, seconds, strict=True)], EVENTS)}
    probabilities = logits.softmax(-1).numpy()
    best = probabilities.argmax(-1)
    return {
        task.name: pa.array([task.classes[i] for i in best], pa.string()),
        f"{task.name}_probability": pa.array(probabilities.max(-1)),
        f"{task.name}_probabilities": pa.StructArray.from_arrays(
            [pa.array(column) for column in probabilities.T.copy()], names=list(task.classes)
        ),
    }


def to_events(task: TaskSpec, bins: np.ndarray, seconds: float) -> list[dict[str, Any]]:
    """Classes of bins (bins,), of which a clip has as many as its length holds, as events: runs of one class."""
    bins = bins[: len(bin_events(None, seconds, task.rate, {}))]
    edges = np.flatnonzero(np.diff(bins, prepend=-1, append=-1))
    return [
        {"start": first / task.rate, "end": min(last / task.rate, seconds), "label": task.classes[bins[first]]}
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if task.classes[bins[first]] != BACKGROUND
    ]


def exists(out: str, shard: str) -> bool:
    """Whether a shard's predictions are committed."""
    fs, path = open_fs(out)
    return fs.get_file_info(f"{path}/{shard}.parquet").is_file


def read_part(out: str, shard: str) -> pq.FileMetaData:
    """What a shard's predictions say of themselves."""
    fs, path = open_fs(out)
    with fs.open_input_file(f"{path}/{shard}.parquet") as file:
        return pq.read_metadata(file)


if __name__ == "__main__":
    main(predict, PredictConfig, "A trained model's answers for a feature store. Run again to go on where it stopped.")
