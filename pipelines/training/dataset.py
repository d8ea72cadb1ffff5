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
from features.store import Store
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
        table = store.index(split, wanted, fold)
        columns = dict(zip(table.column_names, table.columns, strict=True))
        del table  # what becomes an array is let go, column by column
        self.offsets, self.nbytes = (columns.pop(name).to_numpy() for name in ("offset", "nbytes"))
        self.cached = bool(self.nbytes.sum() <= cache_bytes)
        self.store = store if self.cached else Store(store.uri)  # a reading process is none of Ray's: it cannot share
        shards = columns.pop("shard").dictionary_encode().unify_dictionaries().combine_chunks()
        self.shards, self._shard_names = shards.indices.to_numpy(), shards.dictionary.to_pylist()
        seconds = columns.pop("duration").to_numpy() if "duration" in columns else None
        self.targets = {name: _encoded(declared[name], columns.pop(f"label_{name}"), seconds) for name in tasks}
        self._clip_ids = columns.pop("clip_id")
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

    def missing(self, rows: Iterable[int]) -> list[int]:
        """The rows, without padding, that are not in memory."""
        return [row for row in rows if row >= 0 and row not in self._cache]

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

    def __init__(self, task: Task, labels: pa.Array, seconds: np.ndarray) -> None:
        self.task, self.labels, self.seconds = task, labels, seconds

    def __getitem__(self, row: int) -> np.ndarray:
        return self.task.encode_events(self.labels[row].as_py(), self.seconds[row])


def _encoded(task: Task, labels: pa.ChunkedArray, seconds: np.ndarray | None) -> Any:
    """A task's targets by row: int64 class indices, -1 missing; float64 numbers, NaN missing; or `Events`."""
    if task.kind == "events":
        assert seconds is not None
        return Events(task, labels.combine_chunks(), seconds)
    if task.kind != "classification":
        return pc.cast(labels, pa.float64()).to_numpy()
    values = labels.dictionary_encode().unify_dictionaries().combine_chunks()
    known = [task.encode(value) for value in values.dictionary.to_pylist()]
    codes = np.array([MISSING_CLASS if code is None else code for code in [*known, None]], dtype=np.int64)
    return codes[pc.fill_null(values.indices, len(known)).to_numpy()]
