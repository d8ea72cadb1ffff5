"""What a clip is, and the manifest that lists clips: csv, parquet, or a folder of class folders.

A manifest is read as a stream of Arrow batches with normalised types, in the manifest's order, so that a million clips
cost no more memory than ten thousand; `validation.validate` looks at every row once before any clip is decoded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from pyarrow.fs import FileSystem, FileType

from features.corpus.delimited import csv_batches, csv_header
from features.corpus.events import EVENTS, is_events, parse_events
from features.corpus.filling import Filling, missing_columns, moved
from features.corpus.filling import notes as notes_on
from features.corpus.folder import SPLITS, folder_table
from features.corpus.tasks import Declared, parse_tasks
from features.errors import CorpusError, FeaturesError, one_line
from features.files import open_fs, parent, path_of, resolve

__all__ = ["SPLITS", "Clip", "Corpus", "is_text_file", "read_corpus"]

MEDIA = ("video", "audio", "image", "text")
VECTORS = "_features"  # a column of this ending gives vectors instead of a medium: `{modality}_features`
TYPES = {
    **dict.fromkeys(("clip_id", *MEDIA, "group", "split"), pa.string()),
    **dict.fromkeys(("start", "end"), pa.float64()),
    "fold": pa.int64(),
}
BATCH = 65_536  # rows
CODE = r"(?i)^(\+\d+|-?0\d+|-?0x[\da-f]+)$"  # digits that are no whole number as one is written: 007 is not 7
LONG = r"^-?\d{19,}$"  # digits that may be too many for a whole number of 64 bits
MISSING = r"(?i)^\s*(n/?a|nan|none|null|-|<na>)?\s*$"  # the usual words for a value that is not there
INDEX = r"Unnamed: \d+(\.\d+|_level_\d+)?|__index_level_\d+__"  # what pandas calls the index that it wrote
COUNTED = r"index|level_\d+"  # and what it calls one that it made a column
VERBATIM = ("clip_id", "text")  # columns whose values stay as they are written


@dataclass(frozen=True)
class Clip:
    """One row of a manifest; media and text as the manifest has them, so that nothing depends on the machine."""

    clip_id: str
    video: str | None
    audio: str | None
    image: str | None
    text: str | None
    start: float | None
    end: float | None
    split: str
    fold: int | None
    group: str | None
    labels: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], labels: Sequence[str]) -> "Clip":
        """A clip from one row of `Corpus.batches` (a dict) and the names of the label columns that it should carry."""
        values: dict[str, Any] = {name: row.get(name) for name in TYPES}
        return cls(
            **values,
            labels={name: row[name] for name in labels},
            vectors={name: uri for name, uri in row.items() if name.endswith(VECTORS) and uri},
        )

    def files(self) -> dict[str, str]:
        """This clip's files by column, as the manifest names them; a text that stands in the manifest is none."""
        named = {name: getattr(self, name) for name in MEDIA} | self.vectors
        return {name: uri for name, uri in named.items() if uri and (name != "text" or is_text_file(uri))}

    def media(self, folder: str) -> dict[str, str]:
        """Where this clip's files are: `{column: path or URI}` with relative ones taken from the manifest's folder."""
        return {name: resolve(uri, folder) for name, uri in self.files().items()}


