"""A run's folder, from its claim to its result: what every job that trains does before, around and after it.

OUT/_owner.json      the job that runs there now, with its heartbeat; gone when it ends
OUT/config.yaml      the options of the run; a later start must give the same, but for what it may change
OUT/run.json         its MLflow run, and the content of the store that it reads
OUT/checkpoints/     what a later start resumes from (train alone)
OUT/model/           the model folder
OUT/confusion/       pictures of the confusion matrices
OUT/unsent.json      points that MLflow had not confirmed when the training ended; gone when it has
OUT/metrics.json     the test metrics: written when the model is, because they say that the training is finished
OUT/tracked.json     written last: MLflow has all of it
"""

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow.fs as pafs
import ray
import yaml

import clcr
from clcr import metrics as M
from clcr.training import OptimConfig
from clcr.versions import completed, later_options, version_of
from features.errors import StoreError
from features.files import open_fs, read_json, read_text, write_text
from features.store import Mixture, Store, open_store
from features.store.lock import StoreLock
from infra.doctor import mlflow_server, ray_access, require, storage, torch_pairing
from pipelines.common.cli import flatten, override, submission_id, to_yaml
from pipelines.common.cluster import start_ray
from pipelines.common.errors import JobError, fail
from pipelines.common.quiet import drain
from pipelines.tracking import places
from pipelines.tracking import run as tracking
from pipelines.tracking.names import file_name
from pipelines.training.learner import Learner, Recipe
from pipelines.training.trained import store_file


class JobConfig(Protocol):
    """What a job's options have that trains into a folder."""

    @property
    def store(self) -> str:
        """Feature store; path or URI."""

    @property
    def out(self) -> str:
        """Output folder; path or URI."""

    @property
    def experiment(self) -> str:
        """MLflow experiment."""


Config = TypeVar("Config", bound=JobConfig)


def as_begun(config: Config) -> Config:
    """The options with which an earlier version of this code began the run in `config.out`.

    Options that came later, and stand at their defaults, take the value by which that version behaved, and say so: a
    run is resumed as it was begun.
    """
    if (text := read_text(config.out, "config.yaml")) is None:
        return config
    job: Any = type(config)
    given, default = flatten(config), flatten(job(config.store, config.out))
    begun = yaml.safe_load(text)
    version = version_of(begun)
    meant = completed(begun, version)  # what the file names itself counts before what its version did without saying so
    later = {name: meant[name] for name in later_options(version)}
    kept = {name: value for name, value in later.items() if name in given and given[name] == default[name] != value}
    if kept:
        what = ", ".join(f"{name} {value}" for name, value in kept.items())
        print(f"{config.out} was begun by an earlier version: it is resumed with {what}", flush=True)
    return override(config, kept)


def _give_way(reason: str) -> None:
    """End this process at once, as a kill does: what it would still write, to MLflow too, is another job's by now."""
    code = fail(f"--out {reason}", 1)
    sys.stdout.flush()
    drain()
    os._exit(code)


