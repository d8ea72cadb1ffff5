"""Workers of one host share one copy of the samples; without the cache each reads for itself."""

import shutil
from functools import partial

import pytest
import ray
import torch
from storefiles import make_clips, write_mixture, write_store

from features.store import Store, open_store
from pipelines.training.hostcache import SharedStore, fits
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs

pytestmark = pytest.mark.slow
ROWS = 29


@pytest.fixture
def uri(tmp_path):
    return write_store(tmp_path / "store", make_clips(ROWS)).uri


def epoch(store, world=1, rank=0):
    config = LoaderConfig(cache_gb=1.0)
    reader = SplitLoader(
        store, "train", feature_specs(store), task_specs(store), config, batch_size=8, world=world, rank=rank
    )
    return list(reader.batches(0))


def assert_same(batches, expected):
    for one, two in zip(batches, expected, strict=True):
        assert one.clip_ids == two.clip_ids
        for m, features in one.features.items():
            assert torch.equal(features.values, two.features[m].values), m


def test_what_one_worker_has_read_the_others_of_its_host_have(shared_ray, uri):
    expected = [epoch(Store(uri), 2, rank) for rank in range(2)]
    first, second = SharedStore(uri, "run"), SharedStore(uri, "run")
    assert_same(epoch(first, 2, 0), expected[0])
    assert_same(epoch(first, 2, 1), expected[1])
    shutil.rmtree(f"{uri}/shards")
    assert_same(epoch(second, 2, 0), expected[0])  # there is nothing left to read from
    (sample,) = second.read_many([first_place(second)])
    assert not any(array.flags.writeable or array.flags.owndata for name, array in sample.items() if name != "json")


def test_a_mixture_of_stores_is_shared_store_by_store(shared_ray, tmp_path):
    uri = write_mixture(tmp_path)
    shared = open_store(uri, partial(SharedStore, run="mixed"))
    assert shared.shared and not open_store(uri).shared
    assert_same(epoch(shared), epoch(open_store(uri)))
    shutil.rmtree(tmp_path / "few" / "shards")
    assert_same(epoch(open_store(uri, partial(SharedStore, run="mixed"))), epoch(shared))


def test_without_the_cache_each_reads_for_itself(shared_ray, uri):
    shared, other, expected = SharedStore(uri, "run"), SharedStore(uri, "another"), epoch(Store(uri))
    ray.kill(shared.directory)
    for _ in range(2):  # from its second batch on it shares again
        assert_same(epoch(shared), expected)
    shutil.rmtree(f"{uri}/shards")
    assert_same(epoch(SharedStore(uri, "run")), expected)
    with pytest.raises(FileNotFoundError):
        epoch(other)


def test_a_store_is_shared_where_it_fits_in_shared_memory(shared_ray, uri, monkeypatch):
    assert fits(Store(uri))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": here(), "Resources": {"object_store_memory": 1e3}}])
    assert not fits(Store(uri))


def first_place(store):
    row = store.index("train").slice(0, 1).to_pylist()[0]
    return row["shard"], row["offset"], row["nbytes"]


def here():
    return ray.get_runtime_context().get_node_id()