@dataclass(frozen=True)
class Corpus:
    """A manifest that has been opened: schema holds every column with its normalised type.

    folder: what relative paths are relative to. table: the rows of a folder corpus, None for a manifest file.
    notes: what of it is left out or filled in, each in a few words. filling: columns that the manifest does not have.
    """

    uri: str
    folder: str
    schema: pa.Schema
    table: pa.Table | None = None
    notes: tuple[str, ...] = ()
    filling: Filling = field(default_factory=Filling)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label columns: all that are not reserved."""
        return tuple(name for name in self.schema.names if not _reserved(name))

    def declare(self, tasks: str | Sequence[Declared] | None) -> "Corpus":
        """The same corpus, with its columns read as what the tasks call them.

        Columns of text as events, and whole numbers that are written as fractions (1.0) as classes. A parquet column of
        list<struct<start, end, label>> needs no declaration, nor a csv's of JSON lists. What no task names and looks
        like an index that pandas made a column is left out.
        """
        tasks = parse_tasks(tasks) if isinstance(tasks, str) else tasks or ()
        read_as: dict[tuple[str | None, pa.DataType], pa.DataType]
        read_as = {("events", pa.string()): EVENTS, ("classification", pa.float64()): pa.int64()}
        kinds = {task.name: task.kind for task in tasks}
        counts = [n for n in self.schema.names if re.fullmatch(COUNTED, n) and n not in kinds and self._counts(n)]
        kept = [field_ for field_ in self.schema if field_.name not in counts]
        fields = [pa.field(f.name, read_as.get((kinds.get(f.name), f.type), f.type)) for f in kept]
        notes = [f"column {name!r} is left out: it holds pandas' index" for name in counts]
        return replace(self, schema=pa.schema(fields), notes=(*self.notes, *notes))

    def _counts(self, name: str) -> bool:
        """Whether a column holds whole numbers alone, of which no two are the same."""
        if self.schema.field(name).type != pa.int64():
            return False
        alone = replace(self, schema=pa.schema([self.schema.field(name)]), filling=Filling())
        columns = [batch.column(0) for batch in alone.batches()]
        if any(column.null_count for column in columns):
            return False
        values = np.concatenate([column.to_numpy() for column in columns])
        return len(np.unique(values)) == len(values)

    def batches(self, rows: int = BATCH) -> Iterator[pa.RecordBatch]:
        """Stream the manifest in its order, at most `rows` rows at a time. Raises CorpusError where it breaks off."""
        before = 0
        try:
            for batch in self._raw_batches():
                for offset in range(0, batch.num_rows, rows):
                    yield self._normalise(batch.slice(offset, rows), before + offset)
                before += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{self.uri} does not read: {one_line(error)}") from error

    def clips(self) -> Iterator[Clip]:
        """Every clip in the manifest's order."""
        for batch in self.batches(4096):
            for row in batch.to_pylist():
                yield Clip.from_row(row, self.labels)

    def _raw_batches(self) -> Iterator[pa.RecordBatch]:
        if self.table is not None:
            yield from self.table.to_batches()
            return
        filesystem, path = open_fs(self.uri)
        if _is_parquet(self.uri):
            with filesystem.open_input_file(path) as file:
                source = parquet.ParquetFile(file)
                names = [name for name in self.schema.names if name in source.schema_arrow.names]
                yield from source.iter_batches(batch_size=BATCH, columns=names)
        else:
            yield from csv_batches(filesystem, path, TYPES)

    def _normalise(self, batch: pa.RecordBatch, before: int) -> pa.RecordBatch:
        """before: rows in front of this batch, for the numbers of rows in messages."""
        columns: dict[str, pa.Array] = {}
        for name, kind in zip(self.schema.names, self.schema.types, strict=True):
            if name not in batch.schema.names:
                continue  # filled in below
            column = _plain(batch.column(name))
            if pa.types.is_string(column.type):
                column = _without_missing(name, column)
            elif pa.types.is_floating(column.type):
                column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            if kind == EVENTS and column.type == pa.string():
                column = self._parse_events(name, column, before)
            try:
                column = column if column.type == kind else _cast(column, kind)
            except pa.ArrowInvalid as error:
                row, value = _first_unlike(column, kind)
                if pa.types.is_integer(kind) and not _reserved(name):
                    what = "fractions" if float(value) % 1 > 0 else "numbers that are too large"
                    raise CorpusError(
                        f"task {name!r} cannot be a classification: its column holds {what} ({value} in row "
                        f"{before + row + 1}); store whole numbers or text"
                    ) from error
                raise CorpusError(
                    f"corpus {self.uri}: row {before + row + 1}, column {name!r}: {value!r} is no {_spoken(kind)}; "
                    "fix it, or leave it empty"
                ) from error
            if pa.types.is_string(kind):
                column = pc.if_else(pc.equal(column, ""), pa.scalar(None, kind), column)
            columns[name] = column
        columns = self.filling.columns(columns)
        return pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)

    def _parse_events(self, name: str, column: pa.Array, before: int) -> pa.Array:
        events = []
        for row, text in enumerate(column.to_pylist(), before + 1):
            try:
                events.append(None if text is None else parse_events(text, self.folder))
            except CorpusError as error:
                raise CorpusError(f"corpus {self.uri}: row {row}, column {name!r}: {error}") from None
        return pa.array(events, EVENTS)


