"""Events: which class of thing happens in a clip from when to when, and the label of each bin of time that follows.

A clip's events are sorted, do not overlap, and are timed in seconds from the clip's own beginning. In parquet they are
a column of list<struct<start, end, label>>; a csv has JSON, `[{"start": 0.5, "end": 1.2, "label": "dog"}, ...]`, or the
path of a file that holds such a list. An empty list is a clip in which nothing happens, an empty field one of which
nobody knows.

Bin k covers [k, k + 1) / rate seconds; its class is the event in progress at its middle, `background` where there is
none. A clip has as many bins as its length holds, rounded: 10.04 s are ten bins of a second, as AVE counts them. Its
length is what was decoded of it; events beyond that are cut off.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import CorpusError, FeaturesError, one_line
from features.files import open_fs, resolve

BACKGROUND = "background"
EVENTS = pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("label", pa.string())]))
NO_TIME = "has events, and nothing says how long it is: give --vectors.rates NAME=..., or a column end"
TOLERANCE = 1e-3  # seconds; labels are rounded to milliseconds, lengths are not


def is_events(kind: pa.DataType) -> bool:
    """Whether a column of this type casts to `EVENTS`: a list of structs with these three fields, in any order."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return {field.name for field in kind.value_type} >= {"start", "end", "label"}


def parse_events(text: str, folder: str) -> list[dict[str, Any]]:
    """A manifest's text as events: a JSON list, or a file that holds one (relative to the manifest's folder).

    Raises CorpusError, without saying in which row.
    """
    source = "its JSON"
    if not text.lstrip().startswith("["):
        source = f"file {text}"
        try:
            fs, path = open_fs(resolve(text, folder))
            with fs.open_input_file(path) as file:
                text = file.read().decode()
        except (FeaturesError, OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"is neither a JSON list nor a file that reads: {one_line(error)}") from None
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{source} does not parse: {one_line(error)}") from None
    if not isinstance(entries, list):
        raise CorpusError(f"{source} is no list of events")
    return [_event(number, entry) for number, entry in enumerate(entries, 1)]


def _event(number: int, entry: Any) -> dict[str, Any]:
    try:
        start, end, label = (entry[name] for name in ("start", "end", "label"))
        if isinstance(label, str | int):
            return {"start": float(start), "end": float(end), "label": str(label)}
    except (KeyError, TypeError, ValueError):
        pass
    form = '{"start": seconds, "end": seconds, "label": "name"}'
    raise CorpusError(f"event {number} is {json.dumps(entry)[:80]}; write {form}")


def find_fault(column: pa.Array, seconds: np.ndarray) -> tuple[int, str] | None:
    """The first event that cannot be, as its row and a few words; column: of type EVENTS.

    seconds: (rows,) length of each clip, NaN where the manifest does not say.
    """
    rows, events = pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column)
    if not len(events):
        return None
    names = pc.struct_field(events, "label")
    start, end = (pc.struct_field(events, name).to_numpy(zero_copy_only=False) for name in ("start", "end"))
    unnamed = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(names), ""), True).to_numpy(zero_copy_only=False)
    follows = np.append(False, rows[1:] == rows[:-1])
    faults = {
        "lacks its start, end or label": ~np.isfinite(start) | ~np.isfinite(end) | unnamed,
        "begins before 0 s": start < 0,
        "does not end after it begins": end <= start,
        "begins before the event in front of it; sort them": follows & (start < np.roll(start, 1)),
        "overlaps the event in front of it": follows & (start < np.roll(end, 1) - TOLERANCE),
        "ends beyond the clip's end": end > seconds[rows] + TOLERANCE,
    }
    wrong = np.stack(list(faults.values()))
    if not wrong.any():
        return None
    at = int(wrong.any(axis=0).argmax())
    number = at - int(np.searchsorted(rows, rows[at])) + 1
    what = list(faults)[int(wrong[:, at].argmax())]
    return int(rows[at]), f"event {number} ({names[at].as_py()!r}, {start[at]:g} s to {end[at]:g} s) {what}"


def bin_events(
    events: Iterable[Mapping[str, Any]] | None, seconds: float, rate: float, classes: Mapping[str, int]
) -> np.ndarray:
    """The class of every bin of a clip: (bins,) int16, -1 throughout where the events are not known.

    seconds: the clip's length; rate: bins per second; classes: number by name, `background` among them.
    Raises KeyError for an event of no class.
    """
    bins = max(1, int(seconds * rate + 0.5))
    if events is None:
        return np.full(bins, -1, np.int16)
    middles = (np.arange(bins) + 0.5) / rate
    labels = np.full(bins, classes[BACKGROUND], np.int16)
    for event in events:
        first, last = np.searchsorted(middles, (event["start"], event["end"]))
        labels[first:last] = classes[event["label"]]
    return labels
