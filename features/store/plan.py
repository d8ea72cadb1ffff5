"""The plan of a store: the manifest's rows in the order of the shards.

    STORE/plan/{split}.arrow     record batch k holds the rows of shard {split}-{k}

It is written in one pass over the manifest, and each worker reads its shard's batch alone: neither planning nor
resuming ever holds a corpus in memory.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from features.corpus.manifest import Corpus
from features.errors import StoreError
from features.files import publish, temporary_path
from features.store.reader import Store

CORPUS = "corpus"  # metadata of a plan: the digest of the manifest whose rows it holds
OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


def write_plan(store: Store, corpus: Corpus) -> None:
    """Write the plan of every split that has none yet, or that of another manifest than the store's spec names.

    An earlier plan stays until the new one is whole: what has changed in a manifest is known by comparing with it.
    Raises StoreError when the manifest changes meanwhile.
    """
    missing = [split for split in store.spec.splits if _planned(store, split) != store.spec.corpus.encode()]
    if not missing:
        return
    store.fs.create_dir(f"{store.path}/plan", recursive=True)
    with contextlib.ExitStack() as files:
        schema = corpus.schema.with_metadata({CORPUS: store.spec.corpus})
        parts = {split: files.enter_context(_plan_file(store, split, schema)) for split in missing}
        for batch in corpus.batches():
            for split, part in parts.items():
                part.add(pa.Table.from_batches([batch.filter(pc.equal(batch.column("split"), split))]))
        for split, part in parts.items():
            if part.count() != store.spec.splits[split]:
                raise StoreError(f"{corpus.uri} changed while it was read: run the same command again")


def planned_rows(store: Store, shard: str) -> pa.RecordBatch:
    """The manifest's rows that make up a shard, in their order."""
    split, number = shard.rsplit("-", 1)
    with store.fs.open_input_file(_path(store, split)) as file:
        return pa.ipc.open_file(file).get_batch(int(number))


def planned_clips(store: Store, split: str) -> Iterator[dict[str, Any]]:
    """Every planned row of a split, in order; none where the plan is missing."""
    if store.fs.get_file_info(_path(store, split)).type == pafs.FileType.NotFound:
        return
    with store.fs.open_input_file(_path(store, split)) as file:
        plan = pa.ipc.open_file(file)
        for number in range(plan.num_record_batches):
            yield from plan.get_batch(number).to_pylist()


def planned_schema(store: Store) -> pa.Schema | None:
    """The manifest's columns as they were planned, None where nothing was."""
    found = (_schema(store, split) for split in store.spec.splits)
    return next((schema for schema in found if schema is not None), None)


def _planned(store: Store, split: str) -> bytes | None:
    """The digest of the manifest that a split's plan holds, None where it has no plan."""
    schema = _schema(store, split)
    return None if schema is None else (schema.metadata or {}).get(CORPUS.encode())


def _schema(store: Store, split: str) -> pa.Schema | None:
    if store.fs.get_file_info(_path(store, split)).type == pafs.FileType.NotFound:
        return None
    with store.fs.open_input_file(_path(store, split)) as file:
        return pa.ipc.open_file(file).schema


class _Part:
    """Cuts a stream of rows into batches of one shard each. sizes: rows of each shard, in order."""

    def __init__(self, writer: pa.RecordBatchFileWriter, sizes: Iterable[int]) -> None:
        self.writer, self.sizes, self.rows = writer, deque(sizes), 0
        self._waiting: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        waiting = rows if self._waiting is None else pa.concat_tables([self._waiting, rows])
        first = 0
        while self.sizes and first + self.sizes[0] <= len(waiting):
            size = self.sizes.popleft()
            (batch,) = waiting.slice(first, size).combine_chunks().to_batches()
            self.writer.write_batch(batch)
            first += size
        self.rows += first
        # A copy: a slice would keep every batch that it was ever part of.
        self._waiting = waiting.slice(first).combine_chunks()

    def count(self) -> int:
        """Rows in all, with those that fill no shard."""
        return self.rows + (0 if self._waiting is None else len(self._waiting))


@contextlib.contextmanager
def _plan_file(store: Store, split: str, schema: pa.Schema) -> Iterator[_Part]:
    """A split's file, there under its name only once it is whole."""
    path = _path(store, split)
    temporary = temporary_path(store.fs, path)
    try:
        with store.fs.open_output_stream(temporary) as stream, pa.ipc.new_file(stream, schema, options=OPTIONS) as file:
            shards = (name for name in store.spec.shards() if name.rsplit("-", 1)[0] == split)
            yield _Part(file, map(store.spec.rows_of, shards))
    except BaseException:
        with contextlib.suppress(OSError):
            store.fs.delete_file(temporary)
        raise
    publish(store.fs, temporary, path)


def _path(store: Store, split: str) -> str:
    return f"{store.path}/plan/{split}.arrow"
