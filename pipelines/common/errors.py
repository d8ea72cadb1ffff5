"""Errors of jobs: which of them a person can act on, and how they are said in one line."""

import sys

from features import s3

OURS = ("clcr", "features", "infra", "pipelines", "tuning")  # every error that these define is one to act on


class JobError(Exception):
    """A job cannot do what it was asked to, and a person can act on it."""


def is_user_error(error: BaseException) -> bool:
    """Whether an error says what a person can do: all those that this project defines do."""
    return type(error).__module__.partition(".")[0] in OURS


def find_user_error(error: BaseException | None) -> Exception | None:
    """The user's mistake behind an exception that Ray wrapped, if there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        if isinstance(current, Exception) and is_user_error(current):
            return current
        seen.add(id(current))
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None


def explain_storage(error: Exception) -> str | None:
    """What to say of a full disk, a folder without access, storage that is away or lets nobody in; None of a bug."""
    if not isinstance(error, OSError):
        return None
    if advice := s3.explain(error):
        return f"{error}: {advice}"
    return str(error) if error.errno or s3.is_transient(error) else None


def fail(error: object, code: int) -> int:
    """Say an error in one line on standard error; returns the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code
