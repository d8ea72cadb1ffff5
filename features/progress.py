"""A line of progress for the command lines that write a corpus: rewritten in place, in a log a new one now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Clip = TypeVar("Clip")
EVERY = 20  # clips
PAUSE = 5.0  # seconds between lines of a log


def counted(clips: Iterable[Clip], total: int) -> Iterator[Clip]:
    """The same clips; how many have come and how fast goes to standard error."""
    begun = said = time.monotonic()
    screen = sys.stderr.isatty()
    for done, clip in enumerate(clips, start=1):
        yield clip
        now = time.monotonic()
        if done == total or (done % EVERY == 0 if screen else now - said > PAUSE):
            said, line = now, f"{done}/{total} clips, {done / (now - begun):.0f} clips/s"
            print(f"\r{line:40}" if screen else f"{line}\n", end="", file=sys.stderr, flush=True)
    if total and screen:
        print(file=sys.stderr)
