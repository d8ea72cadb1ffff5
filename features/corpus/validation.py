"""One look at every row of a corpus before any clip is decoded: what would spoil a run is named while it is cheap.

Keys are compared by 8-byte hashes, so that a million clips take tens of megabytes; a hit is looked up again by name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.corpus.events import EVENTS
from features.corpus.labels import NUMBER, LabelCheck, first_true
from features.corpus.manifest import SPLITS, Corpus
from features.corpus.tasks import EVENT_RATE, NUMBERS, Declared, Task, parse_tasks, shortened
from features.errors import CorpusError, did_you_mean


@dataclass(frozen=True)
class Summary:
    """What a valid corpus holds. digest: sha256 of all rows in order, the same for csv and parquet of the same rows.

    sources: rows that name a medium or vectors, by column; columns that are empty throughout are left out. notes: what
    looks unintended and spoils no run, each in a few words.
    """

    rows: int
    splits: dict[str, int]
    tasks: tuple[Task, ...]
    digest: str
    sources: dict[str, int]
    notes: tuple[str, ...] = field(default=(), compare=False)


def validate(corpus: Corpus, wanted: str | Sequence[Declared] | None = None, unlabelled: bool = False) -> Summary:
    """Check every row in one pass, and find each task's kind and classes.

    wanted: "color,digit:regression,word:events@25"; a kind left out follows from the column's type; None takes every
    label column. unlabelled: clips to predict, which need neither labels nor all three splits.
    Raises CorpusError for the first thing that would spoil a run: what, where, what to do.
    """
    wanted = parse_tasks(wanted) if isinstance(wanted, str) else wanted
    corpus = corpus.declare(wanted)
    _check_columns(corpus)
    tasks = [] if unlabelled else _typed_tasks(corpus, wanted)
    named = {task.name for task in wanted or () if task.kind is not None}
    checks = [LabelCheck(corpus, task, task.name in named) for task in tasks]
    rows = _RowCheck(corpus)
    for batch in corpus.batches():
        for check in checks:  # after what concerns the row as a whole
            check.fault = check.find_fault(batch)
        rows.add(batch)
        for check in checks:
            check.add(batch)
    rows.finish(unlabelled)
    found = tuple(check.task() for check in checks)
    notes = tuple(note for check in checks for note in check.notes())
    sources = {name: count for name, count in rows.sources.items() if count}
    return Summary(rows.count, rows.splits, found, rows.digest.hexdigest(), sources, notes)


class _RowCheck:
    """Looks at what rows have whatever is to be learned: ids, splits, groups, media; counts them as it goes."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.count = corpus, 0
        self.splits = dict.fromkeys(SPLITS, 0)
        self.ids: list[np.ndarray] = []
        self.digest = _Digest(corpus.schema)
        self.groups: dict[str, list] = {name: [] for name in ("split", "fold") if name in corpus.schema.names}
        self.sources = dict.fromkeys(_media_columns(corpus.schema), 0)

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the next rows. Raises CorpusError for the first one that is wrong by itself."""
        _check_rows(self.corpus, batch, self.count)
        self.count += batch.num_rows
        for pair in batch.column("split").value_counts().to_pylist():
            self.splits[pair["values"]] += pair["counts"]
        self.ids.append(_hashes(batch.column("clip_id")))
        if "group" in batch.schema.names:
            for column, pairs in self.groups.items():
                pairs.append(_group_pairs(batch, column))
        for name in self.sources:
            self.sources[name] += pc.sum(pc.greater(pc.binary_length(batch.column(name)), 0)).as_py() or 0
        self.digest.update(batch)

    def finish(self, unlabelled: bool) -> None:
        """Raise CorpusError for what only all rows together get wrong."""
        if not self.count:
            raise CorpusError(f"corpus {self.corpus.uri} has no rows")
        _check_duplicates(self.corpus, self.ids)
        for column, pairs in self.groups.items():
            _check_groups(self.corpus, column, pairs)
        empty = [split for split, count in self.splits.items() if not count]
        if empty and not unlabelled:
            counts = ", ".join(f"{split} {count}" for split, count in self.splits.items())
            raise CorpusError(
                f"corpus {self.corpus.uri} has no {' and no '.join(empty)} clips ({counts}); each needs one or more"
            )


def _check_columns(corpus: Corpus) -> None:
    names = corpus.schema.names
    if not _media_columns(corpus.schema):
        raise CorpusError(
            f"corpus {corpus.uri} has no media column; call the one with the files' paths video, audio, image or text "
            f"(it has {shortened(names)})"
        )
    for name in ("clip_id", "split"):
        if name not in names:
            close = did_you_mean(name, names)
            raise CorpusError(f"corpus {corpus.uri} has no column {name!r}{close}; it has {shortened(names)}")


def _first_text(corpus: Corpus, name: str) -> str:
    """The first value of a column that is no number, for a message."""
    before = 0
    for batch in corpus.batches():
        row = first_true(pc.invert(pc.fill_null(pc.match_substring_regex(batch.column(name), NUMBER), True)))
        if row is not None:
            return f" ({batch.column(name)[row].as_py()!r} in row {before + row + 1} is no number)"
        before += batch.num_rows
    return ""


def _media_columns(schema: pa.Schema) -> list[str]:
    return [n for n in schema.names if n in ("video", "audio", "image", "text") or n.endswith("_features")]


def _typed_tasks(corpus: Corpus, wanted: Sequence[Declared] | None) -> list[Declared]:
    """Each task with its kind, from the run or from its column's type."""
    if not corpus.labels:
        raise CorpusError(
            f"corpus {corpus.uri} has no label column; add one to {shortened(corpus.schema.names)} "
            "(or extract it --unlabelled, for predictions)"
        )
    tasks = []
    for task in wanted or [Declared(name) for name in corpus.labels]:
        name = task.name
        if name not in corpus.labels:
            close = did_you_mean(name, corpus.labels)
            raise CorpusError(f"no label column {name!r} in {corpus.uri}{close}; it has {shortened(corpus.labels)}")
        column = corpus.schema.field(name).type
        if task.kind is None:
            task = Declared(name, _natural_kind(column), EVENT_RATE if column == EVENTS else 0.0)
        _check_kind(corpus, task, column)
        tasks.append(task)
    return tasks


