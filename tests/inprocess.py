"""Jobs run inside the test's own process, on the Ray that the test has started."""

import sys

from pipelines.cli import main
from pipelines.extract import ExtractConfig, extract


def run_extract(*args):
    """The extract job with these arguments; its exit code."""
    before, sys.argv = sys.argv, ["extract.py", *map(str, args)]
    try:
        main(extract, ExtractConfig, "")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0
