"""Models in MLflow's registry: a finished run's model gets a name and a version there, and comes back by them.

from pipelines.tracking.registry import load_model
model = load_model("models:/grid/1")        # also models:/grid/latest, models:/grid@ALIAS
"""

import os
import re
import tempfile
from contextlib import suppress

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import clcr
from clcr.base import MultimodalModel
from pipelines.common.errors import JobError
from pipelines.tracking.outbox import retry_until_up
from pipelines.tracking.run import Run


def register(run: Run, wanted: str) -> list[str]:
    """Register a run's model, which keeps its version where it already is; the addresses that it now has.

    wanted: NAME, or NAME@ALIAS, which moves the alias to this version unless a later one has it. Raises JobError where
    MLflow refuses it.
    """
    name, _, alias = wanted.partition("@")

    def call() -> list[str]:
        with suppress(MlflowException):  # it exists; whatever else is wrong, the next call says too
            run.client.create_registered_model(name)
        if found := run.client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'"):
            version = int(found[0].version)
        else:
            source = f"runs:/{run.run_id}/model"
            version = int(run.client.create_model_version(name, source, run.run_id).version)
        addresses = [f"models:/{name}/{version}"]
        if not alias:
            return addresses
        current = int(run.client.get_registered_model(name).aliases.get(alias, 0))
        if current < version:
            run.client.set_registered_model_alias(name, alias, str(version))
        return addresses if current > version else [*addresses, f"models:/{name}@{alias}"]

    try:
        return retry_until_up(call, f"MLflow at {run.uri}")
    except MlflowException as error:
        raise JobError(f"--register {wanted}: MLflow at {run.uri} refuses it: {str(error).splitlines()[0]}") from error


def load_model(uri: str, tracking_uri: str | None = None) -> MultimodalModel:
    """A registered model, in evaluation mode, on the CPU; arguments and errors as `fetch`."""
    with tempfile.TemporaryDirectory() as folder:
        return clcr.load(fetch(uri, folder, tracking_uri))


def fetch(uri: str, folder: str, tracking_uri: str | None = None) -> str:
    """Download a registered model into a folder; where in it the model's files lie.

    uri: models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS; tracking_uri: default MLFLOW_TRACKING_URI.
    Raises JobError when there is no such model.
    """
    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+|latest)|@([^/@]+))", uri)
    if not match or not tracking_uri:
        missing = (
            "set MLFLOW_TRACKING_URI, or give tracking_uri"
            if match
            else "write models:/NAME/VERSION or models:/NAME@ALIAS"
        )
        raise JobError(f"{uri} cannot be loaded: {missing}")
    client, (name, version, alias) = MlflowClient(tracking_uri), match.groups()
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias).version
        elif version == "latest":
            version = max(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        source = client.get_model_version_download_uri(name, str(version))
    except (MlflowException, ValueError) as error:
        raise JobError(f"{uri}: MLflow at {tracking_uri} has no such model ({str(error).splitlines()[0]})") from error
    return download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=tracking_uri)
