"""Columns that a manifest may leave out: without `clip_id` a clip is named by its file, without `split` a hash splits.

Where there is a column `group`, the group's hash decides, so that no speaker or source file is in two splits; else the
clip's own. So clips that are added later move none of the old ones, but for those that fill a split without any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from features.corpus.folder import hash_split, split_by_hash
from features.errors import close_names

NAMING = ("video", "audio", "image")
MANY = 10_000  # clips, or groups, among which a hash leaves no split empty
# Columns that are seldom learned, and whose values seldom may be in two splits.
PEOPLE = ("speaker", "subject", "actor", "participant", "person", "patient", "performer", "user", "session")


@dataclass(frozen=True)
class Filling:
    """What is filled in. named_by: the columns whose first value names a clip, () where the manifest names it;
    split_by: the column whose hash decides on the split, "" where the manifest does; moved: values with a split of
    their own, so that none is empty.
    """

    named_by: tuple[str, ...] = ()
    split_by: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)

    def columns(self, given: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
        """The columns of a batch (name: values) with those that it lacks."""
        filled = dict(given)
        if self.named_by:
            filled["clip_id"] = _names(given, self.named_by)
        if self.split_by:
            splits = [key and (self.moved.get(key) or hash_split(key)) for key in self.keys(filled).to_pylist()]
            filled["split"] = pa.array(splits, pa.string())
        return filled

    def keys(self, columns: Mapping[str, pa.Array]) -> pa.Array:
        """What decides on the split of each row: its group, or its own name where it has none."""
        own = columns[self.split_by]
        return pc.coalesce(own, columns["clip_id"]) if self.split_by == "group" else own


def missing_columns(names: Sequence[str]) -> Filling:
    """What a manifest with these columns lacks and can be filled in. A misspelt name is none: the check names it."""
    lacks = [name for name in ("clip_id", "split") if name not in names and not close_names(name, names)]
    naming = tuple(name for name in names if name in NAMING or name.endswith("_features"))
    named_by = naming if "clip_id" in lacks else ()
    if "split" not in lacks or not (named_by or "clip_id" in names):
        return Filling(named_by)
    return Filling(named_by, "group" if "group" in names else "clip_id")


def moved(keys: Iterable[pa.Array]) -> dict[str, str]:
    """Of the values that decide on splits, those whose split is another than their hash says, so that none is empty."""
    few = list(islice(_distinct(keys), MANY + 1))
    if len(few) > MANY:
        return {}
    splits = split_by_hash(few, [""] * len(few))
    return {key: split for key, split in zip(few, splits, strict=True) if split != hash_split(key)}


def notes(filling: Filling, names: Sequence[str]) -> tuple[str, ...]:
    """What was filled in, and what looks like a group and is not called so."""
    lines = []
    if filling.named_by:
        lines.append(f"no column 'clip_id': a clip is named by its {' or '.join(filling.named_by)}")
    if filling.split_by:
        what = "'group'" if filling.split_by == "group" else "a hash of 'clip_id'"
        lines.append(f"no column 'split': split 70 / 10 / 20 by {what}")
        if filling.split_by == "clip_id" and "start" in names:
            lines.append("segments of one file may be in different splits; a column 'group' keeps them together")
    if "group" not in names:
        found = [name for name in names if name.lower() in (*PEOPLE, "group", "groups")]
        lines += [
            f"nothing keeps a {name} in one split; call the column {name!r} 'group' where that is meant"
            for name in found
        ]
    return tuple(lines)


def _names(given: Mapping[str, pa.Array], named_by: Sequence[str]) -> pa.Array:
    """The first file of each row, with the second at which it starts where it is a segment."""
    files = pc.coalesce(*(given[name] for name in named_by))
    if "start" not in given:
        return files
    segment = pc.binary_join_element_wise(files, pc.cast(given["start"], pa.string()), "@")
    return pc.coalesce(segment, files)


def _distinct(columns: Iterable[pa.Array]) -> Iterator[str]:
    seen: set[str] = set()
    for column in columns:
        for key in pc.unique(column).to_pylist():
            if key is not None and key not in seen:
                seen.add(key)
                yield key
