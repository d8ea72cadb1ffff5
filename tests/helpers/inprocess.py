"""Jobs run inside the test's own process, on the Ray that the test has started."""

import sys

from pipelines.common.cli import run_job
from pipelines.extract import ExtractConfig, extract


def run_extract(*args):
    """The extract job with these arguments; its exit code."""
    before, sys.argv = sys.argv, ["extract.py", *map(str, args)]
    try:
        return run_job(extract, ExtractConfig, "")
    finally:
        sys.argv = before
