"""From a feature store to batches: who reads which sample when.

The order of a split is a function of (seed, epoch) alone; order.py has more than a shuffle. Of every global batch,
worker r takes rows r::world, so the number of workers never changes what a step sees. Workers that would run short get
padding samples: no clip id, no modality, no target, hence no part in any loss or metric.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from clcr import Batch, FeatureSpec, TaskSpec
from clcr.batches import collate
from clcr.tasks import Kind
from features.corpus.tasks import Task
from features.store import Store
from pipelines.common.errors import JobError
from pipelines.training.dropping import drop_modalities, parse_shares
from pipelines.training.masking import mask_features
from pipelines.training.order import bucketed, chances, count_classes

AHEAD = 2  # batches that lie ready while one is computed
SHARES = ("drop", "mask_time", "mask_bands")  # options that give a share by modality
PADDING = {"clip_id": "", "features": {}, "targets": {}}


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are read."""

    cache_gb: float = 4.0
    """keep a split's samples in memory after the first epoch where they fit in this many GB; workers of one host share
    them, where Ray's object store has room"""
    processes: int = 2
    """reading processes per worker for a split that does not fit"""
    fold: int | None = None
    """cross-validation: the fold (the corpus's column) that is the test split, the next one is val, the others train;
    none = the splits of the corpus"""
    drop: tuple[str, ...] = ()
    """modality dropout, `audio=.2,video=.1`: the share of training clips (0-1), randomly sampled anew in every epoch,
    that lose a modality; a clip always keeps one"""
    mask_time: tuple[str, ...] = ()
    """SpecAugment, `audio=.2`: in training a stretch of each clip's tokens, up to this share of them (0-1), is replaced
    by the clip's mean; sampled anew in every epoch"""
    mask_bands: tuple[str, ...] = ()
    """SpecAugment, `audio=.2`: the same of a band of a vector's dimensions, such as the mel bands of sound"""
    balance: str = ""
    """task whose classes are to be seen equally often in training: clips of rare classes come more than once in an
    epoch, of frequent ones not all; none = each clip once"""
    buckets: int = 0
    """batches that are sorted by length together, so that each has clips of like length and little padding; the order
    of the batches stays random. 0 = plain shuffle; 50 is usual"""

    def __post_init__(self) -> None:
        for option in SHARES:
            parse_shares(option, getattr(self, option))
        if self.buckets < 0:
            raise JobError(f"--loader.buckets {self.buckets}: must be 0 or more")


def feature_specs(store: Store, modalities: Sequence[str] = ()) -> dict[str, FeatureSpec]:
    """The model's view of a store's features; all of them where none is named."""
    wanted = modalities or store.spec.features
    if missing := [m for m in wanted if m not in store.spec.features]:
        raise JobError(f"{store.uri} holds no {', '.join(missing)}; it has {', '.join(store.spec.features)}")
    return {m: FeatureSpec(f.shape, f.rate, f.dtype) for m, f in store.spec.features.items() if m in wanted}


Item = TypeVar("Item")


def task_specs(store: Store, names: Sequence[str] = ()) -> dict[str, TaskSpec]:
    """The tasks named, or all that the store declares. Raises JobError for one that the store does not hold."""
    declared = {task.name: task for task in store.spec.tasks}
    if unknown := [name for name in names if name not in declared]:
        raise JobError(f"--tasks {','.join(unknown)}: {store.uri} declares {', '.join(declared) or 'no task'}")
    if not declared:
        raise JobError(f"{store.uri} declares no task: extract it with --tasks")
    return {
        name: TaskSpec(t.name, cast(Kind, t.kind), t.classes, t.rate)
        for name, t in declared.items()
        if not names or name in names
    }