def is_text_file(text: str) -> bool:
    """Whether the text column names a file instead of being the text: one line that ends in .txt, or a URI."""
    path = text if re.search(r"\s", text) else path_of(text)  # a sentence may hold an address
    return "\n" not in text and (path.endswith(".txt") or text.startswith(("file://", "s3://", "gs://")))


def read_corpus(uri: str) -> Corpus:
    """Open a manifest (.csv, .tsv, .csv.gz, .parquet) or a folder: ROOT/CLASS/clip.mp4, or ROOT/train/CLASS/clip.mp4.

    A folder's clip_id is the path without its ending, its one label column is `label`, the class folder; without
    train, val and test folders a hash of the clip_id splits it 70 / 10 / 20, the same on every machine, and each class
    has a clip in each split where it has three or more.
    Raises CorpusError where there is nothing usable.
    """
    try:
        filesystem, path = open_fs(uri)
        info = filesystem.get_file_info(path)
        if info.type == FileType.NotFound:
            raise CorpusError(f"corpus {uri} does not exist; name a .csv, a .parquet, or a folder of class folders")
        if info.type == FileType.Directory:
            folder = uri.rstrip("/") if "://" in uri else path
            table, notes = folder_table(filesystem, path, uri)
            return Corpus(uri, folder, table.schema, table, notes)
        if info.size == 0:
            raise CorpusError(f"corpus {uri} is empty (0 bytes)")
        if _is_parquet(uri):
            with filesystem.open_input_file(path) as file:
                schema = parquet.ParquetFile(file).schema_arrow
            _check_names(uri, schema.names)
            kept = [f for f in schema if not _is_index(f.name) and (_reserved(f.name) or not _is_bytes(f.type))]
            notes = _left_out(schema.names, [f.name for f in kept])
            schema = pa.schema([(f.name, _normal_type(f.name, f.type)) for f in kept])
        elif path_of(uri).lower().endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
            names = csv_header(filesystem, path, TYPES)
            _check_names(uri, names)
            schema = _csv_schema(filesystem, path)
            notes = _left_out(names, schema.names)
        else:
            raise CorpusError(f"corpus {uri} is neither .csv, .tsv nor .parquet, nor a folder of class folders")
    except CorpusError:
        raise
    except (FeaturesError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        advice = "; save it as UTF-8" if "invalid UTF8" in str(error) else ""
        raise CorpusError(f"corpus {uri} does not read: {one_line(error)}{advice}") from error
    return _filled(Corpus(uri, parent(uri), schema, notes=notes))


def _filled(corpus: Corpus) -> Corpus:
    """The same corpus with a clip_id and a split where its manifest has none."""
    names = corpus.schema.names
    filling = missing_columns(names)
    fields = ["clip_id"] * bool(filling.named_by)
    corpus = replace(corpus, notes=(*corpus.notes, *notes_on(filling, names)), filling=Filling(filling.named_by))
    corpus = replace(corpus, schema=pa.schema([*corpus.schema, *(pa.field(name, pa.string()) for name in fields)]))
    if not filling.split_by:
        return corpus
    keys = (filling.keys({name: batch.column(name) for name in batch.schema.names}) for batch in corpus.batches())
    filling = replace(filling, moved=moved(keys))
    return replace(corpus, schema=corpus.schema.append(pa.field("split", pa.string())), filling=filling)


def _check_names(uri: str, names: list[str]) -> None:
    if unnamed := [number for number, name in enumerate(names, 1) if number > 1 and not name.strip()]:
        raise CorpusError(f"corpus {uri}: column {unnamed[0]} has no name; give it one, or delete it")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CorpusError(f"corpus {uri} has the column {twice[0]!r} more than once; rename one")


def _is_parquet(uri: str) -> bool:
    return path_of(uri).lower().endswith((".parquet", ".pq"))


def _is_index(name: str) -> bool:
    """Whether a column is the index that pandas writes unless it is told not to."""
    return not name.strip() or re.fullmatch(INDEX, name) is not None


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _left_out(names: Sequence[str], kept: Sequence[str]) -> tuple[str, ...]:
    """A note on each column that is not read."""
    reasons = ((name, "pandas' index" if _is_index(name) else "bytes") for name in names if name not in kept)
    return tuple(f"column {name!r} is left out: it holds {reason}" for name, reason in reasons)


def _without_missing(name: str, column: pa.Array) -> pa.Array:
    """Text without blanks around it; null where it is a usual word for a value that is missing."""
    if name in VERBATIM:
        return column
    missing = pc.match_substring_regex(column, MISSING)
    return pc.if_else(missing, pa.scalar(None, pa.string()), pc.utf8_trim_whitespace(column))


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column as another type; whole numbers may be fractions (1.0), as pandas writes them where some are missing."""
    if pa.types.is_integer(kind) and pa.types.is_string(column.type):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            column = column.cast(pa.float64())
    return column.cast(kind)


def _first_unlike(column: pa.Array, kind: pa.DataType) -> tuple[int, Any]:
    """The first value of a column that does not cast to a type, with its row in the batch."""
    for row in range(len(column)):
        try:
            _cast(column.slice(row, 1), kind)
        except pa.ArrowInvalid:
            return row, column[row].as_py()
    return 0, column[0].as_py()


def _spoken(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "whole number"
    return "number" if pa.types.is_floating(kind) else str(kind)


def _reserved(name: str) -> bool:
    return name in TYPES or name.endswith(VECTORS)


def _normal_type(name: str, kind: pa.DataType) -> pa.DataType:
    """The type that a column has from here on: few enough that csv and parquet of the same rows are the same corpus."""
    if name in TYPES:
        return TYPES[name]
    if name.endswith(VECTORS):
        return pa.string()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if is_events(kind):
        return EVENTS
    return kind if pa.types.is_nested(kind) else pa.string()


def _csv_schema(filesystem: FileSystem, path: str) -> pa.Schema:
    """The narrowest of integer, float, events in JSON and text that holds all of a label column."""
    kinds: dict[str, pa.DataType | None] = {n: None for n in csv_header(filesystem, path, TYPES) if not _is_index(n)}
    for batch in csv_batches(filesystem, path, TYPES):
        for name in kinds:
            column = _without_missing(name, batch.column(name))
            if _reserved(name) or kinds[name] == pa.string() or column.null_count == len(column):
                continue
            kinds[name] = _narrowest(column, kinds[name])
    return pa.schema([(name, _normal_type(name, kind or pa.string())) for name, kind in kinds.items()])


def _plain(column: pa.Array) -> pa.Array:
    """Text as one kind of column: pandas and polars write long strings, and categories as a dictionary."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)
    return column.cast(pa.string()) if is_text else column


def _narrowest(column: pa.Array, before: pa.DataType | None) -> pa.DataType:
    """before: the type that fits the rows before these, None where none of them had a value."""
    codes = pc.any(pc.match_substring_regex(column, CODE)).as_py()
    long = pc.any(pc.match_substring_regex(column, LONG)).as_py()  # as a fraction, neighbours would be one number
    for kind in (pa.int64(), pa.float64()):
        if codes or before not in (None, pa.int64(), kind) or (long and kind == pa.float64()):
            continue
        try:
            column.cast(kind)
            return kind
        except pa.ArrowInvalid:
            pass
    in_json = before in (None, EVENTS) and pc.all(pc.match_substring_regex(column, r"^\s*\[\s*[{\]]")).as_py()
    return EVENTS if in_json else pa.string()
