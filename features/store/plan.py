"""The plan of a store: the manifest's rows in the order of the shards.

    STORE/plan/{split}.arrow     record batch k holds the rows of shard {split}-{k}

It is written in one pass over the manifest, and each worker reads its shard's batch alone: neither planning nor
resuming ever holds a corpus in memory.
"""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from features.corpus.manifest import Corpus
from features.errors import StoreError
from features.files import publish, temporary_path
from features.store.reader import Store

OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def write_plan(store: Store, corpus: Corpus) -> None:
    """Write the plan of every split that has none yet. Raises StoreError when the manifest changes meanwhile."""
    missing = [s for s in store.spec.splits if store.fs.get_file_info(_path(store, s)).type == pafs.FileType.NotFound]
    if not missing:
        return
    store.fs.create_dir(f"{store.path}/plan", recursive=True)
    with contextlib.ExitStack() as files:
        parts = {split: files.enter_context(_plan_file(store, split, corpus.schema)) for split in missing}
        for batch in corpus.batches():
            for split, part in parts.items():
                part.add(pa.Table.from_batches([batch.filter(pc.equal(batch.column("split"), split))]))
        for split, part in parts.items():
            part.flush()
            if part.rows != store.spec.splits[split]:
                raise StoreError(f"{corpus.uri} changed while it was read: run the same command again")


def planned_rows(store: Store, shard: str) -> pa.RecordBatch:
    """The manifest's rows that make up a shard, in their order."""
    split, number = shard.rsplit("-", 1)
    with store.fs.open_input_file(_path(store, split)) as file:
        return pa.ipc.open_file(file).get_batch(int(number))


class _Part:
    """Cuts a stream of rows into batches of one shard each."""

    def __init__(self, writer: pa.RecordBatchFileWriter, shard_rows: int) -> None:
        self.writer, self.shard_rows, self.rows = writer, shard_rows, 0
        self._waiting: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        waiting = rows if self._waiting is None else pa.concat_tables([self._waiting, rows])
        whole = len(waiting) - len(waiting) % self.shard_rows
        self._write(waiting.slice(0, whole))
        # A copy: a slice would keep every batch that it was ever part of.
        self._waiting = waiting.slice(whole).combine_chunks()

    def flush(self) -> None:
        if self._waiting is not None:
            self._write(self._waiting)

    def _write(self, rows: pa.Table) -> None:
        self.rows += len(rows)
        for first in range(0, len(rows), self.shard_rows):
            (batch,) = rows.slice(first, self.shard_rows).combine_chunks().to_batches()
            self.writer.write_batch(batch)


@contextlib.contextmanager
def _plan_file(store: Store, split: str, schema: pa.Schema) -> Iterator[_Part]:
    """A split's file, there under its name only once it is whole."""
    path = _path(store, split)
    temporary = temporary_path(store.fs, path)
    try:
        with store.fs.open_output_stream(temporary) as stream, pa.ipc.new_file(stream, schema, options=OPTIONS) as file:
            yield _Part(file, store.spec.shard_rows)
    except BaseException:
        with contextlib.suppress(OSError):
            store.fs.delete_file(temporary)
        raise
    publish(store.fs, temporary, path)


def _path(store: Store, split: str) -> str:
    return f"{store.path}/plan/{split}.arrow"
