"""Samples in memory once per host: workers of one run on the same host see one copy of them, in Ray's shared memory."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from features.files import list_files
from features.store import Store, open_store
from features.store.reader import Place

SHARE = 0.5  # of a host's shared memory that samples may take: what workers send each other goes through it too


def open_on_host(uri: str) -> Store:
    """The store, for a worker of Ray Train: shared with its host's other workers where there are any and it fits."""
    import ray.train  # seconds, of which the directory's own process has no use

    store, context = open_store(uri), ray.train.get_context()
    shared = context.get_local_world_size() > 1 and fits(store)
    return open_store(uri, partial(SharedStore, run=context.get_experiment_name())) if shared else store


def fits(store: Store) -> bool:
    """Whether this host's shared memory has room for every sample of a store."""
    here = ray.get_runtime_context().get_node_id()
    room = next(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["NodeID"] == here)
    tars = [tar for each in store.members for tar in list_files(each.fs, f"{each.path}/shards")]
    return sum(tar.size for tar in tars) <= SHARE * room


class SharedStore(Store):
    """A store whose samples are arrays in shared memory, not to be written to: whoever needs one first reads it.

    run: what the workers that share have in common. A worker reads for itself where sharing fails.
    """

    shared = True

    def __init__(self, uri: str, run: str) -> None:
        super().__init__(uri)
        self.name = f"samples of {run} on {ray.get_runtime_context().get_node_id()}: {self.spec.fingerprint}"
        self.directory = self._find()

    def read_many(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """As `Store.read_many`."""
        try:
            known: Any = ray.get(self.directory.find.remote(places))
            new = [place for place in places if place not in known]
            own = {place: ray.put(sample) for place, sample in zip(new, super().read_many(new), strict=True)}
            if own:
                self.directory.add.remote(own)
            where = known | own
            return ray.get([where[place] for place in places])
        except RayError:  # who had read one of them, or had started the directory, is dead; or memory is full
            self.directory = self._find()
            return super().read_many(places)

    def _find(self) -> ray.actor.ActorHandle:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = SampleDirectory
        return actor.options(name=self.name, get_if_exists=True, scheduling_strategy=here).remote()


@ray.remote(num_cpus=0)
class SampleDirectory:
    """Where in shared memory the samples lie that some worker of this host has read."""

    def __init__(self) -> None:
        self.samples: dict[Place, ray.ObjectRef] = {}

    def find(self, places: Sequence[Place]) -> dict[Place, ray.ObjectRef]:
        """Those of them that are there."""
        return {place: self.samples[place] for place in places if place in self.samples}

    def add(self, samples: Mapping[Place, ray.ObjectRef]) -> None:
        """Of two workers that read the same sample, the first one's stays."""
        for place, sample in samples.items():
            self.samples.setdefault(place, sample)