class SplitLoader:
    """Batches of one split for one worker of `world`.

    features: modalities to read; tasks: targets to give. Raises JobError when the split has no sample.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        features: Mapping[str, FeatureSpec],
        tasks: Mapping[str, TaskSpec],
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.dataset = SplitDataset(store, split, features, tasks, config.cache_gb * 1e9, config.fold)
        if not len(self.dataset):
            raise JobError(f"{store.uri}: split {split} has no sample; see its failures")
        self.tasks = dict(tasks)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.shuffle = split == "train"
        shares = {option: parse_shares(option, getattr(config, option)) if self.shuffle else {} for option in SHARES}
        for option, by_modality in shares.items():
            if unknown := [m for m in by_modality if m not in store.spec.features]:
                name = option.replace("_", "-")
                raise JobError(f"--loader.{name} {unknown[0]}: {store.uri} has {', '.join(store.spec.features)}")
        self.drop, self.times, self.bands = shares.values()
        self.buckets, self.chances = (config.buckets, self._chances(config.balance)) if self.shuffle else (0, None)
        if self.buckets:
            tokens = store.index(split, [f"tokens_{name}" for name in features], config.fold)
            self.lengths = np.sum([column.to_numpy() for column in tokens.columns], axis=0)
        self.steps = -(-len(self.dataset) // batch_size)
        self.collate = partial(collate, features=features, tasks=tasks)
        self.processes = 0 if self.dataset.cached else config.processes

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This worker's share of every global batch of an epoch, in order, from batch `first` on; made ahead of use."""
        plan = plan_epoch(len(self.dataset), self.batch_size, self.rank, self.world, self._order(epoch))
        loader: Iterable[Batch] = DataLoader(
            self.dataset,
            batch_sampler=plan[first:],
            collate_fn=self.collate,
            num_workers=self.processes,
            multiprocessing_context=_forkserver() if self.processes else None,
            pin_memory=torch.cuda.is_available(),
        )
        if self.times or self.bands:
            loader = (mask_features(batch, self.times, self.bands, self.seed, epoch) for batch in loader)
        if self.drop:
            loader = (drop_modalities(batch, self.drop, self.seed, epoch) for batch in loader)
        return prefetch(loader, 0 if self.processes else AHEAD)

    def sample_batches(self, clips: int) -> Iterator[Batch]:
        """A seeded sample of the split, the same on every worker: for statistics of the data."""
        rows = self._order(-1)[:clips].tolist()
        for first in range(0, len(rows), self.batch_size):
            yield self.collate(self.dataset.__getitems__(rows[first : first + self.batch_size]))

    def numbers(self) -> dict[str, np.ndarray]:
        """All labels of the split for every numeric task: (clips,) float64, NaN where the label is missing."""
        return {
            name: np.array(self.dataset.targets[name], dtype=np.float64)
            for name, task in self.tasks.items()
            if not task.has_classes
        }

    def class_counts(self) -> dict[str, list[int]]:
        """How many known targets of the split each class has, for every task with classes."""
        return {
            name: count_classes(task, self.dataset.targets[name])
            for name, task in self.tasks.items()
            if task.has_classes
        }

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        rows, rng = len(self.dataset), np.random.default_rng((self.seed, epoch + 1))
        if epoch < 0:  # a sample for statistics
            return rng.permutation(rows)
        order = rng.permutation(rows) if self.chances is None else rng.choice(rows, rows, p=self.chances)
        if not self.buckets:
            return order
        return bucketed(order, self.lengths, self.batch_size, self.buckets, self.seed, epoch)

    def _chances(self, task: str) -> np.ndarray | None:
        """The chance of each clip to be drawn, None where each comes once."""
        if not task:
            return None
        if task not in self.tasks or self.tasks[task].kind != "classification":
            known = [name for name, spec in self.tasks.items() if spec.kind == "classification"]
            raise JobError(
                f"--loader.balance {task}: name a learned task with one class per clip: {', '.join(known) or 'none'}"
            )
        return chances(self.dataset.targets[task])


def prefetch(batches: Iterable[Item], count: int) -> Iterator[Item]:
    """The same batches, `count` of them made by a thread before they are asked for; what making one raises comes out
    in its turn."""
    source: Iterator[Any] = iter(batches)
    end: Any = object()
    if not count:
        yield from source
        return
    with ThreadPoolExecutor(1, "batches") as thread:
        ready = deque(thread.submit(next, source, end) for _ in range(count))
        while (batch := ready.popleft().result()) is not end:
            ready.append(thread.submit(next, source, end))
            yield batch


def _forkserver() -> BaseContext:
    """Reading processes that start in milliseconds at every epoch: their imports are made once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pipelines.training.loading"])
    return context


def plan_epoch(rows: int, batch_size: int, rank: int, world: int, order: np.ndarray) -> list[list[int]]:
    """Row numbers of a worker's batches; -1 stands for a padding sample. Every worker has as many, all of a length."""
    plan = []
    for first in range(0, rows, batch_size):
        batch = order[first : first + batch_size]
        share = batch[rank::world].tolist()
        plan.append(share + [-1] * (-(-len(batch) // world) - len(share)))
    return plan


class SplitDataset(Dataset):
    """A split's samples by row number, in the index's order; `clcr.batches.collate` takes them."""

    def __init__(
        self,
        store: Store,
        split: str,
        features: Mapping[str, FeatureSpec],
        tasks: Mapping[str, TaskSpec],
        cache_bytes: float,
        fold: int | None = None,
    ) -> None:
        columns = ["clip_id", "shard", "offset", "nbytes", "duration", *(f"label_{name}" for name in tasks)]
        self.modalities = tuple(features)
        self.index = store.index(split, columns, fold)
        self.targets = _encode_targets(self.index, tasks, store.spec.tasks)
        self.cached = pa.compute.sum(self.index["nbytes"]).as_py() <= cache_bytes if len(self.index) else True
        self.store = store if self.cached else Store(store.uri)  # a reading process is none of Ray's: it cannot share
        self._clip_ids = self.index["clip_id"].to_pylist()
        self._places = list(zip(*(self.index[name].to_pylist() for name in ("shard", "offset", "nbytes")), strict=True))
        self._cache: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """A batch's samples, which DataLoader asks for at once."""
        new = [row for row in rows if row >= 0 and row not in self._cache]
        stored = self.store.read_many([self._places[row] for row in new]) if new else []
        read = {row: self._sample(row, found) for row, found in zip(new, stored, strict=True)}
        if self.cached:
            self._cache |= read
        return [PADDING if row < 0 else read.get(row) or self._cache[row] for row in rows]

    def _sample(self, row: int, stored: Mapping[str, Any]) -> dict[str, Any]:
        targets = {name: values[row] for name, values in self.targets.items()}
        return sample(self._clip_ids[row], stored, self.modalities, targets)


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


def _encode_targets(index: pa.Table, tasks: Mapping[str, TaskSpec], declared: Sequence[Task]) -> dict[str, list]:
    """Class indices or numbers by task, None where the label is missing; of events the class indices of all bins."""
    by_name, seconds = {task.name: task for task in declared}, index["duration"].to_pylist()

    def encode(task: Task) -> list:
        labels = index[f"label_{task.name}"].to_pylist()
        if task.kind == "events":
            return list(map(task.encode_events, labels, seconds))
        return list(map(task.encode, labels))

    return {name: encode(by_name[name]) for name in tasks}
