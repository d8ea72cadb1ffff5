"""Points on their way to the tracking server: none is lost while it is away, and nobody waits for it.

MLflow's own asynchronous logging drops what it could not send, so one thread of ours sends in order, again and again
until the server has it.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TypeVar

import requests
import urllib3.exceptions
from mlflow.exceptions import MlflowException, RestException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, stop_never, wait_exponential

from pipelines.common.errors import JobError

Result = TypeVar("Result")
Point = tuple[str, float, int, int]  # key, value, milliseconds since 1970, step

PATIENCE = 600.0  # seconds that a job waits for a server that is away, once nothing else is left to do
LONGEST_PAUSE = 10.0  # seconds between two attempts
POINTS_PER_CALL = 1000  # MLflow's limit
AWAY = (
    ConnectionError,
    TimeoutError,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.RetryError,  # 5xx, each time that MLflow asked
    urllib3.exceptions.MaxRetryError,
    urllib3.exceptions.ProtocolError,
)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # of an outage `retry_until_up` tells, once


class Outbox:
    """Sends points in order, in batches, from a thread of its own. where: the server, for messages."""

    def __init__(self, send: Callable[[list[Point]], None], where: str) -> None:
        self._send, self._where = send, where
        self._points: deque[Point] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closed = False
        threading.Thread(target=self._run, name="mlflow", daemon=True).start()

    def put(self, points: list[Point]) -> None:
        """Send these when their turn comes; returns at once."""
        with self._changed:
            self._points.extend(points)
            self._changed.notify_all()

    def unsent(self) -> list[Point]:
        """What the server has not confirmed."""
        with self._changed:
            return list(self._points)

    def flush(self, patience: float = PATIENCE) -> None:
        """Wait until all is sent. Raises JobError when it is not after so many seconds, or when the server refuses."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._points, patience)
            if self._error or self._points:
                reason = first_line(self._error) if self._error else "it does not answer"
                raise JobError(
                    f"{self._where} has not taken the last {len(self._points)} points of this run ({reason}): "
                    "run the same command again when it does"
                )

    def close(self) -> None:
        """End the thread once all is sent; nothing is put in afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._points or self._closed)
                if not self._points:
                    return
                points = list(islice(self._points, POINTS_PER_CALL))
            try:
                retry_until_up(partial(self._send, points), self._where, patience=None)
            except Exception as error:  # refused for good: `flush` says so
                self._error = error
            with self._changed:
                if self._error is None:
                    for _ in points:
                        self._points.popleft()
                self._changed.notify_all()
                if self._error:
                    return


def retry_until_up(call: Callable[[], Result], where: str, patience: float | None = PATIENCE) -> Result:
    """The call's result, tried again while the server is away, for so many seconds or (None) for ever."""

    def say(state: RetryCallState) -> None:
        if state.attempt_number == 2:  # one failure alone is not worth a line
            assert state.outcome is not None  # there was an attempt
            reason = state.outcome.exception()
            assert reason is not None  # it is tried again after errors alone
            print(f"{where} is away; what is logged waits for it ({first_line(reason)})", flush=True)

    return Retrying(
        retry=retry_if_exception(is_outage),
        wait=wait_exponential(max=LONGEST_PAUSE),
        stop=stop_never if patience is None else stop_after_delay(patience),
        before_sleep=say,
        reraise=True,
    )(call)


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_outage(error: BaseException | None) -> bool:
    """Whether the server is away and trying again may help: a refused connection, a timeout, an HTTP 5xx.

    Also HTTP 429 (ask later), and an embedded file that another process writes to. Everything else is an answer: what
    the server refused, credentials that are missing, a name or a folder that cannot be, or a bug.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (status := _http_status(error)) is not None:
            return status >= 500 or status == 429
        if isinstance(error, AWAY) or "database is locked" in str(error):
            return True
        error = error.__cause__ or error.__context__  # MLflow wraps what requests raised
    return False


def _http_status(error: BaseException) -> int | None:
    """The status of the server's answer that an error tells of; None where it tells of none."""
    if isinstance(error, RestException):
        return error.get_http_status_code()
    if isinstance(error, MlflowException):  # of an answer without JSON
        match = re.search(r"failed with error code (\d{3}) ", str(error))
        return int(match[1]) if match else None
    return getattr(getattr(error, "response", None), "status_code", None)  # of requests
