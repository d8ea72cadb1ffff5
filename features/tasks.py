"""What a run learns from a corpus: a label column, its kind, and the classes that its values may take."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from features.errors import CorpusError

KINDS = ("classification", "regression")


@dataclass(frozen=True)
class Task:
    """One label column to learn; classes are sorted, as text, and empty for a regression."""

    name: str
    kind: str
    classes: tuple[str, ...] = ()

    def encode(self, value: Any) -> int | float | None:
        """A label as its class index or number, None where it is missing. Raises CorpusError for an unknown class."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if self.kind == "regression":
            return float(value)
        try:
            return _indices(self.classes)[str(value)]
        except KeyError:
            raise CorpusError(f"task {self.name!r} has no class {value!r}; it has {shortened(self.classes)}") from None


def parse_tasks(text: str) -> list[tuple[str, str | None]]:
    """Read "color,sentiment:regression" as pairs of name and kind, None where the column's type decides.

    Raises CorpusError for an unknown kind, an empty name or a name given twice.
    """
    tasks = []
    for part in text.split(","):
        name, colon, kind = part.strip().rpartition(":") if ":" in part else (part.strip(), "", "")
        if not name:
            raise CorpusError(f"tasks {text!r} holds an empty name; write for example color,sentiment:regression")
        if colon and kind not in KINDS:
            raise CorpusError(f"task {name!r} cannot be of kind {kind!r}; the kinds are {' and '.join(KINDS)}")
        if name in dict(tasks):
            raise CorpusError(f"task {name!r} is named twice in tasks {text!r}")
        tasks.append((name, kind or None))
    return tasks


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message: all of a few, the first ones of many."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more if names else "none"


@functools.lru_cache(maxsize=256)
def _indices(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(classes)}
