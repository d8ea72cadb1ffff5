"""A run's folder, from its claim to its result: what every job that trains does before, around and after it.

OUT/config.yaml      the options of the run; a later start must give the same, but for what it may change
OUT/run.json         its MLflow run, and the content of the store that it reads
OUT/checkpoints/     what a later start goes on from (train alone)
OUT/model/           the model folder
OUT/metrics.json     the test metrics: written last, because they say that the run is finished
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.fs as pafs
import ray
import yaml

import clcr
from clcr import metrics as M
from features.corpus.manifest import SPLITS
from features.files import open_fs, read_json, read_text, write_text
from features.store import Store
from infra.doctor import mlflow_server, ray_access, require, storage, torch_pairing
from pipelines.common.cli import JobError, flatten, to_yaml
from pipelines.common.cluster import start_ray
from pipelines.tracking import run as tracking
from pipelines.tracking.figures import confusion_figure
from pipelines.training.learner import Learner, Recipe, build_model


def check(store_uri: str, recipe: Recipe) -> None:
    """Everything about the input that can be wrong, before anything is started or written."""
    store = Store(store_uri)
    store.require_complete()
    tasks = build_model(store, recipe).tasks
    for split in SPLITS:
        labels = store.index(split, [f"label_{task}" for task in tasks], recipe.loader.fold)
        if not len(labels):
            raise JobError(f"{store_uri}: no usable clip in split {split}; see its failures")
        if all(column.null_count == len(labels) for column in labels.columns):
            raise JobError(f"{store_uri}: no clip in split {split} has a label of {', '.join(tasks)}")


def claim(config: Any, may_differ: Sequence[str] = ()) -> dict[str, str] | None:
    """Make the folder `config.out` this run's. Returns what an earlier start of the same run left there.

    may_differ: options that a later start may change. Raises JobError when another run's options lie there, or a run on
    another content of the store.
    """
    mine = to_yaml(config)
    if (theirs := read_text(config.out, "config.yaml")) is None:
        fs, path = open_fs(config.out)
        fs.create_dir(path, recursive=True)
        write_text(config.out, "config.yaml", mine)
        return None
    before, now = yaml.safe_load(theirs), yaml.safe_load(mine)
    compared = sorted((before.keys() | now.keys()) - set(may_differ))
    if changed := [k for k in compared if before.get(k) != now.get(k)]:
        what = ", ".join(f"{k} {before.get(k)} not {now.get(k)}" for k in changed[:4])
        raise JobError(f"--out {config.out} holds another run ({what}): give another --out, or the same options")
    started, content = read_json(config.out, "run.json"), Store(config.store).spec.fingerprint
    if started and started.get("store", content) != content:
        raise JobError(f"--out {config.out} holds a run on what {config.store} was before: give another --out")
    if theirs != mine:
        write_text(config.out, "config.yaml", mine)
    return started


def open_run(
    config: Any, started: Mapping[str, str] | None, uri: str, name: str, tags: Mapping[str, str]
) -> tracking.Run:
    """The MLflow run of `config.out`: the one that an earlier start left there, as `claim` gave it, or a new one.

    Its parameters are those of its first start; its config.yaml has what a later start changed.
    """
    if started:
        run = tracking.resume_run(started["tracking_uri"], started["run_id"])
    else:
        content = Store(config.store).spec.fingerprint
        tags = {**tags, "store.fingerprint": content}
        run = tracking.start_run(uri, config.experiment, name, flatten(config), tags)
        about = {"run_id": run.run_id, "tracking_uri": run.uri, "store": content}
        write_text(config.out, "run.json", json.dumps(about))
    run.log_text(to_yaml(config), "config.yaml")
    return run


def prepare(out: str) -> str:
    """Check what every tracked job needs, start Ray or join it, and return the tracking server's address."""
    uri = tracking.tracking_uri(out)
    require(torch_pairing(), ray_access(), storage(out), mlflow_server(uri))
    start_ray()
    hosts = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    tracking.require_reachable_by(hosts, uri)
    return uri


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
    run.flush()
    write_text(out, "metrics.json", json.dumps(metrics, indent=2) + "\n")
