"""A split's samples by row number: where each lies and what its targets are, in arrays; no Python object per row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from clcr import FeatureSpec, TaskSpec
from clcr.tasks import MISSING_CLASS
from features.corpus.tasks import Task
from features.store import Store, open_store
from features.store.mixture import number_of
from features.store.ranges import Requested, payload_of
from features.store.reader import Place
from features.store.samples import unpack
from pipelines.common.errors import JobError

PADDING = {"clip_id": "", "features": {}, "targets": {}}


class SplitDataset(Dataset):
    """A split's samples by row number, in the index's order; `clcr.batches.collate` takes them.

    shards: (rows,) the number of each row's shard. Some fifty bytes per row and its clip id stay in memory.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        features: Mapping[str, FeatureSpec],
        tasks: Mapping[str, TaskSpec],
        cache_bytes: float,
        fold: int | None = None,
    ) -> None:
        declared = {task.name: task for task in store.spec.tasks}
        wanted = ["clip_id", "shard", "offset", "nbytes", *(f"label_{name}" for name in tasks)]
        wanted += ["duration"] * any(declared[name].kind == "events" for name in tasks)
        self.modalities = tuple(features)
        self._shard_names: list[str] = []
        pieces = [self._arrays(table, tasks, declared) for table in store.index_tables(split, wanted, fold)]
        columns = {name: _joined([piece.pop(name) for piece in pieces]) for name in wanted}
        self.offsets, self.nbytes, self.shards = (columns.pop(name) for name in ("offset", "nbytes", "shard"))
        self._clip_ids, seconds = columns.pop("clip_id"), columns.pop("duration", None)
        self.targets = {name: columns[f"label_{name}"] for name in tasks}
        self.targets |= {
            name: Events(declared[name], labels, seconds)
            for name, labels in self.targets.items()
            if declared[name].kind == "events"
        }
        self.cached = bool(self.nbytes.sum() <= cache_bytes)
        # A reading process is none of Ray's: it cannot share.
        self.store = store if self.cached else open_store(store.uri)
        self._cache: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """A batch's samples, which DataLoader asks for at once."""
        return self._samples(rows, lambda new: self.store.read_many([self.place(row) for row in new]))

    def requested(self, rows: Sequence[int], asked: Sequence[Requested]) -> list[dict[str, Any]]:
        """The same of samples whose bytes were asked for before."""
        return self._samples(rows, lambda new: [unpack(payload_of(self.place(row), asked)) for row in new])

    def place(self, row: int) -> Place:
        """Where in the store a row lies."""
        return self._shard_names[self.shards[row]], int(self.offsets[row]), int(self.nbytes[row])

    def stores(self) -> np.ndarray:
        """Which store of a mixture each row is in, by number: (rows,)."""
        return np.array([number_of(name) for name in self._shard_names], dtype=np.int64)[self.shards]

    def missing(self, rows: Iterable[int]) -> list[int]:
        """The rows, without padding, that are not in memory."""
        return [row for row in rows if row >= 0 and row not in self._cache]

    def _arrays(self, table: pa.Table, tasks: Iterable[str], declared: Mapping[str, Task]) -> dict[str, Any]:
        """Some rows of the index by column: arrays, and Arrow's own of what is looked at by row alone."""
        columns: dict[str, Any] = dict(zip(table.column_names, table.columns, strict=True))
        shards = columns["shard"].combine_chunks().dictionary_encode()
        found = {"clip_id": columns["clip_id"], "shard": shards.indices.to_numpy() + np.int32(len(self._shard_names))}
        self._shard_names += shards.dictionary.to_pylist()
        found |= {name: columns[name].to_numpy() for name in ("offset", "nbytes", "duration") if name in columns}
        return found | {f"label_{name}": _encoded(declared[name], columns[f"label_{name}"]) for name in tasks}

    def _samples(self, rows: Sequence[int], read: Callable[[list[int]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        new = self.missing(rows)
        found = {row: self._sample(row, stored) for row, stored in zip(new, read(new) if new else [], strict=True)}
        if self.cached:
            self._cache |= found
        return [PADDING if row < 0 else found.get(row) or self._cache[row] for row in rows]

    def _sample(self, row: int, stored: Mapping[str, Any]) -> dict[str, Any]:
        targets = {name: values[row] for name, values in self.targets.items()}
        return sample(self._clip_ids[row].as_py(), stored, self.modalities, targets)


def sample(
    clip_id: str, stored: Mapping[str, Any], modalities: Iterable[str], targets: Mapping[str, Any]
) -> dict[str, Any]:
    """What `clcr.batches.collate` takes of a clip. Raises JobError where another clip lay at its place."""
    if stored["json"]["clip_id"] != clip_id:
        raise JobError(
            f"clip {clip_id}: its place in the store holds {stored['json']['clip_id']}: the store was extracted anew "
            "while this job read it; run the job again"
        )
    return {"clip_id": clip_id, "features": {m: stored[m] for m in modalities if m in stored}, "targets": targets}


class Events:
    """Class indices of all bins by row, made when they are looked at."""

    def __init__(self, task: Task, labels: pa.ChunkedArray, seconds: np.ndarray) -> None:
        self.task, self.labels, self.seconds = task, labels, seconds

    def __getitem__(self, row: int) -> np.ndarray:
        return self.task.encode_events(self.labels[row].as_py(), self.seconds[row])


def _joined(pieces: list[Any]) -> Any:
    """Arrays in one; Arrow's columns stay in their pieces."""
    if isinstance(pieces[0], pa.ChunkedArray):
        return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], pieces[0].type)
    return np.concatenate(pieces)


def _encoded(task: Task, labels: pa.ChunkedArray) -> Any:
    """A task's targets by row: int64 class indices, -1 missing; float64 numbers, NaN missing; events as they are."""
    if task.kind == "events":
        return labels
    if task.kind != "classification":
        return pc.cast(labels, pa.float64()).to_numpy()
    values = labels.combine_chunks().dictionary_encode()
    known = [task.encode(value) for value in values.dictionary.to_pylist()]
    codes = np.array([MISSING_CLASS if code is None else code for code in [*known, None]], dtype=np.int64)
    return codes[pc.fill_null(values.indices, len(known)).to_numpy()]
