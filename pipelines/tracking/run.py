"""MLflow: one run per training, written in batches, by one process that never waits for it while it trains.

Without MLFLOW_TRACKING_URI the runs go to an embedded sqlite file next to the run's output folder, which serves one
host.
"""

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pipelines.common.cli import submission_id, submitted
from pipelines.common.errors import JobError
from pipelines.tracking.names import metric_key
from pipelines.tracking.outbox import AWAY, PATIENCE, Outbox, Point, Result, first_line, retry_until_up
from pipelines.tracking.places import artifacts_beside, experiment_name, sqlite_path
from pipelines.tracking.views import open_as_training

if TYPE_CHECKING:  # every process of a job would import matplotlib, and few draw
    from matplotlib.figure import Figure

NOTE = "mlflow.note.content"  # the tag that MLflow shows above a run as its description
LAST_WORDS = 2.0  # seconds that a run which failed waits for its points
LONGEST_VALUE = 6000  # characters of a parameter, MLflow's limit
PARAMS_PER_CALL = 100  # MLflow's limit on one batch
_making = threading.Lock()  # of outboxes: the machine's load is logged from a thread of its own


class RunGoneError(JobError):
    """The tracking server knows a run no more: it was deleted, or the server's file was."""


@dataclass
class Run:
    """A run of a tracking server, by address and id: cheap to send to the process that writes.

    Metrics are sent from a thread, and wait there while the server is away. Everything else is sent at once, and waits
    up to `outbox.PATIENCE` seconds for it.
    """

    uri: str
    run_id: str
    _client: MlflowClient | None = field(default=None, repr=False, compare=False)
    _outbox: Outbox | None = field(default=None, repr=False, compare=False)
    _through: dict[str, int] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "run_id": self.run_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Run.__init__(self, **state)

    @property
    def client(self) -> MlflowClient:
        """The connection, made at first use."""
        if self._client is None:
            # It is asked again by us, and for longer: MLflow's own pauses would outlast an outage by minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            self._client = MlflowClient(self.uri)
        return self._client

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """All metrics of a step; returns at once. What an earlier start of the run logged is not logged again.

        Names that MLflow does not take, which a label's may be, are spelled as `metric_key` does.
        """
        now = int(time.time() * 1000)
        self._send_later([(metric_key(name), float(value), now, step) for name, value in metrics.items()])

    def unsent(self) -> list[Point]:
        """Points that the server has not confirmed: to be kept in a checkpoint, and given to `log_again`."""
        return self._outbox.unsent() if self._outbox else []

    def log_again(self, unsent: Sequence[Point]) -> None:
        """What `unsent` gave to the process that this one takes over from."""
        self._send_later([(name, value, time, step) for name, value, time, step in unsent])

    def flush(self) -> None:
        """Wait until every point has arrived. Raises JobError when they do not."""
        if self._outbox:
            self._outbox.flush()

    def ask(self, call: Callable[[MlflowClient], Result], patience: float = PATIENCE) -> Result:
        """What the server answers, asked again for so many seconds while it is away. Raises JobError if it refuses."""
        try:
            return retry_until_up(lambda: call(self.client), self._where, patience)
        except (MlflowException, *AWAY) as error:
            raise refused(self.uri, error) from error

    def log_figure(self, figure: "Figure", name: str) -> None:
        """A picture among the run's artifacts."""
        self.ask(lambda client: client.log_figure(self.run_id, figure, name))

    def log_text(self, text: str, name: str) -> None:
        """A text among the run's artifacts."""
        self.ask(lambda client: client.log_text(self.run_id, text, name))

    def set_tag(self, name: str, value: str) -> None:
        """A tag of the run."""
        self.ask(lambda client: client.set_tag(self.run_id, name, value))

    def log_input(self, name: str, uri: str, digest: str, splits: Mapping[str, int]) -> None:
        """What the run learns from, as MLflow's dataset. digest: of its content; splits: clips of each."""
        # MLflow's own resolver knows neither abfs:// nor gcs://, and warns of a path.
        scheme, source = urlsplit(uri).scheme, json.dumps({"uri": uri})
        kind = "local" if scheme in ("", "file") else scheme
        about = {"num_rows": sum(splits.values()), **splits}
        dataset = Dataset(name, digest[:36], kind, source, profile=json.dumps(about))
        inputs = [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])]
        self.ask(lambda client: client.log_inputs(self.run_id, inputs))

    def log_folder(self, folder: str | Path, name: str) -> None:
        """A folder's files among the run's artifacts, under `name`."""
        self.ask(lambda client: client.log_artifacts(self.run_id, str(folder), name))

    def require_answer(self, patience: float = PATIENCE) -> None:
        """Wait until the server answers this process.

        Raises JobError where it refuses to, and RunGoneError where it does not know the run any more.

        A worker of a cluster may lack what the driver has: a route, or credentials.
        """
        try:
            found = self.ask(lambda client: client.get_run(self.run_id), patience)
        except JobError as error:
            if getattr(error.__cause__, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(f"{self._where} does not know run {self.run_id}") from error
            raise
        if found.info.lifecycle_stage == "deleted":
            raise RunGoneError(f"{self._where}: run {self.run_id} was deleted")

    def experiment_id(self, patience: float = PATIENCE) -> str:
        """The experiment that the run is in."""
        return self.ask(lambda client: client.get_run(self.run_id), patience).info.experiment_id

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED when all its points have arrived; FAILED or KILLED soon, if the server is there."""
        if status == "FINISHED":
            self.flush()
            self.ask(lambda client: client.set_terminated(self.run_id, status))
        else:  # another error is under way, and matters more
            with suppress(Exception):  # first: who sent a signal waits for seconds at most
                self.client.set_terminated(self.run_id, status)
            with suppress(Exception):
                if self._outbox:
                    self._outbox.flush(LAST_WORDS)
        if self._outbox:  # a sweep has as many runs as trials
            self._outbox.close()

    def mark_finished(self) -> None:
        """End a run whose results are written: who wrote them may have been killed before it said so.

        Waits for no server.
        """
        with suppress(Exception):
            if self.client.get_run(self.run_id).info.status != "FINISHED":
                self.client.set_terminated(self.run_id)

    @property
    def _where(self) -> str:
        return f"MLflow at {self.uri}"

    def _send_later(self, points: list[Point]) -> None:
        if not points:
            return
        with _making:
            self._outbox = self._outbox or Outbox(self._send, self._where)
        self._outbox.put(points)

    def _send(self, points: list[Point]) -> None:
        if self._through is None:  # the last step of each metric that earlier starts of this run logged
            known = self.client.get_run(self.run_id).data.metrics
            history = {key: self.client.get_metric_history(self.run_id, key) for key in known}
            self._through = {key: max(point.step for point in points) for key, points in history.items()}
        new = [Metric(*point) for point in points if point[3] > self._through.get(point[0], -1)]
        if new:
            self.client.log_batch(self.run_id, metrics=new)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ends with the block, and so do child runs that nothing ended: FINISHED, or KILLED by hand, or FAILED."""
        try:
            yield
            abandon_children(self)
            self.finish()
        except BaseException as error:
            with suppress(Exception):
                abandon_children(self, patience=0)
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent_run: str | None = None,
) -> Run:
    """Make a run with its parameters and tags, once the server is there.

    Raises JobError when it refuses, or has not been there for `outbox.PATIENCE` seconds.
    """
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of every table that it makes
    try:
        # Two jobs that make the tables of one sqlite file at once would both fail.
        with FileLock(f"{sqlite_path(uri)}.lock") if uri.startswith("sqlite") else nullcontext():
            client, where = Run(uri, "").client, f"MLflow at {uri}"
            experiment_id = retry_until_up(lambda: _experiment(client, uri, experiment_name(experiment)), where)
        all_tags = {**tags, **_origin()} | ({"mlflow.parentRunId": parent_run} if parent_run else {})
        run = retry_until_up(lambda: client.create_run(experiment_id, run_name=name, tags=all_tags), where)
        run_id = run.info.run_id
        entries = [Param(key, _text(value)) for key, value in params.items()]
        for first in range(0, len(entries), PARAMS_PER_CALL):
            batch = entries[first : first + PARAMS_PER_CALL]
            retry_until_up(partial(client.log_batch, run_id, params=batch), where)
    except Exception as error:  # of MLflow's, or of what it lacks: a driver, credentials, a folder
        raise refused(uri, error) from error
    return Run(uri, run_id)


