"""Reading a store's index, however many parts it has.

Ten million clips in shards of 64 have 156,000 parts. They are read one after another into tables of many parts each,
and no part twice on one host: what training reads of a large index is kept on the host's own disk in one file, which
every process maps into its memory.

    FOLDER/{store}.{listing}.arrow     record batches of one split each; .tmp while it is written, .lock by whom

`listing` is a digest of the parts' names, sizes and times, so a store that has changed has another file.
"""

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock

from features.files import publish

KEPT = re.compile("clip_id|split|shard|offset|nbytes|duration|fold|tokens_.*|label_.*")  # columns
NAMED = ("split", "shard")  # columns that a part's name holds already
MANY = 2000  # parts from which on they are kept in one file
COPIES = 16  # files of one user on a host, one of each store; those used longest ago are removed
ROWS = 1 << 18  # of a table, more or less
REQUESTS = 16  # under way at once to a remote store


def split_of(part: pafs.FileInfo) -> str:
    """The split of a part's shard: a shard has one, and its name begins with it."""
    return part.base_name.rpartition("-")[0]


def schema_of(fs: pafs.FileSystem, part: pafs.FileInfo) -> pa.Schema:
    """The columns of a part, and so of all parts of a store: those of its first one."""
    with _named(part), fs.open_input_file(part.path) as file:
        return pq.ParquetFile(file).schema_arrow.remove_metadata()


def read_parts(fs: pafs.FileSystem, parts: Iterable[pafs.FileInfo], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of parts in their order, in large tables of one split each. schema: the columns to read.

    A column that a part lacks is null there. Raises pyarrow.ArrowInvalid, naming the file, for one that is damaged.
    """
    stored = pa.schema([field for field in schema if field.name not in NAMED])
    for split, several in groupby(parts, split_of):
        waiting, shards, rows = [], [], 0
        own = list(several)
        for part, table in zip(own, _each(fs, own, stored), strict=True):
            waiting.append(table)
            shards.append(part.base_name.removesuffix(".parquet"))
            rows += len(table)
            if rows >= ROWS or part is own[-1]:
                yield _joined(waiting, split, shards, schema)
                waiting, shards, rows = [], [], 0


def _joined(tables: list[pa.Table], split: str, shards: list[str], schema: pa.Schema) -> pa.Table:
    """Parts as one table, with what their names say."""
    table = pa.concat_tables(tables).combine_chunks()
    of_row = np.repeat(np.arange(len(shards)), [len(part) for part in tables])
    named = {"split": pa.repeat(split, len(of_row)), "shard": pa.array(shards, pa.string()).take(pa.array(of_row))}
    return pa.table([named[n] if n in NAMED else table[n] for n in schema.names], schema=schema)


def count_rows(fs: pafs.FileSystem, parts: Iterable[pafs.FileInfo]) -> int:
    """How many rows parts have, from their footers."""

    def count(part: pafs.FileInfo) -> int:
        with _named(part), fs.open_input_file(part.path) as file:
            return pq.read_metadata(file).num_rows

    if fs.type_name == "local":
        return sum(map(count, parts))
    with ThreadPoolExecutor(REQUESTS) as threads:
        return sum(threads.map(count, parts))


def open_kept(fs: pafs.FileSystem, parts: Sequence[pafs.FileInfo]) -> list[pa.RecordBatch] | None:
    """The kept columns of an index with many parts, mapped from this host's disk, where the first caller writes them.

    None where they are few, or the disk has no room.
    """
    if len(parts) < MANY:
        return None
    about = hashlib.sha256(f"{fs.type_name} {parts[0].path}\n".encode())
    store = about.hexdigest()[:16]
    for part in parts:
        about.update(f"{part.base_name} {part.size} {part.mtime_ns}\n".encode())
    path = Path(tempfile.gettempdir(), f"clcr-index-{os.getuid()}", f"{store}.{about.hexdigest()[:16]}.arrow")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(path.parent):
            return None
        with FileLock(path.with_suffix(".lock"), is_singleton=False):
            if not path.exists():
                _write(fs, parts, path)
        os.utime(path)
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            return [file.get_batch(number) for number in range(file.num_record_batches)]
        except pa.ArrowInvalid:  # cut off, as by a power cut
            path.unlink(missing_ok=True)
    return None


def _is_own(folder: Path) -> bool:
    """Whether nobody else could have put files into a folder below the one for temporary files."""
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022


def _write(fs: pafs.FileSystem, parts: Sequence[pafs.FileInfo], path: Path) -> None:
    schema = pa.schema([field for field in schema_of(fs, parts[0]) if KEPT.fullmatch(field.name)])
    temporary = path.with_suffix(".tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
            for table in read_parts(fs, parts, schema):
                file.write_table(table)
        publish(pafs.LocalFileSystem(), str(temporary), str(path), sync=False)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    store = path.name.partition(".")[0]
    kept = sorted((old for old in path.parent.glob("*.arrow") if old != path), key=os.path.getmtime)
    before = [old for old in kept if old.name.startswith(f"{store}.")]
    others = [old for old in kept if old not in before]
    for old in (*before, *others[: 1 - COPIES]):
        old.unlink(missing_ok=True)  # who has mapped it keeps it
        old.with_suffix(".lock").unlink(missing_ok=True)


def _each(fs: pafs.FileSystem, parts: Sequence[pafs.FileInfo], schema: pa.Schema) -> Iterator[pa.Table]:
    if fs.type_name == "local":
        yield from (_read(fs, part, schema) for part in parts)
        return
    with ThreadPoolExecutor(REQUESTS) as threads:
        for first in range(0, len(parts), 64 * REQUESTS):  # not all at once: what is read waits in memory
            yield from threads.map(lambda part: _read(fs, part, schema), parts[first : first + 64 * REQUESTS])


def _read(fs: pafs.FileSystem, part: pafs.FileInfo, schema: pa.Schema) -> pa.Table:
    with fs.open_input_file(part.path) as file:
        content = file.read_buffer()  # whole: one request
    with _named(part):
        table = pq.ParquetFile(pa.BufferReader(content)).read(schema.names or ["clip_id"], use_threads=False)
    if table.schema.equals(schema):
        return table
    has, rows = set(table.column_names), len(table)
    columns = [table[f.name].cast(f.type) if f.name in has else pa.nulls(rows, f.type) for f in schema]
    return pa.table(columns, schema=schema) if columns else table


@contextlib.contextmanager
def _named(part: pafs.FileInfo) -> Iterator[None]:
    """Name the file in what Arrow says of its content."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"{part.path}: {error}") from error
