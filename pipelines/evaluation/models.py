"""The models to evaluate: opened wherever they lie, named for the tables, and the MLflow runs that they come from."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import yaml
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from features.errors import StoreError
from features.files import parent, read_json, read_text
from features.store import Store
from pipelines.common.cli import resolve_uri
from pipelines.common.errors import JobError
from pipelines.tracking import run as tracking
from pipelines.tracking.names import metric_key
from pipelines.training.trained import TrainedModel, open_model

REGISTERED = re.compile(r"models:/([^/@]+)[/@](.+)")
PATIENCE = 60.0  # seconds that an evaluation, whose report is written, waits for a server that is away
METRICS_PER_CALL = 500  # MLflow takes a thousand


@dataclass(frozen=True)
class Contender:
    """A model under its name in the tables. uri: as it was given; folder: of its run, None for one of the registry."""

    name: str
    uri: str
    trained: TrainedModel
    folder: str | None


def open_models(uris: Sequence[str], store: Store) -> list[Contender]:
    """All models, each with a name of its own. Raises JobError where one is missing or reads other features."""
    if not uris:
        raise JobError(
            "--model: name runs, model folders, models:/NAME/VERSION or models:/NAME@ALIAS, separated by commas"
        )
    contenders: list[Contender] = []
    for uri in uris:
        trained = open_model("--model", uri)
        trained.require_features(store)
        folder = None if uri.startswith("models:/") else run_folder(resolve_uri("--model", uri))
        name = _name(uri, folder)
        number = sum(c.name.partition(" (")[0] == name for c in contenders)
        contenders.append(Contender(f"{name} ({number + 1})" if number else name, uri, trained, folder))
    return contenders


def run_folder(folder: str) -> str:
    """A run's folder, of which `folder` may be the part named model."""
    is_part = folder.rstrip("/").endswith("/model") and read_text(folder, "config.json") is not None
    return parent(folder.rstrip("/")) if is_part else folder.rstrip("/")


def _name(uri: str, folder: str | None) -> str:
    if folder is None:
        return re.sub(r"[/@]", " ", uri.removeprefix("models:/"))
    return folder.rpartition("/")[2] or folder


def fold_of(contenders: Sequence[Contender], store: Store) -> int | None:
    """The fold of cross-validation that all models were tested on; None in a store without folds, another than theirs.

    Raises JobError where they differ.
    """
    try:
        store.folds()
    except StoreError:
        return None
    folds = {}
    for contender in contenders:
        text = read_text(contender.folder, "config.yaml") if contender.folder else None
        named = yaml.safe_load(text or "{}").get("loader.fold")
        folds[contender.name] = contender.trained.fold if named is None else named
    if len(set(folds.values())) > 1:
        listed = ", ".join(f"{name} {fold}" for name, fold in folds.items())
        raise JobError(f"--model: the models were tested on different folds ({listed}): choose one with --fold")
    return next(iter(folds.values()))


def find_run(contender: Contender) -> tracking.Run | None:
    """The MLflow run that a model comes from; None, with a line, where it has none or MLflow is away."""
    try:
        if contender.folder is None:
            uri = os.environ.get("MLFLOW_TRACKING_URI", "")
            registered = REGISTERED.fullmatch(contender.uri)
            assert registered is not None  # a model without a folder is one of the registry
            name, version = registered.groups()
            client = MlflowClient(uri)
            if "@" in contender.uri:
                version = client.get_model_version_by_alias(name, version).version
            elif version == "latest":
                version = str(max(int(v.version) for v in client.search_model_versions(f"name = '{name}'")))
            run = tracking.Run(uri, client.get_model_version(name, version).run_id or "")
        elif (started := read_json(contender.folder, "run.json")) is None:
            print(f"{contender.name}: no MLflow run to log to ({contender.folder} has no run.json)", flush=True)
            return None
        else:
            run = tracking.Run(started["tracking_uri"], started["run_id"])
        run.require_answer(PATIENCE)
        return run
    except (MlflowException, JobError) as error:
        print(f"{contender.name}: not logged to MLflow: {str(error).splitlines()[0]}", flush=True)
        return None


def log_evaluation(run: tracking.Run, prefix: str, figures: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Numbers among the run's metrics as PREFIX/..., nested names joined by `/`; texts among its artifacts.

    A second evaluation of the same split replaces the first one's.
    """
    now = int(time.time() * 1000)
    points = [Metric(metric_key(name), value, now, 0) for name, value in _flat(prefix, figures)]
    for first in range(0, len(points), METRICS_PER_CALL):
        part = points[first : first + METRICS_PER_CALL]
        run.ask(methodcaller("log_batch", run.run_id, metrics=part))
    for name, text in texts.items():
        run.log_text(text, name)


def _flat(prefix: str, tree: Mapping[str, Any]) -> list[tuple[str, float]]:
    flat = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat += _flat(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300:
            flat.append((f"{prefix}/{name}", float(value)))
    return flat
