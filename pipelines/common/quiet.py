"""Standard error without what libraries say of a healthy run: their warnings of what may be, and of how they end.

Ray's C++ parts write to the file descriptor itself and the log lines of other processes come through it too, so the
descriptor becomes a pipe, and a thread passes on what a person can use.
"""

import os
import re
import threading
from collections.abc import Callable

# Lines that say nothing, wherever they come from.
NOISE = re.compile(
    r"the actor restart will fail|\*\*\* SIGTERM received at time|PC: @ |"
    r"^\s*(\(\S+ pid=\d+[^)]*\) )?\s*@\s+0x[0-9a-f]+|"
    r"\[\S+ \S+ E \d+ \d+\] logging\.cc:\d+:|"
    r"Failed to query Ray Train Controller actor state"
)
# Tracebacks, by their last line: of a process that was told to end, and of one that asked the wrong cluster.
ENDINGS = re.compile(r"SystemExit: \d+|ray\.util\.state\.exception\.\w+|RayStateApiException|ServerUnavailable")
PREFIX = re.compile(r"^(?:\x1b\[\d+m)*(\(\S.*? ?pid=\d+[^)]*\))(?:\x1b\[\d+m)* ?")  # of another process's line
_ends: list[Callable[[], None]] = []  # what ends this process's filters
END = b"\x00end of this process's standard error\x00"
OPENINGS = ("Traceback (most recent call last):", "Exception in thread ", "Exception ignored in: ")


class Filter:
    """Passes lines on, but for noise; a traceback waits for its last line. emit: takes a line with its end."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._tracebacks: dict[str, list[str]] = {}  # tracebacks under way, by process

    def feed(self, line: str) -> None:
        """One line, with its end."""
        match = PREFIX.match(line)
        process, text = (match[1], line[match.end() :]) if match else ("", line)
        lines = self._tracebacks.get(process)
        if lines is not None:
            lines.append(line)
            if not text.strip() or text.startswith((" ", "\t", *OPENINGS)) or "During handling" in text:
                return
            del self._tracebacks[process]
            if not ENDINGS.match(text):
                for each in lines:
                    self._emit(each)
        elif text.startswith(OPENINGS):
            self._tracebacks[process] = [line]
        elif not NOISE.search(line):
            self._emit(line)

    def close(self) -> None:
        """Pass on what still waits."""
        for lines in self._tracebacks.values():
            for line in lines:
                self._emit(line)
        self._tracebacks.clear()


def quieten() -> Callable[[], None]:
    """Filter this process's standard error from now on; returns what ends it, to be called before the process ends."""
    read, write = os.pipe()
    terminal = os.dup(2)
    os.dup2(write, 2)
    os.close(write)
    done = threading.Event()

    def pump() -> None:
        lines = Filter(lambda line: _write(terminal, line))
        rest, ended_here = b"", False
        while not ended_here and (chunk := os.read(read, 65536)):
            # Children may hold the pipe open, and then its own end never comes.
            rest, mark, _ = (rest + chunk).partition(END)
            ended_here = bool(mark)
            *whole, rest = rest.split(b"\n")
            for line in whole:
                lines.feed(line.decode(errors="replace") + "\n")
        if rest:
            lines.feed(rest.decode(errors="replace"))
        lines.close()
        done.set()

    threading.Thread(target=pump, name="stderr", daemon=True).start()

    def end() -> None:
        if not done.is_set():
            os.write(2, END)
            done.wait(2)
            os.dup2(terminal, 2)

    _ends.append(end)
    return end


def drain() -> None:
    """End every filter, so that what was said is there when this process ends at once."""
    for end in _ends:
        end()


def _write(descriptor: int, text: str) -> None:
    data = text.encode()
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:  # whoever read our lines has gone
            return
