"""Types are checked like everything else: as a test, it shares the time of those that wait."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # a minute
def test_types_are_right():
    command = [sys.executable, "-m", "mypy"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
