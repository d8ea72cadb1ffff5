#!/usr/bin/env python
"""Predict: a trained model's answers for clips, of a feature store or new ones, as parquet, on any number of machines.

Each task takes one shard of the store and commits one file, OUT/SHARD.parquet; a run that was killed resumes with what
is missing when the same command is given again. A row is a clip: clip_id, its split and fold in the corpus, its store
where --store names several, and for each task of the model

    classification   TASK the class, TASK_probability of it, TASK_probabilities of every class by its name (a class
                     that differs from an earlier one in case only has a number behind it: A, a_2)
    numbers          TASK
    events           TASK a list of {start, end, label} in seconds, as a manifest has them: bins of one class in a row

New clips need no store: `--corpus new.csv`, a folder of media files or one file. The spec in the model's folder says
how to encode them. A few clips are answered in this process, without Ray; many are extracted to OUT/_store first.
"""

import io
import json
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from clcr.base import MultimodalModel
from features.corpus.manifest import SPLITS
from features.errors import one_line
from features.files import list_files, open_fs, read_json, write_atomic, write_text
from features.store import Mixture, Store, open_store
from infra.doctor import ray_access, require, storage
from pipelines.answering.batches import batch_of
from pipelines.answering.table import require_distinct_columns, to_table
from pipelines.common.cli import Progress, main, require_at_least, resolve_uri
from pipelines.common.cluster import processes_for, start_ray
from pipelines.common.errors import JobError, find_user_error
from pipelines.training.loading import AHEAD, prefetch
from pipelines.training.run_folder import sole_owner
from pipelines.training.trained import TrainedModel, open_model

CLAIM = "_predictions.json"  # what the parts are of; readers of parquet folders pass over names with an underscore
COLUMNS = ("clip_id", "split", "store", "fold", "shard", "offset", "nbytes", "duration")  # of the index; store: if any


@dataclass(frozen=True)
class PredictConfig:
    """Options of the predict job."""

    model: str
    """--out of a finished pipelines/train.py, its folder `model`, or (with MLFLOW_TRACKING_URI set)
    models:/NAME/VERSION or models:/NAME@ALIAS"""
    store: str = ""
    """feature store of the clips, or a YAML file of several; path or URI"""
    out: str = ""
    """folder for the predictions; path or URI; a few clips of --corpus are answered on the screen without one"""
    split: str = ""
    """train, val or test: only the clips that the corpus has there, whatever fold a model was tested on; none = all"""
    batch_size: int = 64
    """clips that a process passes through the model at once (which mm_orient compares with each other where it was
    trained with --mm-orient.reference batch)"""
    concurrency: int = 0
    """processes over the whole cluster; 0 = one per GPU, or per CPU where there is none"""
    gpus_per_process: float = 1.0
    """GPUs of each process, on a cluster that has any; a fraction shares one, 0 = predict on CPUs"""

    corpus: str = ""
    """raw clips instead of a store: a media file, a folder of them, or a manifest (.csv, .parquet); path or URI"""
    weights: str = ""
    """with --corpus, for a model on a network's vectors: the weights file that its store was made with, or hf:FOLDER"""

    def __post_init__(self) -> None:
        require_at_least(self, {"batch_size": 1, "concurrency": 0, "gpus_per_process": 0})
        if bool(self.store) == bool(self.corpus):
            raise JobError("--store or --corpus: name what to predict, a feature store or raw clips, one of the two")
        if self.corpus and self.split:
            raise JobError(f"--split {self.split} belongs to --store: all clips of --corpus are answered")
        if self.store and not self.out:
            raise JobError("missing option --out: the folder for the predictions")
        if self.split and self.split not in SPLITS:
            raise JobError(f"--split {self.split}: choose one of {', '.join(SPLITS)}, or leave it out for all")


def predict(config: PredictConfig) -> None:
    """The job: check that model and store fit, predict the shards that are missing, count."""
    if config.corpus:
        from pipelines.answering.corpus import predict_corpus

        return predict_corpus(config, predict)
    out = resolve_uri("--out", config.out)
    store, trained = open_store(resolve_uri("--store", config.store)), open_model("--model", config.model)
    store.require_complete()
    trained.require_features(store)
    require_distinct_columns(trained.model.tasks, isinstance(store, Mixture))
    for name in sorted(trained.model.features.keys() - store.spec.features.keys()):
        print(f"modality {name}: {store.uri} holds none, so every clip is predicted without it", flush=True)
    rows = clips_by_shard(store, config.split)
    if not rows:
        what = f"--split {config.split}: {store.uri} has no clip in it" if config.split else f"{store.uri} has no clip"
        raise JobError(what)
    require(storage(out))
    with sole_owner(out):
        claim(out, trained, store)
        done = committed(out)
        missing = {name: count for name, count in rows.items() if done.get(name) != count}  # failed clips may be cured
        print(f"{', '.join(trained.model.tasks)}: {len(missing)} of {len(rows)} shards to predict", flush=True)
        if missing:
            require(ray_access())
            start_ray()
            run(config, trained.model, store, missing, out)
    print(f"predictions of {sum(rows.values())} clips: {shlex.quote(out)}/*.parquet")


