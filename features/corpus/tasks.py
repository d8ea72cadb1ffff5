"""What a run learns from a corpus: a label column, its kind, and the classes that its values may take.

- `classification`: a class per clip, text or whole numbers
- `regression`: a number per clip
- `sentiment`: a number per clip on the field's scale of -3 to 3; a regression, reported as MOSI and MOSEI are
- `events`: a class per bin of time, `name:events` for one bin a second, `name:events@25` for 25; see events.py
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from features.corpus.events import bin_events
from features.errors import CorpusError

NUMBERS = ("regression", "sentiment")
KINDS = ("classification", *NUMBERS, "events")
SENTIMENT = 3.0  # the scale goes from minus this to plus this
EVENT_RATE = 1.0  # bins per second unless the task says otherwise: AVE's


@dataclass(frozen=True)
class Task:
    """One label column to learn.

    classes are sorted, as text, and empty for numbers; those of events begin with `background`. rate: bins per second
    of events, else 0.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    rate: float = 0.0

    def encode(self, value: Any) -> int | float | None:
        """A label as class index or number, None where it is missing. Raises CorpusError for an unknown class."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if self.kind in NUMBERS:
            return float(value)
        try:
            return _indices(self.classes)[str(value)]
        except KeyError:
            raise self._no_class(value) from None

    def encode_events(self, events: Any, seconds: float) -> np.ndarray:
        """A clip's events as class indices of its bins, (bins,) int16, -1 where they are missing.

        seconds: the clip's length. Raises CorpusError for an unknown class.
        """
        try:
            return bin_events(events, seconds, self.rate, _indices(self.classes))
        except KeyError as error:
            raise self._no_class(error.args[0]) from None

    def _no_class(self, value: Any) -> CorpusError:
        return CorpusError(f"task {self.name!r} has no class {value!r}; it has {shortened(self.classes)}")


class Declared(NamedTuple):
    """A task as a run names it. kind: None where the column's type decides; rate: bins per second of events."""

    name: str
    kind: str | None = None
    rate: float = 0.0


def parse_tasks(text: str) -> list[Declared]:
    """Read "color,mood:sentiment,word:events@25".

    Raises CorpusError for an unknown kind, a rate that is none, an empty name or a name given twice.
    """
    tasks: list[Declared] = []
    for part in text.split(","):
        name, colon, kind = part.strip().rpartition(":") if ":" in part else (part.strip(), "", "")
        if not name:
            raise CorpusError(f"tasks {text!r} holds an empty name; write for example color,mood:regression")
        kind, at, rate = kind.partition("@")
        if colon and kind not in KINDS:
            raise CorpusError(f"task {name!r} cannot be of kind {kind!r}; the kinds are {', '.join(KINDS)}")
        if at and kind != "events":
            raise CorpusError(f"task {name!r}: only events have bins; write {name}:{kind}, or {name}:events@{rate}")
        if name in {task.name for task in tasks}:
            raise CorpusError(f"task {name!r} is named twice in tasks {text!r}")
        tasks.append(Declared(name, kind or None, _rate(name, rate) if at else EVENT_RATE * (kind == "events")))
    return tasks


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise CorpusError(f"task {name!r} cannot have {text!r} bins per second; write for example {name}:events@25")
    return rate


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """Names for a message: all of a few, the first ones of many."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more if names else "none"


@functools.lru_cache(maxsize=256)
def _indices(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(classes)}
