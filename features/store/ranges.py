"""Many samples by few large requests: stretches of a shard that lie close are read as one, several at a time.

What a request costs on object storage is mostly waiting: 20 ms for a sample of 40 KB or for a hundred of them. So the
samples in between are read along where they are few, and REQUESTS are under way at once.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import pyarrow.fs as pafs

from features.store.diskcache import DiskCache
from features.store.reader import Place, Store

GAP = 1 << 20  # bytes between two samples that are read along with them rather than asked for apart
PIECE = 16 << 20  # bytes of one request, unless one sample is larger
REQUESTS = 16  # under way at once, of one reader


class Range(NamedTuple):
    """One request: `nbytes` of a shard from `offset` on, which hold the samples at `places`."""

    shard: str
    offset: int
    nbytes: int
    places: list[Place]


def ranges(places: Sequence[Place], gap: int = GAP, piece: int = PIECE) -> list[Range]:
    """The requests that read all places, by shard and offset."""
    found: list[Range] = []
    for shard, of_shard in groupby(sorted(places), key=lambda place: place[0]):
        begin = end = 0
        together: list[Place] = []
        for place in of_shard:
            _, offset, nbytes = place
            if together and (offset - end > gap or offset + nbytes - begin > piece):
                found.append(Range(shard, begin, end - begin, together))
                together = []
            if not together:
                begin = offset
            end = max(end, offset + nbytes) if together else offset + nbytes
            together.append(place)
        found.append(Range(shard, begin, end - begin, together))
    return found


class Requested:
    """Samples that were asked for; what reading one raised comes out when it is looked at."""

    def __init__(self, where: Mapping[Place, tuple["Future[bytes]", int]]) -> None:
        self.where = where

    def payload(self, place: Place) -> memoryview:
        """One sample's stretch of its tar; waits for it where it is not there yet."""
        future, begin = self.where[place]
        offset = place[1] - begin
        return memoryview(future.result())[offset : offset + place[2]]


def payload_of(place: Place, asked: Sequence[Requested]) -> memoryview:
    """A sample's bytes from the first answer that holds them."""
    return next(requested for requested in asked if place in requested.where).payload(place)


class RangeReader:
    """Reads samples ahead of their use with `requests` threads; a context, at whose end the threads do."""

    def __init__(self, store: Store, cache: DiskCache | None = None, requests: int = REQUESTS) -> None:
        self.store, self.cache = store, cache
        self._threads = ThreadPoolExecutor(requests, "ranges")

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def request(self, places: Sequence[Place]) -> Requested:
        """Begin to read samples; returns at once. What is asked for stays in memory as long as the answer does."""
        where: dict[Place, tuple[Future[bytes], int]] = {}
        for asked in ranges(places):
            future = self._threads.submit(self._read, asked)
            where.update((place, (future, asked.offset)) for place in asked.places)
        return Requested(where)

    def _read(self, asked: Range) -> bytes:
        try:
            if self.cache and (local := self.cache.path(asked.shard)) is not None:
                return _bytes(pafs.LocalFileSystem(), local, asked)
        except OSError:  # another job needed the room, or the disk is full: the storage itself is asked
            pass
        return _bytes(*self.store.tar(asked.shard), asked)


def _bytes(fs: pafs.FileSystem, path: str, asked: Range) -> bytes:
    with fs.open_input_file(path) as file:
        return file.read_at(asked.nbytes, asked.offset)
