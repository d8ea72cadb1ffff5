"""`python -m features.encoders list`: which encoders there are, what each needs, and whether that is installed."""

import sys
from typing import Annotated, Literal

import tyro

from features.encoders.registry import KINDS, is_installed

PLAIN = (  # what needs no network: name, of what, rate, width, what
    ("pixels", "video", "--video.fps", "size x size x 3", "frames as they are"),
    ("log_mel", "audio", "1 / --audio.hop", "--audio.mels", "log-mel frames"),
    ("patches", "image", "-", "3 x region x region", "regions' pixels"),
)


def listing() -> list[tuple[str, ...]]:
    """Rows of: name, modalities, tokens per second, one token, needs, licence, what it is."""
    rows: list[tuple[str, ...]] = [("name", "for", "rate", "token", "needs", "licence of weights", "what it is")]
    rows += [(name, of, rate, width, "nothing", "-", what) for name, of, rate, width, what in PLAIN]
    for kind in KINDS.values():
        needs = f"{kind.needs or 'nothing'}{'' if is_installed(kind) else f' (missing: install [{kind.extra}])'}"
        rows.append((kind.form, ", ".join(kind.of), kind.rate, kind.token, needs, kind.licence, kind.what))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    tyro.cli(_list, prog="python -m features.encoders", args=arguments)
    rows = listing()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _list(command: Annotated[Literal["list"], tyro.conf.Positional]) -> None:
    """What encoders there are. `list` prints them, with what each needs."""


if __name__ == "__main__":
    sys.exit(main())