def _natural_kind(column: pa.DataType) -> str:
    if column == EVENTS:
        return "events"
    return "regression" if column == pa.float64() else "classification"


def _check_kind(corpus: Corpus, task: Declared, column: pa.DataType) -> None:
    name, kind = task.name, task.kind
    if pa.types.is_nested(column) and column != EVENTS:
        raise CorpusError(f"task {name!r} is a column of {column}, which no task kind learns; name other tasks")
    if (kind == "events") != (column == EVENTS):
        holds = "events" if column == EVENTS else f"{column}, and no start, end and label"
        raise CorpusError(f"task {name!r} cannot be of kind {kind}: its column holds {holds}")
    if kind in NUMBERS and column == pa.string():
        text = _first_text(corpus, name)
        raise CorpusError(f"task {name!r} cannot be a {kind}: its column is text{text}; name it {name}:classification")
    if kind == "classification" and column == pa.float64():
        raise CorpusError(
            f"task {name!r} cannot be a classification: its column holds fractions; store whole numbers or text"
        )


def _check_rows(corpus: Corpus, batch: pa.RecordBatch, before: int) -> None:
    """What one row alone can get wrong; before: rows seen in earlier batches, for the message's row number."""
    ids, splits = batch.column("clip_id"), batch.column("split")
    missing = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(ids), ""), True)
    row = first_true(missing)
    if row is not None:
        raise CorpusError(f"corpus {corpus.uri}: row {before + row + 1} has no clip_id; give every clip one")
    row = first_true(pc.invert(pc.is_in(splits, value_set=pa.array(SPLITS))))
    if row is not None:
        raise CorpusError(
            f"corpus {corpus.uri}: clip {ids[row].as_py()!r} has split {splits[row].as_py()!r}; use train, val or test"
        )
    empty = pa.array(np.ones(batch.num_rows, bool))
    for name in _media_columns(batch.schema):
        empty = pc.and_(empty, pc.is_null(batch.column(name)))
    row = first_true(empty)
    if row is not None:
        columns = ", ".join(_media_columns(batch.schema))
        raise CorpusError(f"corpus {corpus.uri}: clip {ids[row].as_py()!r} has no media; fill one of {columns}")
    _check_segments(corpus, batch)


