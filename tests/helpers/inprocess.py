"""Jobs run inside the test's own process, on the Ray that it has: a process of their own costs seconds of imports.

And the environment of those that have one, and a Ray of their own.
"""

import contextlib
import io
import os
import re
import signal
import sys
from dataclasses import dataclass

from pipelines.common.cli import run_job
from pipelines.extract import ExtractConfig, extract


@dataclass(frozen=True)
class Done:
    """What a job left, by the names that subprocess.run uses."""

    returncode: int
    stdout: str
    stderr: str


def run_here(job, config_class, *options):
    """Run a job with these options as its script would; arguments, environment and signals are restored after it."""
    arguments, environment = sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = [f"{job.__name__}.py", *map(str, options)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = run_job(job, config_class, "")
            except SystemExit as end:
                code = end.code
        return Done(code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def no_cluster():
    """This process's environment without the Ray that it is on; what conftest asks of every Ray stays."""
    ours = re.compile(r"RAY_(TRAIN_|[a-z])")
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or ours.match(name)}


def run_extract(*args):
    """The extract job with these arguments; its exit code. One process: few clips take less than another's start."""
    given = [*map(str, args)]
    if not any(argument.startswith("--concurrency") for argument in given):
        given += ["--concurrency", "1"]
    before, sys.argv = sys.argv, ["extract.py", *given]
    try:
        return run_job(extract, ExtractConfig, "")
    finally:
        sys.argv = before
