"""What a clip is, and the manifest that lists clips: csv, parquet, or a folder of class folders.

A manifest is read as a stream of Arrow batches with normalised types, in the manifest's order, so that a million clips
cost no more memory than ten thousand; `validation.validate` looks at every row once before any clip is decoded.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet
from pyarrow.fs import FileSelector, FileSystem, FileType

from features.corpus.events import EVENTS, is_events, parse_events
from features.corpus.tasks import Declared, parse_tasks
from features.errors import CorpusError, FeaturesError, one_line
from features.files import open_fs, parent, resolve

SPLITS = ("train", "val", "test")
MEDIA = ("video", "audio", "image", "text")
VECTORS = "_features"  # a column of this ending gives vectors instead of a medium: `{modality}_features`
TYPES = {
    **dict.fromkeys(("clip_id", *MEDIA, "group", "split"), pa.string()),
    **dict.fromkeys(("start", "end"), pa.float64()),
    "fold": pa.int64(),
}
BATCH = 65_536  # rows
CODE = r"(?i)^(\+\d+|-?0\d+|-?0x[\da-f]+)$"  # digits that are no whole number as one is written: 007 is not 7
SUFFIXES = {
    **dict.fromkeys(("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "flv", "3gp", "ogv", "wmv"), "video"),
    **dict.fromkeys(("wav", "flac", "mp3", "m4a", "aac", "ogg", "opus"), "audio"),
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp"), "image"),
}


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
        return cls(
            **{name: row.get(name) for name in TYPES},
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
    """

    uri: str
    folder: str
    schema: pa.Schema
    table: pa.Table | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The label columns: all that are not reserved."""
        return tuple(name for name in self.schema.names if not _reserved(name))

    def declare(self, tasks: str | Sequence[Declared] | None) -> "Corpus":
        """The same corpus, with the columns of text that tasks call events read as events.

        A parquet column of list<struct<start, end, label>> needs no declaration, nor a csv's of JSON lists.
        """
        tasks = parse_tasks(tasks) if isinstance(tasks, str) else tasks or ()
        events = {task.name for task in tasks if task.kind == "events"}
        fields = [
            pa.field(f.name, EVENTS if f.name in events and f.type == pa.string() else f.type) for f in self.schema
        ]
        return replace(self, schema=pa.schema(fields))

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
                yield from parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
        else:
            yield from _csv_batches(filesystem, path)

    def _normalise(self, batch: pa.RecordBatch, before: int) -> pa.RecordBatch:
        """before: rows in front of this batch, for the numbers of rows in messages."""
        columns = []
        for name, kind in zip(self.schema.names, self.schema.types, strict=True):
            column = batch.column(name)
            if kind == EVENTS and column.type == pa.string():
                column = self._parse_events(name, column, before)
            try:
                column = column if column.type == kind else column.cast(kind)
            except pa.ArrowInvalid as error:
                raise CorpusError(f"{self.uri}: column {name!r} is not {kind} throughout: {one_line(error)}") from error
            if pa.types.is_floating(kind):  # what is missing has one face
                column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
            elif pa.types.is_string(kind):
                column = pc.if_else(pc.equal(column, ""), pa.scalar(None, kind), column)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

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
    return "\n" not in text and (text.endswith(".txt") or text.startswith(("file://", "s3://", "gs://")))


def read_corpus(uri: str) -> Corpus:
    """Open a manifest (.csv, .csv.gz, .parquet) or a folder: ROOT/CLASS/clip.mp4, or ROOT/train/CLASS/clip.mp4.

    A folder's clip_id is the path without its ending, its one label column is `label`, the class folder; without
    train, val and test folders a hash of the clip_id splits it 70 / 10 / 20, the same on every machine.
    Raises CorpusError where there is nothing usable.
    """
    try:
        filesystem, path = open_fs(uri)
        info = filesystem.get_file_info(path)
        if info.type == FileType.NotFound:
            raise CorpusError(f"corpus {uri} does not exist; name a .csv, a .parquet, or a folder of class folders")
        if info.type == FileType.Directory:
            folder = uri.rstrip("/") if "://" in uri else path
            table = _folder_table(filesystem, path, uri)
            return Corpus(uri, folder, table.schema, table)
        if info.size == 0:
            raise CorpusError(f"corpus {uri} is empty (0 bytes)")
        if _is_parquet(uri):
            with filesystem.open_input_file(path) as file:
                schema = parquet.ParquetFile(file).schema_arrow
            _check_unique(uri, schema.names)
            schema = pa.schema([(f.name, _normal_type(f.name, f.type)) for f in schema])
        elif uri.partition("?")[0].endswith((".csv", ".csv.gz")):
            _check_unique(uri, _csv_header(filesystem, path))
            schema = _csv_schema(filesystem, path)
        else:
            raise CorpusError(f"corpus {uri} is neither .csv, .csv.gz nor .parquet, nor a folder of class folders")
    except CorpusError:
        raise
    except (FeaturesError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus {uri} does not read: {one_line(error)}") from error
    return Corpus(uri, parent(uri), schema)


def _check_unique(uri: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CorpusError(f"corpus {uri} has the column {twice[0]!r} more than once; rename one")


def _is_parquet(uri: str) -> bool:
    return uri.partition("?")[0].endswith((".parquet", ".pq"))


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


def _csv_batches(filesystem: FileSystem, path: str) -> Iterator[pa.RecordBatch]:
    """Every column as text: types guessed from the first block would turn 00123 into 123, and break off later."""
    with filesystem.open_input_stream(path) as stream:
        names = _csv_header(filesystem, path)
        text = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        parse = csv.ParseOptions(newlines_in_values=True)
        with csv.open_csv(stream, convert_options=text, parse_options=parse) as reader:
            yield from reader


def _csv_header(filesystem: FileSystem, path: str) -> list[str]:
    with filesystem.open_input_stream(path) as stream, csv.open_csv(stream) as reader:
        return reader.schema.names


def _csv_schema(filesystem: FileSystem, path: str) -> pa.Schema:
    """The narrowest of integer, float, events in JSON and text that holds all of a label column."""
    kinds: dict[str, pa.DataType | None] = dict.fromkeys(_csv_header(filesystem, path))
    for batch in _csv_batches(filesystem, path):
        for name in kinds:
            column = batch.column(name)
            if _reserved(name) or kinds[name] == pa.string() or column.null_count == len(column):
                continue
            kinds[name] = _narrowest(column, kinds[name])
    return pa.schema([(name, _normal_type(name, kind or pa.string())) for name, kind in kinds.items()])


def _narrowest(column: pa.Array, before: pa.DataType | None) -> pa.DataType:
    """before: what held the rows before these, None where there were none with a value."""
    codes = pc.any(pc.match_substring_regex(column, CODE)).as_py()
    for kind in (pa.int64(), pa.float64()):
        if codes or before not in (None, pa.int64(), kind):
            continue
        try:
            column.cast(kind)
            return kind
        except pa.ArrowInvalid:
            pass
    in_json = before in (None, EVENTS) and pc.all(pc.match_substring_regex(column, r"^\s*\[\s*[{\]]")).as_py()
    return EVENTS if in_json else pa.string()


def _folder_table(filesystem: FileSystem, root: str, uri: str) -> pa.Table:
    """The rows of a folder of class folders, sorted; a clip's video, sound and image may lie side by side."""
    files = filesystem.get_file_info(FileSelector(root, recursive=True))
    paths = sorted(f.path[len(root.rstrip("/")) + 1 :] for f in files if f.type == FileType.File)
    paths = [p for p in paths if not any(part.startswith(".") for part in p.split("/"))]
    paths = [p for p in paths if p.rpartition(".")[2].lower() in SUFFIXES]
    if not paths:
        raise CorpusError(f"corpus {uri} has no media file ({', '.join(SUFFIXES)}) below it")
    split_folders = {p.split("/")[0] for p in paths} <= set(SPLITS)
    rows: dict[str, list] = {name: [] for name in ("clip_id", "video", "audio", "image", "split", "label")}
    row_of: dict[str, int] = {}  # by clip_id: a.old.mp4 sorts between a.mp4 and a.wav
    for path in paths:
        clip_id, _, suffix = path.rpartition(".")
        folders = clip_id.split("/")[:-1]
        if len(folders) < 1 + split_folders:
            where = "ROOT/SPLIT/CLASS/" if split_folders else "ROOT/CLASS/"
            raise CorpusError(f"corpus {uri}: {path} lies in no class folder; put it in {where} or name a manifest")
        modality = SUFFIXES[suffix.lower()]
        row = row_of.get(clip_id)
        if row is None or rows[modality][row] is not None:
            row = row_of[clip_id] = len(rows["clip_id"])
            split = folders[0] if split_folders else _split_by_hash(clip_id)
            for name, value in {"clip_id": clip_id, "split": split, "label": folders[split_folders]}.items():
                rows[name].append(value)
            for name in ("video", "audio", "image"):
                rows[name].append(None)
        rows[modality][row] = path
    return pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})


def _split_by_hash(clip_id: str) -> str:
    share = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8]) / 2**64
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"
