"""The order by windows: every row once, the same batches for any number of workers and from any step, few requests."""

import math
import multiprocessing
import os
import signal
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storefiles import make_clips, write_store

from clcr import TaskSpec
from features.store import Store
from features.store.diskcache import DiskCache
from features.store.ranges import RangeReader, ranges
from pipelines.common.errors import JobError
from pipelines.training.inputs import check_shards
from pipelines.training.loading import LoaderConfig, Plan, SplitLoader, feature_specs, task_specs
from pipelines.training.windows import read_ahead, windowed

stores = st.lists(st.integers(1, 9), min_size=1, max_size=12)  # rows of each shard
RNG = np.random.default_rng


def shards_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@settings(max_examples=60, deadline=None)
@given(stores, st.integers(1, 14), st.integers(0, 5))
def test_every_row_comes_once_and_windows_one_after_another(sizes, window, seed):
    shards = shards_of(sizes)
    order = windowed(shards, window, RNG(seed))
    assert sorted(order.rows) == list(range(len(shards)))
    in_turn = order.window[order.rows]
    assert (np.diff(in_turn.astype(int)) >= 0).all()
    for number in np.unique(in_turn):
        assert len(np.unique(shards[order.window == number])) <= window
    again = windowed(shards, window, RNG(seed))
    assert all(np.array_equal(one, two) for one, two in zip(order, again, strict=True))


@settings(max_examples=60, deadline=None)
@given(stores, st.integers(1, 5), st.integers(1, 20), st.integers(1, 5))
def test_workers_share_every_batch_out_and_read_their_own_part_of_it(sizes, window, batch_size, world):
    order = windowed(shards_of(sizes), window, RNG(0))
    plans = [Plan(order.rows, batch_size, rank, world, order.place) for rank in range(world)]
    for step, shares in enumerate(zip(*plans, strict=True)):
        assert len({len(share) for share in shares}) == 1
        rows = [row for share in shares for row in share if row >= 0]
        assert sorted(rows) == sorted(order.rows[step * batch_size : (step + 1) * batch_size])
        assert (np.diff(order.place[rows]) >= 0).all()  # worker after worker, shard after shard


@settings(max_examples=60, deadline=None)
@given(stores, st.integers(1, 5), st.integers(1, 20), st.integers(1, 3), st.integers(0, 4))
def test_a_window_is_asked_for_once_and_before_the_one_ahead_of_it_is_done(sizes, window, batch_size, world, first):
    order = windowed(shards_of(sizes), window, RNG(1))
    for rank in range(world):
        plan = Plan(order.rows, batch_size, rank, world, order.place, min(first, math.ceil(sum(sizes) / batch_size)))
        asked = []
        for batch, held in read_ahead(plan, order.window, lambda rows, asked=asked: asked.append(rows) or set(rows)):
            real = [row for row in batch if row >= 0]
            assert set(real) <= set().union(*held)
            spans = order.window[real].max() - order.window[real].min() if real else 0
            assert len(held) <= 2 + spans
        assert sorted(chain.from_iterable(asked)) == sorted(row for batch in plan for row in batch if row >= 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 60), st.integers(1, 200), st.data())
