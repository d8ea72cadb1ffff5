"""Where a run is tracked: the server's address, or an embedded sqlite file, and the experiment's name."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from features.files import parent
from pipelines.common.cli import resolve_uri
from pipelines.common.errors import JobError

DEFAULT_EXPERIMENT = "clcr"


def tracking_uri(out: str) -> str:
    """The server of MLFLOW_TRACKING_URI, or sqlite next to `out`. Raises JobError where neither can be.

    A relative sqlite file is made absolute here, once: workers run in folders of their own.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        match = re.fullmatch(r"sqlite:///(?!/|file:)(.+)", uri)
        return sqlite_uri(resolve_uri("MLFLOW_TRACKING_URI", match[1])) if match else uri
    if "://" in out:
        raise JobError(f"--out {out} is not on this machine: set MLFLOW_TRACKING_URI to an MLflow server")
    return sqlite_uri(f"{parent(out)}/mlflow.db")


def sqlite_uri(path: str) -> str:
    """The address of an embedded file, whatever its folder is called.

    MLflow decodes an address once and SQLite once more, and both cut it at `?`.
    """
    if re.search(r"[%?#]", path):
        return f"sqlite:///file:{quote(quote(path))}?uri=true"
    return f"sqlite:///{path}"


def sqlite_path(uri: str) -> str:
    """Inverse of `sqlite_uri`."""
    path = uri.removeprefix("sqlite:///")
    return unquote(unquote(path.removeprefix("file:").partition("?")[0])) if path.startswith("file:") else path


def artifacts_beside(uri: str, experiment: str) -> str | None:
    """Where an embedded file's artifacts go: next to it, not to the folder that a job happens to run in."""
    if not uri.startswith("sqlite"):
        return None
    return Path(sqlite_path(uri)).parent.joinpath("mlartifacts", experiment.replace("/", "_")).as_uri()


def experiment_name(option: str) -> str:
    """The experiment that --experiment names, or where that is left at its default MLFLOW_EXPERIMENT_NAME."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or option if option == DEFAULT_EXPERIMENT else option


def require_reachable_by(hosts: int, uri: str) -> None:
    """Raise JobError when a job on several hosts would write to a file on one of them."""
    if hosts > 1 and not uri.startswith("http"):
        raise JobError(
            f"{uri} serves one host and the cluster has {hosts}: set MLFLOW_TRACKING_URI to an MLflow server"
        )