def clips_by_shard(store: Store, split: str) -> dict[str, int]:
    """How many clips each shard of a split, or of all splits, has; those without any are left out."""
    counts = store.index(split or None, ["shard"])["shard"].value_counts().to_pylist()
    return {count["values"]: count["counts"] for count in counts}


def committed(out: str) -> dict[str, int]:
    """How many predictions each part holds that is there, by shard."""
    fs, path = open_fs(out)

    def count(part: str) -> int:
        with fs.open_input_file(part) as file:
            return pq.read_metadata(file).num_rows

    parts = [info.path for info in list_files(fs, path) if info.path.endswith(".parquet")]
    with ThreadPoolExecutor(16) as threads:
        counts = list(threads.map(count, parts))
    return {part.rpartition("/")[2].removesuffix(".parquet"): n for part, n in zip(parts, counts, strict=True)}


def claim(out: str, trained: TrainedModel, store: Store) -> None:
    """Make the folder this model's and this store's. Raises JobError where another's predictions lie there."""
    claimed = {"model": trained.digest, "store": store.spec.fingerprint}
    if (earlier := read_json(out, CLAIM)) is None:
        fs, path = open_fs(out)
        fs.create_dir(path, recursive=True)
        return write_text(out, CLAIM, json.dumps(claimed, indent=2) + "\n")
    if differ := [what for what, digest in claimed.items() if earlier.get(what) != digest]:
        raise JobError(f"--out {out} holds predictions of another {' and another '.join(differ)}: give another --out")


def run(config: PredictConfig, model: MultimodalModel, store: Store, shards: Mapping[str, int], out: str) -> None:
    """Predict the shards on the whole cluster; shards: how many clips each has."""
    workers, gpus = processes_for(len(shards), config.concurrency, config.gpus_per_process)
    progress = Progress("predict", sum(shards.values()))
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Only names travel, one to a block, and no process waits with a second one: that is what its death costs.
    names = ray.data.from_items([{"shard": name} for name in shards], override_num_blocks=len(shards))
    done = names.map_batches(
        Predictor,
        fn_constructor_args=(ray.put(model), store.uri, out, config.batch_size, "cuda" if gpus else "cpu"),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise JobError(row["error"])
        progress.update(shards[row["shard"]])


class Predictor:
    """One process: it holds the model and predicts shard after shard."""

    def __init__(self, model: ray.ObjectRef, store_uri: str, out: str, batch_size: int, device: str) -> None:
        torch.set_num_threads(1)
        self.model: MultimodalModel = ray.get(model).to(device).eval()
        self.store_uri, self.out, self.batch_size = store_uri, out, batch_size
        self.store: Store | None = None  # opened at the first shard, so that what goes wrong is said as of any shard

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with one shard's name in, the same and what went wrong out: Ray would wrap an error in its own."""
        shard, error = batch["shard"][0].as_py(), ""
        try:
            self.store = self.store or open_store(self.store_uri)
            table = predict_shard(self.model, self.store, shard, self.batch_size)
            write_part(self.out, shard, table)
        except torch.OutOfMemoryError as failure:
            error = f"shard {shard}: {one_line(failure)}; lower --batch-size {self.batch_size}"
        except Exception as failure:
            if not isinstance(failure, OSError) and find_user_error(failure) is None:
                raise
            advice = "fix the cause, then run the same command again to resume"
            error = f"shard {shard} of {self.store_uri} to {self.out}: {one_line(failure)}; {advice}"
        return pa.table({"shard": batch["shard"], "error": [error]})


@torch.no_grad()
def predict_shard(model: MultimodalModel, store: Store, shard: str, batch_size: int) -> pa.Table:
    """The answers for one shard's clips, as a part has them."""
    device = next(model.parameters()).device
    table = store.part("index", shard)
    index = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    parts = [index[first : first + batch_size] for first in range(0, len(index), batch_size)]
    tables = []
    for rows, batch in prefetch(((rows, batch_of(model, store, rows)) for rows in parts), AHEAD):
        logits = model(batch.to(device)).logits
        tables.append(to_table(model.tasks, rows, {name: values.cpu() for name, values in logits.items()}))
    return pa.concat_tables(tables)


def write_part(out: str, shard: str, table: pa.Table) -> None:
    """Commit one shard's predictions."""
    buffer, (fs, path) = io.BytesIO(), open_fs(out)
    pq.write_table(table, buffer)
    write_atomic(fs, f"{path}/{shard}.parquet", buffer.getvalue())


if __name__ == "__main__":
    main(predict, PredictConfig, "A trained model's answers for a feature store. Run the same command again to resume.")
