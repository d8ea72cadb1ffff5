"""The order by windows: what storage reads well, and what shuffles almost as well as all rows together.

Shards are permuted, `window` of them make a window, and its rows are permuted. So a worker reads one window while it
uses another, by few large requests, and holds its share of two windows in memory at most. The order is a function of
(seed, epoch) and the window's size alone. Which of a batch's rows a worker takes follows the shards, so that it reads
its own part of each window; the batches of all workers together are the same for any number of them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from features.store.ranges import Requested


class Order(NamedTuple):
    """The rows in the order of use; by row the place of its shard among the permuted ones, and its window."""

    rows: np.ndarray
    place: np.ndarray
    window: np.ndarray


def windowed(shards: np.ndarray, window: int, rng: np.random.Generator | None) -> Order:
    """The order of rows (n,) by the number of their shard, 0 to the last; without rng as they lie."""
    count = int(shards.max()) + 1 if len(shards) else 0
    places = np.arange(count) if rng is None else rng.permutation(count)
    place = places[shards].astype(np.int32)
    of_row = place // window
    if count <= window * 2**16:
        of_row = of_row.astype(np.uint16)  # numpy sorts these in linear time
    if rng is None:
        return Order(np.arange(len(shards)), place, of_row)
    shuffled = rng.permutation(len(shards))
    return Order(shuffled[np.argsort(of_row[shuffled], kind="stable")], place, of_row)


def read_ahead(
    plan: Iterable[Sequence[int]], window: np.ndarray, request: Callable[[Sequence[int]], Requested]
) -> Iterator[tuple[Sequence[int], list[Requested]]]:
    """Every batch of a plan with the windows that hold its rows' bytes, asked for one window ahead.

    A window's bytes are kept until no batch needs them: two windows at once, more only where a batch spans more.
    """
    scout, found = iter(plan), defaultdict[int, list[int]](list)
    beyond, asked = -1, -1  # the window in which the last batch that the scout has seen begins; the last asked for
    open_windows: dict[int, Requested] = {}
    for batch in plan:
        windows = [int(window[row]) for row in batch if row >= 0]
        if windows:
            low, high = min(windows), max(windows)
            open_windows = {number: rows for number, rows in open_windows.items() if number >= low}
            for number in range(max(asked + 1, low), max(high, low + 1) + 1):
                while beyond <= number and (seen := next(scout, None)) is not None:
                    real = [row for row in seen if row >= 0]
                    for row in real:
                        found[int(window[row])].append(row)
                    beyond = min((int(window[row]) for row in real), default=beyond)
                open_windows[number] = request(found.pop(number, []))
                asked = number
        yield batch, list(open_windows.values())
