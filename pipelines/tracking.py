"""MLflow: one run per training, written in batches, by one process.

Without MLFLOW_TRACKING_URI the runs go to an embedded sqlite file beside the run's output folder; that serves one host.
"""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock
from matplotlib.figure import Figure
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from features.files import parent
from pipelines.cli import JobError, submitted

PARAMS_PER_CALL = 100  # MLflow's limits on one batch
METRICS_PER_CALL = 1000


def tracking_uri(out: str) -> str:
    """The server of MLFLOW_TRACKING_URI, or sqlite beside `out`. Raises JobError where neither can be."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in out:
        raise JobError(f"--out {out} is not on this machine: set MLFLOW_TRACKING_URI to an MLflow server")
    return f"sqlite:///{parent(out)}/mlflow.db"


def require_reachable_by(hosts: int, uri: str) -> None:
    """Raise JobError when a job on several hosts would write to a file on one of them."""
    if hosts > 1 and not uri.startswith("http"):
        raise JobError(
            f"{uri} serves one host and the cluster has {hosts}: set MLFLOW_TRACKING_URI to an MLflow server"
        )


@dataclass
class Run:
    """A run of a tracking server, by address and id: cheap to send to the process that writes."""

    uri: str
    run_id: str
    _client: MlflowClient | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> MlflowClient:
        """The connection, made at first use."""
        if self._client is None:
            self._client = MlflowClient(self.uri)
        return self._client

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """All metrics of a step in as few calls as the server takes."""
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for first in range(0, len(entries), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=entries[first : first + METRICS_PER_CALL])

    def log_figure(self, figure: Figure, name: str) -> None:
        """A picture among the run's artifacts."""
        self.client.log_figure(self.run_id, figure, name)

    def log_folder(self, folder: str | Path, name: str) -> None:
        """A folder's files among the run's artifacts, under `name`."""
        self.client.log_artifacts(self.run_id, str(folder), name)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ends with the block: FINISHED, or KILLED by hand, or FAILED."""
        try:
            yield
        except BaseException as error:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.finish()


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent_run: str | None = None,
) -> Run:
    """Make a run with its parameters and tags. Raises JobError when the tracking server cannot be used."""
    try:
        # Two jobs that make the tables of one sqlite file at once would both fail.
        with FileLock(f"{uri.removeprefix('sqlite:///')}.lock") if uri.startswith("sqlite") else nullcontext():
            client = MlflowClient(uri)
            experiment_id = _experiment(client, uri, experiment)
        all_tags = {**tags, **_origin()} | ({"mlflow.parentRunId": parent_run} if parent_run else {})
        run = client.create_run(experiment_id, run_name=name, tags=all_tags)
        entries = [Param(key, _text(value)) for key, value in params.items()]
        for first in range(0, len(entries), PARAMS_PER_CALL):
            client.log_batch(run.info.run_id, params=entries[first : first + PARAMS_PER_CALL])
    except MlflowException as error:
        raise JobError(f"MLflow at {uri}: {str(error).splitlines()[0]}; is MLFLOW_TRACKING_URI right?") from error
    return Run(uri, run.info.run_id)


def resume_run(uri: str, run_id: str) -> Run:
    """A run that was interrupted, running again."""
    run = Run(uri, run_id)
    try:
        run.client.update_run(run_id, "RUNNING")
    except MlflowException as error:
        raise JobError(f"MLflow at {uri} does not know run {run_id} of --out: {str(error).splitlines()[0]}") from error
    return run


def abandon_children(parent: Run, ended: Mapping[str, str] = MappingProxyType({})) -> None:
    """End the child runs that still count as running, of a job that was itself killed: as KILLED, or as `ended` says.

    ended: status by run id.
    """
    client = parent.client
    experiment = client.get_run(parent.run_id).info.experiment_id
    condition = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    for child in client.search_runs([experiment], condition):
        client.set_terminated(child.info.run_id, ended.get(child.info.run_id, "KILLED"))


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id. With sqlite its artifacts go beside the file, not to the folder a job happens to run in."""
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    location = f"{Path(uri.removeprefix('sqlite:///')).parent}/mlartifacts/{name}" if uri.startswith("sqlite") else None
    with suppress(MlflowException):  # another job may have made it in the meantime
        return client.create_experiment(name, artifact_location=location)
    return client.get_experiment_by_name(name).experiment_id


def _origin() -> dict[str, str]:
    """Where a run comes from: the code's commit, and the Ray job."""
    origin = {}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    if commit := os.environ.get("GIT_COMMIT") or (git.stdout.strip() if git.returncode == 0 else ""):
        origin["git.commit"] = commit
    if submitted():
        import ray

        origin["ray.job_id"] = ray.get_runtime_context().get_job_id()
    return origin


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