@contextmanager
def sole_owner(out: str) -> Iterator[None]:
    """Keep other jobs out of a folder while the block runs. Raises JobError, naming the job that runs there.

    A job that died lets go: its process is gone, or its heartbeat has stood still.
    """
    job = submission_id()
    advice = f"follow it with `ray job logs -f {job}`, end it with `ray job stop {job}`" if job else ""
    lock = StoreLock(out, "_owner.json", {"job": job, "advice": advice}, lost=_give_way)
    try:
        lock.__enter__()
    except StoreError as error:
        raise JobError(f"--out {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # storage that is away: the heartbeat ends, and the lock with it
            lock.__exit__()


def claim(config: JobConfig, may_differ: Sequence[str] = ()) -> dict[str, Any] | None:
    """Make the folder `config.out` this run's. Returns what an earlier start of the same run left there.

    may_differ and raises: as `require_same_run`.
    """
    asked = to_yaml(config)
    if (written := read_text(config.out, "config.yaml")) is None:
        fs, path = open_fs(config.out)
        fs.create_dir(path, recursive=True)
        write_text(config.out, "config.yaml", asked)
        return None
    started = require_same_run(config, written, may_differ)
    if written != asked:
        write_text(config.out, "config.yaml", asked)
    return started


def require_same_run(config: JobConfig, written: str, may_differ: Sequence[str] = ()) -> dict[str, Any] | None:
    """Raise JobError where `config.out` holds another run, or a run on another content of the store.

    written: the config.yaml that lies there; may_differ: options that a later start may change. Returns what an earlier
    start left there.
    """
    before, now = (_meaning(text) for text in (written, to_yaml(config)))
    job: Any = type(config)
    untouched = yaml.safe_load(to_yaml(job(config.store, config.out)))
    before = {name: value for name, value in untouched.items() if now.get(name) == value} | before  # came later
    compared = sorted((before.keys() | now.keys()) - set(may_differ))
    if changed := [k for k in compared if before.get(k) != now.get(k)]:
        what = ", ".join(f"{k} {before.get(k)} not {now.get(k)}" for k in changed[:4])
        raise JobError(f"--out {config.out} holds another run ({what}): give another --out, or the same options")
    started, content = read_json(config.out, "run.json"), _content(open_store(config.store))
    if read_json(config.out, "metrics.json") is not None:  # it is finished, and reads no clip any more
        content.pop("clips")
    if started and any(started.get(name, value) != value for name, value in content.items()):
        raise JobError(f"--out {config.out} holds a run on what {config.store} was before: give another --out")
    return started


def _content(store: Store | Mixture) -> dict[str, Any]:
    """What tells whether a store still holds the same clips: `extract --retry-failed` adds to them."""
    return {"store": store.spec.fingerprint, "clips": store.counts()[0]}


def _meaning(text: str) -> dict[str, Any]:
    """The options of a config.yaml, as the version that wrote it meant them."""
    options = yaml.safe_load(text)
    meant = completed(options, version_of(options))
    meant.pop("version", None)
    return meant


def open_run(
    config: JobConfig,
    started: Mapping[str, Any] | None,
    uri: str,
    name: str,
    tags: Mapping[str, str],
    description: str = "",
) -> tracking.Run:
    """The MLflow run of `config.out`: the one that an earlier start left there, as `claim` gave it, or a new one.

    Its parameters are those of its first start; its config.yaml has what a later start changed.
    """
    run = None
    if started:
        try:
            run = tracking.resume_run(started["tracking_uri"], started["run_id"])
        except tracking.RunGoneError as error:
            print(f"{error}: this start has a new run, with what is logged from here on", flush=True)
    if run is None:
        store = open_store(config.store)
        tags = {**tags, "store": name_of(config.store), "store.fingerprint": store.spec.fingerprint}
        tags |= {"store.mixture": store.contents()} if isinstance(store, Mixture) else {}
        tags |= {tracking.NOTE: description} if description else {}
        options = {name: value for name, value in flatten(config).items() if name != "dry_run"}
        run = tracking.start_run(uri, config.experiment, name, options, tags)
        about = {"run_id": run.run_id, "tracking_uri": run.uri, **_content(store)}
        write_text(config.out, "run.json", json.dumps(about))  # first: what fails from here on is resumed
        run.log_input(name_of(config.store), config.store, store.spec.fingerprint, store.spec.splits)
    run.log_text(to_yaml(config), "config.yaml")
    return run


def name_of(store_uri: str) -> str:
    """What people call a store: the last part of its path or URI."""
    return store_uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def title(store_uri: str, recipe: Recipe, variant: str = "") -> str:
    """A run's name in words: the model, or a variant of it, store and seed."""
    fold = "" if recipe.loader.fold is None else f", fold {recipe.loader.fold}"
    return f"{variant or recipe.architecture} on {name_of(store_uri)}, seed {recipe.seed}{fold}"


def description(store_uri: str, recipe: Recipe, tasks: Collection[str]) -> str:
    """A run's description, as MLflow shows it above the run."""
    return (
        f"Model `{recipe.architecture}`, trained on the feature store `{store_uri}` to answer {', '.join(tasks)}, with "
        f"seed {recipe.seed}. `best/score` is the validation score of the epoch whose weights are kept."
    )


def prepare(out: str, dashboard: bool = False) -> str:
    """Check what every tracked job needs, start Ray or join it, and return the tracking server's address.

    dashboard: as in `start_ray`.
    """
    uri = places.tracking_uri(out)
    require(torch_pairing(), ray_access(), storage(out), mlflow_server(uri))
    start_ray(dashboard)
    hosts = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    places.require_reachable_by(hosts, uri)
    return uri


def finish(
    learner: Learner,
    out: str,
    run: tracking.Run,
    metrics: Mapping[str, Mapping[str, float]],
    predictions: Mapping[str, M.Predictions],
    diagnostics: Mapping[str, float],
) -> None:
    """Save the model folder, pictures and test metrics; and only then give them to MLflow, which may refuse.

    Raises JobError where it does: the training is finished all the same, and the next start sends what lies there.
    """
    from features.store.sheet import write_figure  # matplotlib, which only the end of a training needs
    from pipelines.tracking.figures import confusion_figure

    fs, path = open_fs(out)
    with tempfile.TemporaryDirectory() as folder:
        clcr.save(learner.trainer.model, f"{folder}/model", store_file(learner.store.spec, learner.recipe.loader.fold))
        for name, task in learner.tasks.items():
            if task.has_classes and name in metrics:
                counts = M.confusion_matrix(task, predictions[name]).numpy()
                file = Path(folder, "confusion", f"{file_name(name)}.png")
                file.parent.mkdir(exist_ok=True)
                write_figure(str(file), confusion_figure(counts, task.classes, f"{name}, test"))
        for part in sorted(Path(folder).iterdir()):
            fs.create_dir(f"{path}/{part.name}", recursive=True)
            pafs.copy_files(str(part), f"{path}/{part.name}", destination_filesystem=fs)
    run.log_metrics({f"test/{name}": value for name, value in diagnostics.items()}, learner.recipe.optim.epochs)
    write_text(out, "unsent.json", json.dumps(run.unsent()) + "\n")
    write_text(out, "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    track_result(out, run, metrics, learner.recipe.optim)


def track_result(out: str, run: tracking.Run, metrics: Mapping[str, Mapping[str, float]], optim: OptimConfig) -> None:
    """Give MLflow the result that lies in a run's folder. Raises JobError where it refuses."""
    tested = M.tracked("test", metrics, optim.score)
    try:
        run.log_metrics({"best/test_score": tested["test/score"]} | tested, optim.epochs)
        fs, path = open_fs(out)
        with tempfile.TemporaryDirectory() as folder:
            for part in ("model", "confusion"):
                if fs.get_file_info(f"{path}/{part}").type == pafs.FileType.Directory:
                    Path(folder, part).mkdir()
                    pafs.copy_files(f"{path}/{part}", f"{folder}/{part}", source_filesystem=fs)
                    run.log_folder(f"{folder}/{part}", part)
        run.flush()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise JobError(
            f"the model and its test metrics are saved in {out}, but MLflow has not taken them ({reason}): fix the "
            "cause, then run the same command again to send them"
        ) from error
    write_text(out, "tracked.json", json.dumps({"run_id": run.run_id}) + "\n")
    with suppress(OSError):  # tracked.json says enough
        fs.delete_file(f"{path}/unsent.json")


def track_finished(
    out: str, started: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]], optim: OptimConfig
) -> tracking.Run:
    """Give MLflow what it lacks of a run that an earlier start finished, and end it there.

    started: OUT/run.json. metrics: OUT/metrics.json. Raises JobError where MLflow refuses.
    """
    run = tracking.Run(started["tracking_uri"], started["run_id"])
    tracked = read_text(out, "tracked.json") is not None
    if not tracked and (read_json(out, "model/config.json") or {}).get("version", 1) > 1:  # 1 tracked first, then saved
        try:
            run.require_answer()
            run.log_again(read_json(out, "unsent.json") or [])
            track_result(out, run, metrics, optim)
        except tracking.RunGoneError as error:
            print(f"{error}: the result is in {out} alone", flush=True)
    run.mark_finished()
    return run
