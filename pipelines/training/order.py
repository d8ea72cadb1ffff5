"""The order of a training split beyond a plain shuffle: even classes, and batches of clips of like length.

All of it is a function of (seed, epoch) alone, so that a run resumes exactly, on any number of workers.
"""

from collections.abc import Iterable

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
