"""Samples in memory once per host: workers on the same host see one copy of them, in Ray's shared memory."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.compute as pc
import ray
import ray.train
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from features.store import Store
from features.store.reader import Place

SHARE = 0.5  # of a host's shared memory that samples may take: what workers send each other goes through it too
READERS = 16  # samples that are read at once; on object storage each is a request


def open_store(uri: str) -> Store:
    """The store, for a worker of Ray Train: shared with its host's other workers where there are any and it fits."""
    store = Store(uri)
    return SharedStore(uri) if ray.train.get_context().get_local_world_size() > 1 and fits(store) else store


def fits(store: Store) -> bool:
    """Whether this host's shared memory has room for every sample of a store."""
    here = ray.get_runtime_context().get_node_id()
    room = next(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["NodeID"] == here)
    return (pc.sum(store.index(columns=["nbytes"])["nbytes"]).as_py() or 0) <= SHARE * room


class SharedStore(Store):
    """A store whose samples come from the host's cache, as arrays that lie in shared memory and cannot be written to.

    It reads for itself where the cache died or found no room.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        here = ray.get_runtime_context().get_node_id()
        self.cache = HostCache.options(
            name=f"samples on {here} of {self.spec.fingerprint}",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        ).remote(uri)

    def read_many(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """As `Store.read_many`."""
        try:
            return ray.get(ray.get(self.cache.samples.remote(places)))
        except RayError:
            return super().read_many(places)


@ray.remote(num_cpus=0)
class HostCache:
    """Every sample that some worker of this host has asked for, read once. Ends with the worker that started it."""

    def __init__(self, uri: str) -> None:
        self.uri, self.own = uri, threading.local()  # of each reader: a store opens and closes files as it reads
        self.readers = ThreadPoolExecutor(READERS, initializer=self._open)
        self.held: dict[Place, ray.ObjectRef] = {}

    def samples(self, places: Sequence[Place]) -> list[ray.ObjectRef]:
        """Where the samples lie in shared memory."""
        new = [place for place in places if place not in self.held]
        for place, sample in zip(new, self.readers.map(self._read, new), strict=True):
            self.held[place] = ray.put(sample)
        return [self.held[place] for place in places]

    def _open(self) -> None:
        self.own.store = Store(self.uri)

    def _read(self, place: Place) -> dict[str, Any]:
        return self.own.store.read(*place)