def _check_segments(corpus: Corpus, batch: pa.RecordBatch) -> None:
    nothing = pa.nulls(batch.num_rows, pa.float64())
    start, end = (batch.column(n) if n in batch.schema.names else nothing for n in ("start", "end"))
    begin = pc.fill_null(start, 0.0)
    endless = pc.or_(pc.is_inf(begin), pc.fill_null(pc.is_inf(end), False))
    wrong = pc.or_(pc.or_(pc.less(begin, 0.0), endless), pc.fill_null(pc.less_equal(end, begin), False))
    row = first_true(wrong)
    if row is not None:
        clip, segment = batch.column("clip_id")[row].as_py(), f"{start[row].as_py()} s to {end[row].as_py()} s"
        raise CorpusError(
            f"corpus {corpus.uri}: clip {clip!r} goes from {segment}; 0 <= start < end is needed, or no end"
        )


def _hashes(column: pa.Array) -> np.ndarray:
    import pandas as pd  # here, for decoding processes load this module and need none of pandas

    return pd.util.hash_array(column.to_numpy(zero_copy_only=False), categorize=False)


def _repeated(hashes: np.ndarray) -> np.ndarray:
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _check_duplicates(corpus: Corpus, ids: list[np.ndarray]) -> None:
    """Two clips of one id would overwrite each other; equal hashes are looked up by name."""
    repeated = _repeated(np.concatenate(ids))
    seen: dict[str, int] = {}
    row = 0
    for batch in corpus.batches() if len(repeated) else ():
        for index in np.flatnonzero(np.isin(_hashes(batch.column("clip_id")), repeated)):
            clip, number = batch.column("clip_id")[int(index)].as_py(), row + int(index) + 1
            if clip in seen:
                raise CorpusError(
                    f"corpus {corpus.uri}: clip_id {clip!r} is in rows {seen[clip]} and {number}; ids must be unique"
                )
            seen[clip] = number
        row += batch.num_rows


def _group_pairs(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """Every (group's hash, split's or fold's hash) in a batch, once: (N, 2) uint64."""
    pairs = pa.table({name: batch.column(name) for name in ("group", column)}).drop_null()
    pairs = pairs.group_by(["group", column]).aggregate([])
    return np.stack([_hashes(pairs[name].combine_chunks()) for name in ("group", column)], axis=1)


def _check_groups(corpus: Corpus, column: str, groups: list[np.ndarray]) -> None:
    """What a group shares (an actor, a source file) would leak from one split, or one fold, to another."""
    if not groups:
        return
    repeated = _repeated(np.unique(np.concatenate(groups), axis=0)[:, 0])
    found: dict[str, str | int] = {}
    for batch in corpus.batches() if len(repeated) else ():
        names, places = batch.column("group").to_pylist(), batch.column(column).to_pylist()
        for name, place in zip(names, places, strict=True):
            if None not in (name, place) and found.setdefault(name, place) != place:
                where = "fold " if column == "fold" else ""
                raise CorpusError(
                    f"corpus {corpus.uri}: group {name!r} is in {where}{found[name]} and in {where}{place}; "
                    f"keep a group in one {column}"
                )


class _Digest:
    """sha256 of a corpus's content that does not depend on how its rows come in batches."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in sorted(schema.names)}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, (content, shape) in self.columns.items():
            column = batch.column(name)
            if pa.types.is_nested(column.type):
                for value in column.to_pylist():
                    content.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
                continue
            if column.type == pa.string():
                lengths = pc.fill_null(pc.binary_length(column), -1)
                shape.update(lengths.to_numpy(zero_copy_only=False).tobytes())
                content.update("".join(column.drop_null().to_pylist()).encode())
            else:
                shape.update(column.is_null().to_numpy(zero_copy_only=False).tobytes())
                content.update(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).tobytes())

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for name, (content, shape) in self.columns.items():
            whole.update(f"{name}\0{self.schema.field(name).type}\0".encode() + content.digest() + shape.digest())
        return whole.hexdigest()
