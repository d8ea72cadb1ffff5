"""From a feature store to batches: who reads which sample when.

The order of a split is a function of (seed, epoch) alone; order.py and windows.py have more than a shuffle. Of every
global batch each worker takes a share, rows r::world, or by windows those that lie closest, so the number of workers
never changes what a step sees. Workers that would run short get padding samples: no clip id, no modality, no target,
hence no part in any loss or metric.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from clcr import Batch, FeatureSpec, TaskSpec
from clcr.batches import collate
from clcr.tasks import Kind
from features.store import Store
from features.store.diskcache import DiskCache
from features.store.ranges import RangeReader, Requested
from pipelines.common.errors import JobError
from pipelines.training.augmenting import augment_frames
from pipelines.training.dataset import SplitDataset
from pipelines.training.dropping import drop_modalities, parse_shares
from pipelines.training.masking import mask_features
from pipelines.training.order import bucketed, chances, count_classes, mixed
from pipelines.training.windows import Order, read_ahead, windowed

SAMPLED = 16  # samples for statistics that are read at once
AHEAD = 2  # batches that lie ready while one is computed
FRAMES = ("flip", "crop", "brightness")  # of them those of frames alone
SHARES = ("drop", "mask_time", "mask_bands", *FRAMES)  # options that give a share by modality


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
    window: int = 0
    """read and shuffle by windows of this many shards, the next one while one is used: for stores on object storage or
    larger than memory. A worker holds its share of two windows; a batch's clips come from one. 0 = any clip in any
    batch, each read by itself"""
    disk_gb: float = 0.0
    """with --loader.window: keep the shards of a remote store on each host's own disk, at most this many GB in the
    folder for temporary files, shared by its workers; 0 = none"""
    mask_time: tuple[str, ...] = ()
    """SpecAugment, `audio=.2`: in training a stretch of each clip's tokens, up to this share of them (0-1), is replaced
    by the clip's mean; sampled anew in every epoch"""
    mask_bands: tuple[str, ...] = ()
    """SpecAugment, `audio=.2`: the same of a band of a vector's dimensions, for spectra, such as the mel bands of
    sound: their mean over all dimensions means nothing where these are in unlike units"""
    flip: tuple[str, ...] = ()
    """frames, `video=.5`: the share of training clips (0-1) that are mirrored, left to right; sampled anew in every
    epoch, as the next two are"""
    crop: tuple[str, ...] = ()
    """frames, `video=.2`: in training up to this share of each side (0-1) is cut off, and the rest resized"""
    brightness: tuple[str, ...] = ()
    """frames, `video=.2`: in training values are multiplied by up to one plus or minus this (0-1)"""
    balance: str = ""
    """task whose classes are to be seen equally often in training: clips of rare classes come more than once in an
    epoch, of frequent ones not all; none = each clip once"""
    buckets: int = 0
    """batches that are sorted by length together, so that each has clips of like length and little padding; the order
    of the batches stays random. 0 = plain shuffle; 50 is usual"""

    def __post_init__(self) -> None:
        for option in SHARES:
            parse_shares(option, getattr(self, option))
        for option in ("window", "disk_gb", "buckets"):
            if not 0 <= (value := getattr(self, option)) < math.inf:
                raise JobError(f"--loader.{option.replace('_', '-')} {value}: must be 0 or more")
        if self.disk_gb and not self.window:
            raise JobError("--loader.disk-gb: shards are read whole by windows only; set --loader.window too")
        if self.window and (self.balance or self.buckets):
            option = "balance" if self.balance else "buckets"
            raise JobError(f"--loader.window and --loader.{option}: each has an order of its own; leave one out")


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


def check_names(config: LoaderConfig, store: Store, tasks: Mapping[str, TaskSpec]) -> None:
    """Raise JobError for a modality that the store lacks, or a task to balance that is not learned, in the options."""
    for option in SHARES:
        unknown = [m for m in parse_shares(option, getattr(config, option)) if m not in store.spec.features]
        if unknown:
            name = option.replace("_", "-")
            raise JobError(f"--loader.{name} {unknown[0]}: {store.uri} has {', '.join(store.spec.features)}")
    for option in FRAMES:
        for name in parse_shares(option, getattr(config, option)):
            if len(store.spec.features[name].shape) != 3:
                raise JobError(f"--loader.{option} {name}: {store.uri} holds vectors of it, and only frames have sides")
    known = [name for name, spec in tasks.items() if spec.kind == "classification"]
    if config.balance and config.balance not in known:
        rule = f"name a learned task with one class per clip: {', '.join(known) or 'none'}"
        raise JobError(f"--loader.balance {config.balance}: {rule}")
    if config.balance and store.weights:
        raise JobError(f"--loader.balance and the weights of {store.uri}: each says what an epoch has; leave one out")