def resume_run(uri: str, run_id: str) -> Run:
    """A run that was interrupted, running again.

    Raises RunGoneError where the server does not know it any more, and else JobError as `start_run` does.
    """
    run = Run(uri, run_id)
    run.require_answer()
    run.ask(lambda client: client.update_run(run_id, "RUNNING"))
    return run


def refused(uri: str, error: BaseException) -> JobError:
    """What to say of a server's answer that trying again does not change."""
    return JobError(f"MLflow at {uri}: {first_line(error)}; is MLFLOW_TRACKING_URI right?")


def abandon_children(parent: Run, ended: Mapping[str, str] = MappingProxyType({}), patience: float = PATIENCE) -> None:
    """End the child runs that still count as running, whose process was killed: as KILLED, or as `ended` says.

    ended: status by run id; patience: seconds to wait for a server that is away.
    """
    for run_id in _children(parent, "attributes.status = 'RUNNING'", patience):
        status = ended.get(run_id, "KILLED")
        parent.ask(methodcaller("set_terminated", run_id, status), patience)


def children_metrics(parent: Run, tag: str, value: str) -> list[dict[str, float]]:
    """The last metrics of each finished child run that has a tag of that value."""
    children = _children(parent, f"tags.`{tag}` = '{value}' and attributes.status = 'FINISHED'")
    return [parent.ask(methodcaller("get_run", run_id)).data.metrics for run_id in children]


