"""Standard error of a job: a person's lines come through, a library's noise does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.common.quiet import Filter

ROOT = Path(__file__).parents[3]
CLEANER = """(PlacementGroupCleaner pid=12) Exception in thread PlacementGroupCleanerMonitor:
(PlacementGroupCleaner pid=12) Traceback (most recent call last):
(PlacementGroupCleaner pid=12)   File "x.py", line 3, in get
(PlacementGroupCleaner pid=12)     raise
(PlacementGroupCleaner pid=12) ray.util.state.exception.ServerUnavailable: nobody
"""
NOISE = [
    "[2026-11-29 06:00:00,1 W 12 12] core_worker.cc:2000: Actor x has constructor arguments ... lost, the actor restart"
    " will fail. See https://github.com/ray-project/ray/issues/53727 for more details.\n",
    "*** SIGTERM received at time=1764397 on cpu 1 ***\n",
    "PC: @     0x7f00  (unknown)  epoll_wait\n",
    "    @     0x7f00         64  (unknown)\n",
    "[2026-11-29 06:00:00,1 E 12 12] logging.cc:501: PC: @ 0x7f\n",
]


def filtered(text):
    said = []
    lines = Filter(said.append)
    for line in text.splitlines(keepends=True):
        lines.feed(line)
    lines.close()
    return "".join(said)


@pytest.mark.parametrize("line", NOISE)
def test_lines_of_a_healthy_run_are_dropped(line):
    assert filtered(f"before\n{line}after\n") == "before\nafter\n"


def test_tracebacks_are_dropped_by_their_last_line_and_others_kept_whole():
    told = '(run_trial pid=3) Traceback (most recent call last):\n(run_trial pid=3)   File "a"\n(run_trial pid=3) '
    assert filtered(told + "SystemExit: 1\nafter\n") == "after\n"
    in_a_callback = "(run_trial pid=3) Exception ignored in: <function WeakSet._remove at 0x7f>\n" + told
    assert filtered(in_a_callback + "SystemExit: 1\nafter\n") == "after\n"
    assert filtered(in_a_callback + "ValueError: x\n") == in_a_callback + "ValueError: x\n"
    bug = told + "ValueError: x\n"
    assert filtered(bug) == bug
    other = "a line of another process\n"
    assert filtered(CLEANER[:90] + CLEANER[90:]) == "" and filtered(other) == other
    unfinished = "Traceback (most recent call last):\n  File\n"
    assert filtered(unfinished) == unfinished


def test_a_process_keeps_its_last_words_and_its_children_their_voice():
    code = (
        "import os, subprocess, sys\n"
        "from pipelines.common.quiet import quieten\n"
        "end = quieten()\n"
        "os.write(2, b'*** SIGTERM received at time=1 on cpu 0 ***\\nmine\\n')\n"
        "subprocess.run([sys.executable, '-c', 'import sys; print(\"child\", file=sys.stderr)'])\n"
        "sys.stderr.write('no end of line')\n"
        "sys.stderr.flush()\n"
        "end()\n"
        "os._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and done.stderr.split("\n") == ["mine", "child", "no end of line"]
