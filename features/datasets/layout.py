"""What the layouts have in common: lists of lines, media found by name, clips held out for validation."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.errors import CorpusError

Row = dict[str, Any]  # a manifest's row; its files as Path, and None where one that belongs to it is not there
VIDEO = ("mp4", "avi", "mkv", "webm", "flv", "mov", "mpg", "mpeg")


@dataclass(frozen=True)
class Layout:
    """A benchmark's folder. lists: where its official lists lie, the same folder or another.

    val_share: share of the training clips to hold out where there is no official val split; split: which of several
    official splits; vectors: folder to write given vectors to.
    """

    root: Path
    lists: Path
    val_share: float = 0.1
    split: int = 1
    vectors: Path = field(default_factory=Path)

    def lines(self, *names: str) -> list[str]:
        """The lines of an official list, which may have several names. Raises CorpusError where none is there."""
        return self.list_file(*names).read_text(encoding="utf-8-sig").splitlines()

    def list_file(self, *names: str) -> Path:
        """The file of an official list, in its folder or below. Raises CorpusError where none is there."""
        for name in names:
            if found := next(iter(sorted(self.lists.rglob(name))), None):
                return found
        raise CorpusError(f"{self.lists} has no {' and no '.join(names)}; name the folder of the lists by --lists")

    def table(self, *names: str) -> list[dict[str, str]]:
        """The rows of an official csv file by its header. Raises CorpusError where it is not there."""
        with open(self.list_file(*names), newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))

    def media(self, *suffixes: str) -> dict[str, Path]:
        """Every file below the root with one of these endings, by its name without it."""
        return {path.stem: path for path in self.files(*suffixes)}

    def files(self, *suffixes: str) -> Iterator[Path]:
        """Every file below the root with one of these endings, in order."""
        endings = {f".{suffix}" for suffix in suffixes}
        return (path for path in sorted(self.root.rglob("*")) if path.suffix.lower() in endings)

    def held_out(self, key: str) -> str:
        """`val` for a share of the keys, the same ones everywhere, else `train`."""
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
        return "val" if share < self.val_share else "train"


def fields(lines: list[str], separator: str, count: int, name: str) -> Iterator[list[str]]:
    """Each line's fields. Raises CorpusError, with the line's number, where there are fewer than there should be."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            values = [value.strip() for value in line.split(separator)]
            if len(values) < count:
                raise CorpusError(f"{name}, line {number}: {line!r} has {len(values)} fields, not {count}")
            yield values
