"""A line of progress, rewritten in place, for the command lines that write a corpus."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Clip = TypeVar("Clip")
EVERY = 20  # clips


def counted(clips: Iterable[Clip], total: int) -> Iterator[Clip]:
    """The same clips; how many have come and how fast goes to standard error."""
    begun = time.monotonic()
    for done, clip in enumerate(clips, start=1):
        yield clip
        if done % EVERY == 0 or done == total:
            pace = done / (time.monotonic() - begun)
            print(f"\r{done}/{total} clips, {pace:.0f} clips/s", end="", file=sys.stderr, flush=True)
    if total:
        print(file=sys.stderr)
