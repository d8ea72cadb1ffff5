"""The order of a training split beyond a plain shuffle: even classes, shares of stores, batches of like length.

All of it is a function of (seed, epoch) alone, so that a run resumes exactly, on any number of workers.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from clcr.tasks import TaskSpec


def chances(index: np.ndarray) -> np.ndarray:
    """The chance of each row to be drawn, with which every class that occurs is drawn equally often: (rows,) float64.

    index: (rows,) class indices, -1 where there is no label: such rows keep the chance of a plain shuffle.
    """
    known = index >= 0
    if not known.any():
        return np.full(len(index), 1 / len(index))
    counts = np.bincount(index[known])
    even = known.sum() / (counts > 0).sum()
    return np.where(known, even / np.maximum(counts, 1)[index], 1.0) / len(index)


def shares(total: int, weights: Sequence[float] | np.ndarray) -> list[int]:
    """So many clips, shared out by weight: whole numbers, those with the largest remainders rounded up."""
    exact = total * np.asarray(weights) / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def mixed(
    stores: np.ndarray, weights: Sequence[float], shards: np.ndarray, rng: np.random.Generator, whole: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an epoch in which every store has its share of the clips, not shuffled, and the shard of each.

    stores, shards: by row, numbers. A store's rows come as many whole times as they fit into its share; the rest of it
    is sampled, by shards as a whole where `whole` (so that few are read). Returns (rows,) row numbers, and (rows,)
    shard numbers, others for each time that a shard comes. The share of a store without rows goes to the others.
    """
    drawn, times = [], []
    has_rows = np.bincount(stores, minlength=len(weights)) > 0
    for number, count in enumerate(shares(len(stores), weights * has_rows)):
        rows = np.flatnonzero(stores == number)
        if len(rows):
            place = rng.permutation(shards.max() + 1)[shards[rows]] if whole else rng.permutation(len(rows))
            order = rows[np.argsort(place, kind="stable")]
            drawn.append(np.resize(order, count))
            times.append(np.arange(count) // len(rows))
    rows, time = np.concatenate(drawn), np.concatenate(times)
    return rows, np.unique(time * (shards.max() + 1) + shards[rows], return_inverse=True)[1]


def bucketed(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, buckets: int, seed: int, epoch: int
) -> np.ndarray:
    """The same rows, so that a batch has clips of like length: less padding.

    Of every `buckets` batches the clips are sorted by length and cut into batches anew; then the batches are shuffled.
    A last batch that is not full stays as it is, and last. order, result: (rows,) row numbers; lengths: by row.
    """
    whole = len(order) // batch_size * batch_size
    head, rest = order[:whole], order[whole:]
    windows = [head[first : first + buckets * batch_size] for first in range(0, whole, buckets * batch_size)]
    batches = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows] or [head])
    batches = batches.reshape(-1, batch_size)
    return np.concatenate([np.random.default_rng((seed, epoch + 1, 1)).permutation(batches).ravel(), rest])


def count_classes(task: TaskSpec, targets: Iterable[np.ndarray] | np.ndarray) -> list[int]:
    """How many known targets each class of a task has; of events bins count. targets: as the loader holds them."""
    values = targets if isinstance(targets, np.ndarray) else np.concatenate([*targets, np.zeros(0, np.int64)])
    return np.bincount(values[values >= 0], minlength=len(task.classes)).tolist()