def delete_children(parent: Run, tag: str, keep: Collection[str | None]) -> None:
    """Delete the child runs that have a tag of that name, but for those in `keep`, by run id."""
    for run_id in set(_children(parent, f"tags.`{tag}` != ''")).difference(keep):
        parent.ask(methodcaller("delete_run", run_id))


def _children(parent: Run, condition: str, patience: float = PATIENCE) -> list[str]:
    """Ids of the child runs for which a condition of MLflow's search holds, however many."""
    condition = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and {condition}"
    experiment = parent.experiment_id(patience)

    def search(client: MlflowClient) -> list[str]:
        found, page = [], None
        while page is None or page.token:
            page = client.search_runs([experiment], condition, page_token=page.token if page else None)
            found += [run.info.run_id for run in page]
        return found

    return parent.ask(search, patience)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment of that name, made where there is none, that MLflow opens with its runs."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            experiment_id = client.create_experiment(name, artifact_location=artifacts_beside(uri, name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            made = client.get_experiment_by_name(name)  # by another job meanwhile
            assert made is not None
            experiment_id = made.experiment_id
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment_id)
    open_as_training(client, experiment_id)
    return experiment_id


def _origin() -> dict[str, str]:
    """Where a run comes from: the code's commit, and the Ray job."""
    origin = {}
    if commit := os.environ.get("GIT_COMMIT") or _commit():
        origin["git.commit"] = commit
    if submitted():
        import ray

        origin["ray.job_id"] = submission_id() or ray.get_runtime_context().get_job_id()
    return origin


def _commit() -> str:
    """The checkout's commit, "" where there is none, or no git."""
    with suppress(OSError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        return git.stdout.strip() if git.returncode == 0 else ""
    return ""


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