def test_ranges_hold_every_place_and_no_long_gap(sizes, gap, piece, data):
    offsets = np.cumsum([0, *sizes])[:-1]
    places = [("ab"[i % 2], int(o), n) for i, (o, n) in enumerate(zip(offsets, sizes, strict=True))]
    wanted = data.draw(st.permutations(places).map(lambda some: some[: len(some) // 2 + 1]))
    found = ranges(wanted, gap, piece)
    assert sorted(place for asked in found for place in asked.places) == sorted(wanted)
    for asked in found:
        ends = [offset + nbytes for _, offset, nbytes in asked.places]
        assert asked.offset == asked.places[0][1] and asked.nbytes == max(ends) - asked.offset
        assert asked.nbytes <= piece or len(asked.places) == 1
        assert all(place[1] - end <= gap for place, end in zip(asked.places[1:], ends, strict=False))


def loader(store, split="train", cache_gb=0.0, window=2, disk_gb=0.0, **options):
    config = LoaderConfig(cache_gb=cache_gb, processes=0, window=window, disk_gb=disk_gb)
    options = {"batch_size": 5, **options}
    return SplitLoader(store, split, feature_specs(store), task_specs(store), config, **options)


def ids(batches):
    return [batch.clip_ids for batch in batches]


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_batches_by_windows_hold_what_random_access_reads_and_begin_anywhere(store, cache_gb):
    by_window = loader(store, cache_gb=cache_gb)
    whole = list(by_window.batches(1))
    everything = {name: row for batch in loader(store, window=0).batches(0) for name, row in rows_of(batch)}
    assert sorted(chain.from_iterable(ids(whole))) == sorted(everything)
    for batch in whole:
        for name, row in rows_of(batch):
            assert all(torch.equal(mine, other) for mine, other in zip(row, everything[name], strict=True))
    for first in range(by_window.steps + 1):
        assert ids(by_window.batches(1, first)) == ids(whole)[first:]
    assert ids(loader(store).batches(1)) == ids(whole) != ids(by_window.batches(2))
    assert ids(loader(store, "val").batches(0)) == ids(loader(store, "val", window=0).batches(0))
    assert ids(loader(store).sample_batches(7)) == ids(loader(store).sample_batches(7))
    assert sum(map(len, loader(store).sample_batches(7))) == 7


def rows_of(batch):
    for row, name in enumerate(batch.clip_ids):
        yield name, [f.values[row][f.valid[row]] for f in batch.features.values()] + [batch.targets["label"][row]]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_a_run_resumed_in_mid_window_on_other_workers_sees_the_same_batches(store, world):
    alone = ids(loader(store).batches(4, 2))
    shares = [ids(loader(store, rank=rank, world=world).batches(4, 2)) for rank in range(world)]
    for step, whole in enumerate(alone):
        assert sorted(name for share in shares for name in share[step] if name) == sorted(whole)


def test_windows_cost_a_request_per_shard_and_not_per_clip(store, monkeypatch):
    opened = []
    monkeypatch.setattr("features.store.ranges._bytes", lambda *of: opened.append(of[1]) or read(*of))
    list(loader(store).batches(0))
    assert sorted(opened) == sorted(set(opened)) and len(opened) == 8  # 29 clips, 4 to a shard


def read(fs, path, asked):
    with fs.open_input_file(path) as file:
        return file.read_at(asked.nbytes, asked.offset)


def test_options_that_do_not_fit_are_refused_by_name():
    with pytest.raises(JobError, match=r"--loader.disk-gb: .*--loader.window"):
        LoaderConfig(disk_gb=1.0)
    with pytest.raises(JobError, match=r"--loader.window -1"):
        LoaderConfig(window=-1)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A store whose copies lie in a folder of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return write_store(tmp_path / "store", make_clips(12), shard_rows=4)


def shard_bytes(store, shard):
    return Path(store.path, "shards", f"{shard}.tar").read_bytes()


def test_a_copy_on_disk_is_the_shard_and_what_does_not_fit_is_not_kept(remote):
    shards = [f"train-{n:06d}" for n in range(3)]
    room = sum(len(shard_bytes(remote, shard)) for shard in shards[:2]) + 10
    cache = DiskCache(remote, room)
    for shard in shards[:2]:
        assert Path(cache.path(shard)).read_bytes() == shard_bytes(remote, shard)
    assert cache.path(shards[2]) is None
    for shard in shards[:2]:
        Path(remote.path, "shards", f"{shard}.tar").unlink()
        assert Path(cache.path(shard)).exists()  # not fetched again
    places = [(shards[0], 0, 512)]
    with RangeReader(remote, cache) as reader:
        assert bytes(reader.request(places).payload(places[0])) == Path(cache.path(shards[0])).read_bytes()[:512]


def test_copies_of_another_store_make_room(remote, tmp_path):
    other = write_store(tmp_path / "other", make_clips(8), shard_rows=4)
    room = len(shard_bytes(remote, "train-000000")) + 10
    old = DiskCache(other, room)
    assert old.path("train-000000") is not None
    new = DiskCache(remote, room)
    assert new.path("train-000000") is not None and not list(old.folder.glob("*.tar"))
    assert old.path("train-000000") is not None  # fetched again: what is gone is no error


def slow_fetch(uri):
    """Fetch a shard and stop half-way, for the test to kill us there."""
    cache = DiskCache(Store(uri), 1e9)
    cache._fetch = lambda shard, temporary, size: (temporary.write_bytes(b"half"), time.sleep(600))
    cache.path("train-000000")


def test_who_is_killed_while_it_fetches_leaves_no_copy_and_no_lock(remote):
    process = multiprocessing.get_context("fork").Process(target=slow_fetch, args=(remote.uri,))
    process.start()
    cache = DiskCache(remote, 1e9)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size == 4 for path in cache.folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(cache.folder.glob("*.tar"))
    assert Path(cache.path("train-000000")).read_bytes() == shard_bytes(remote, "train-000000")
    assert not list(cache.folder.glob("*.tmp"))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_manifest_that_is_sorted_by_class_is_told_of(ordered, capsys):
    """8 classes in shards of 8 clips: one class in each shard, or about five."""
    labels = np.repeat(list("abcdefgh"), 8)
    if not ordered:
        labels = np.random.default_rng(0).permutation(labels)
    index = pa.table({"shard": np.repeat([f"train-{n:06d}" for n in range(8)], 8), "label_word": labels})
    check_shards(SimpleNamespace(tasks={"word": TaskSpec("word", "classification", tuple("abcdefgh"))}), index)
    told = "task word: a shard holds 1.0 of its 8 classes, and one of shuffled clips would hold 5.3"
    assert capsys.readouterr().out.startswith(told) == ordered