def altered(batch: Batch, config: LoaderConfig, seed: int, epoch: int) -> Batch:
    """A training batch as the options change it: its frames augmented, features masked, modalities dropped."""
    shares = {option: parse_shares(option, getattr(config, option)) for option in SHARES}
    if any(shares[option] for option in FRAMES):
        batch = augment_frames(batch, shares["flip"], shares["crop"], shares["brightness"], seed, epoch)
    if shares["mask_time"] or shares["mask_bands"]:
        batch = mask_features(batch, shares["mask_time"], shares["mask_bands"], seed, epoch)
    if shares["drop"]:
        batch = drop_modalities(batch, shares["drop"], seed, epoch)
    return batch


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
        self.config = config
        self.buckets, self.chances = config.buckets if self.shuffle else 0, None
        self.weights = store.weights if self.shuffle else ()
        if self.shuffle:
            check_names(config, store, tasks)
            self.chances = chances(self.dataset.targets[config.balance]) if config.balance else None
        if self.buckets:
            tokens = store.index(split, [f"tokens_{name}" for name in features], config.fold)
            self.lengths = np.sum([column.to_numpy() for column in tokens.columns], axis=0)
        self.steps = -(-len(self.dataset) // batch_size)
        self.collate = partial(collate, features=features, tasks=tasks)
        self.stores = self.dataset.stores() if self.weights else None
        self.window = config.window
        self.processes = 0 if self.dataset.cached or self.window else config.processes
        kept = config.disk_gb and self.dataset.store.remote
        self.disk = DiskCache(self.dataset.store, config.disk_gb * 1e9) if kept else None

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This worker's share of every global batch of an epoch, in order, from batch `first` on; made ahead of use."""
        loader: Iterable[Batch]
        if self.window:
            loader = self._ahead(*self._plan_by_windows(epoch, first))
        else:
            loader = self._anywhere(self._plan(self._order(epoch), first))
        if self.shuffle:
            loader = (altered(batch, self.config, self.seed, epoch) for batch in loader)
        return prefetch(loader, 0 if self.processes else AHEAD)

    def _anywhere(self, plan: Iterable[list[int]]) -> Iterable[Batch]:
        """Each sample read by itself, by the reading processes where there are any."""
        return DataLoader(
            self.dataset,
            batch_sampler=plan,
            collate_fn=self.collate,
            num_workers=self.processes,
            multiprocessing_context=_forkserver() if self.processes else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _ahead(self, plan: "Plan", order: Order, rows: np.ndarray) -> Iterator[Batch]:
        """Windows read by threads ahead of use, or what other workers of this host have read.

        rows: the split's row at each number of the plan.
        """
        if self.dataset.store.shared:
            yield from self._anywhere(rows[numbers].tolist() for numbers in plan)
            return
        with RangeReader(self.dataset.store, self.disk) as reader:
            request = lambda numbers: self._request(reader, rows[numbers].tolist())  # noqa: E731
            for numbers, asked in read_ahead(plan, order.window, request):
                batch = self.collate(self.dataset.requested(rows[numbers].tolist(), asked))
                yield batch.pin_memory() if torch.cuda.is_available() else batch

    def _request(self, reader: RangeReader, rows: Sequence[int]) -> Requested:
        return reader.request([self.dataset.place(row) for row in self.dataset.missing(rows)])

    def sample_batches(self, clips: int) -> Iterator[Batch]:
        """A seeded sample of the split, the same on every worker: for statistics of the data."""
        rows = self._order(-1)[:clips].tolist()
        with RangeReader(self.dataset.store, requests=SAMPLED) as reader:
            for first in range(0, len(rows), self.batch_size):
                several = rows[first : first + self.batch_size]
                if self.window and not self.dataset.store.shared:
                    yield self.collate(self.dataset.requested(several, [self._request(reader, several)]))
                else:
                    yield self.collate(self.dataset.__getitems__(several))

    def numbers(self) -> dict[str, np.ndarray]:
        """All labels of the split for every numeric task: (clips,) float64, NaN where the label is missing."""
        return {
            name: np.asarray(self.dataset.targets[name], dtype=np.float64)
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
        if self.weights:
            rows, _ = self._mixed(epoch)
            order = np.random.default_rng((self.seed, epoch + 1, 2)).permutation(rows)
        elif epoch < 0 or self.chances is None:  # epoch -1: a sample for statistics
            order = self._random(epoch).permutation(len(self.dataset))
        else:
            order = self._random(epoch).choice(len(self.dataset), len(self.dataset), p=self.chances)
        if epoch < 0 or not self.buckets:
            return order
        return bucketed(order, self.lengths, self.batch_size, self.buckets, self.seed, epoch)

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch + 1))

    def _mixed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of an epoch in which each store has its share, and their shards."""
        assert self.stores is not None
        return mixed(self.stores, self.weights, self.dataset.shards, self._random(epoch), bool(self.window))

    def _plan(self, order: np.ndarray, first: int, place: np.ndarray | None = None) -> "Plan":
        return Plan(order, self.batch_size, self.rank, self.world, place, first)

    def _plan_by_windows(self, epoch: int, first: int) -> tuple["Plan", Order, np.ndarray]:
        """The plan of an epoch by windows, and the split's row at each of its numbers; padding (-1) stays so."""
        rows, shards = self._mixed(epoch) if self.weights else (np.arange(len(self.dataset)), self.dataset.shards)
        random = np.random.default_rng((self.seed, epoch + 1, 2)) if self.weights else self._random(epoch)
        order = windowed(shards, self.window, random if self.shuffle else None)
        plan = self._plan(order.rows, first, order.place if self.shuffle else None)
        return plan, order, np.append(rows, -1)


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


@dataclass(frozen=True)
class Plan:
    """Row numbers of a worker's batches, from batch `first` on; -1 stands for a padding sample.

    Every worker has as many batches, all of a length. order: the rows of all workers; place: by row, what lies close
    (a batch's rows are shared out by it), None = rows rank::world.
    """

    order: np.ndarray
    batch_size: int
    rank: int = 0
    world: int = 1
    place: np.ndarray | None = None
    first: int = 0

    def __len__(self) -> int:
        return max(0, -(-len(self.order) // self.batch_size) - self.first)

    def __getitem__(self, number: int) -> list[int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = (self.first + number) * self.batch_size
        batch = self.order[begin : begin + self.batch_size]
        most = -(-len(batch) // self.world)
        if self.place is None:
            share = batch[self.rank :: self.world].tolist()
        else:
            close = batch[np.argsort(self.place[batch], kind="stable")]
            share = close[self.rank * most : (self.rank + 1) * most].tolist()
        return share + [-1] * (most - len(share))

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))
