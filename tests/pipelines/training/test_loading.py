"""Who reads which sample when: every one once, in an order of seed and epoch alone, for any number of workers."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from storefiles import make_clips, make_sample, make_spec, write_shard, write_store

from features.store import Store
from features.store.shards import create_store
from pipelines.common.errors import JobError
from pipelines.training.loading import LoaderConfig, Plan, SplitLoader, feature_specs, prefetch, task_specs


def loader(store, split="train", cache_gb=1.0, processes=0, modalities=(), **options):
    options = {"batch_size": 8, **options}
    config = LoaderConfig(cache_gb=cache_gb, processes=processes)
    return SplitLoader(store, split, feature_specs(store, modalities), task_specs(store), config, **options)


def ids(batches):
    return [[name for name in batch.clip_ids if name] for batch in batches]


def flat(batches):
    return [name for batch in ids(batches) for name in batch]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "batch_size"), [(29, 8), (29, 29), (29, 64), (29, 1), (32, 8), (3, 2), (1, 4)])
def test_a_plan_reads_every_row_once_in_steps_that_all_workers_share(rows, batch_size, world):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).numpy()
    plans = [Plan(order, batch_size, rank, world) for rank in range(world)]
    shapes = {tuple(map(len, plan)) for plan in plans}
    assert len(shapes) == 1 and len(plans[0]) == math.ceil(rows / batch_size) and min(shapes.pop()) >= 1
    read = [row for plan in plans for batch in plan for row in batch if row >= 0]
    assert sorted(read) == list(range(rows))
    for step in range(len(plans[0])):
        together = {row for plan in plans for row in plan[step] if row >= 0}
        assert together == set(order[step * batch_size : (step + 1) * batch_size].tolist())


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_every_sample_is_read_once_per_epoch(store, split, cache_gb):
    reader = loader(store, split, cache_gb)
    everything = store.index(split)["clip_id"].to_pylist()
    for epoch in range(2):
        read = flat(reader.batches(epoch))
        assert sorted(read) == sorted(everything)
        if split != "train":
            assert read == everything


def test_a_clip_that_another_lies_in_the_place_of_is_refused(tmp_path):
    """As when a job reads a store while extract.py tries its failed clips again: places in the shard have changed."""
    clips = [clip for number, clip in enumerate(make_clips(24)) if number % 3 == 0]  # samples of one size
    rows = [(3 * number, replace(clip, split="train")) for number, clip in enumerate(clips[:4])]
    spec = make_spec([clip for _, clip in rows])
    create_store(str(tmp_path), spec)
    write_shard(tmp_path, "train-000000", rows, spec)
    reader = loader(Store(str(tmp_path)))
    write_shard(tmp_path, "train-000000", rows[::-1], spec)
    with pytest.raises(JobError, match=r"clip .*: its place in the store holds .*: the store was extracted anew"):
        flat(reader.batches(0))


def test_the_order_is_a_function_of_seed_and_epoch_alone(store):
    orders = {(seed, epoch): flat(loader(store, seed=seed).batches(epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(map(tuple, orders.values()))) == 4
    reader = loader(store, seed=1, cache_gb=0.0, batch_size=5)
    assert flat(reader.batches(1)) == orders[1, 1]  # asked for out of turn, in other batches, uncached
    assert flat(reader.batches(0)) == orders[1, 0]


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_an_epoch_can_begin_in_its_middle(store, cache_gb):
    reader = loader(store, cache_gb=cache_gb)
    for first in range(reader.steps + 1):
        assert ids(reader.batches(2, first)) == ids(reader.batches(2))[first:]


def test_batches_are_made_ahead_of_use_and_an_error_comes_out_in_its_turn():
    made = [threading.Event() for _ in range(5)]

    def make():
        for number, event in enumerate(made):
            event.set()
            yield number
        raise OSError("the disk is gone")

    batches = prefetch(make(), 2)
    assert next(batches) == 0
    assert made[1].wait(10) and made[2].wait(10)  # while the first is used
    assert not made[4].is_set()
    assert [next(batches) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.slow
def test_reading_processes_change_nothing(store):
    alone = list(loader(store, cache_gb=0.0).batches(0))
    helped = list(loader(store, cache_gb=0.0, processes=2).batches(0))
    assert ids(alone) == ids(helped)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.features["video"].values, two.features["video"].values)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_shares_of_all_workers_make_up_the_single_workers_batches(store, world):
    single = list(loader(store).batches(3))
    shares = [list(loader(store, rank=rank, world=world).batches(3)) for rank in range(world)]
    for step, whole in enumerate(single):
        parts = [share[step] for share in shares]
        assert len({len(part) for part in parts}) == 1
        for rank, part in enumerate(parts):
            expected = whole.clip_ids[rank::world]
            assert part.clip_ids[: len(expected)] == expected and not any(part.clip_ids[len(expected) :])
            labels = whole.targets["label"][rank::world]
            assert torch.equal(part.targets["label"][: len(expected)], labels)


def test_a_padding_sample_has_no_id_no_target_and_no_modality(store):
    padded = 0
    for batch in loader(store, rank=4, world=5).batches(0):
        for row, name in enumerate(batch.clip_ids):
            if name == "":
                padded += 1
                assert batch.targets["label"][row] == -1 and batch.targets["mood"][row].isnan()
                assert not any(present[row] for present in batch.present.values())
                assert not any(f.valid[row].any() for f in batch.features.values())
    assert padded


def test_a_batch_holds_the_stored_values_and_missing_labels_stay_missing(store):
    seen = set()
    for batch in loader(store).batches(0):
        for row, name in enumerate(batch.clip_ids):
            number = int(name.split("/")[1].split(".")[0])
            written = make_sample(number).features
            for modality, features in batch.features.items():
                assert bool(batch.present[modality][row]) == (modality in written)
                if modality in written:
                    values = torch.from_numpy(written[modality])
                    assert int(features.valid[row].sum()) == len(values)
                    assert torch.equal(features.values[row, : len(values)], values)
            label, mood = batch.targets["label"][row].item(), batch.targets["mood"][row].item()
            assert label == (-1 if number % 5 == 4 else number % 2)
            assert math.isnan(mood) if number % 7 == 6 else mood == pytest.approx(number / 10)
            seen |= {label, math.isnan(mood)}
    assert seen == {-1, 0, 1}


def test_only_the_modalities_asked_for_are_given(store):
    batch = next(iter(loader(store, modalities=["audio"]).batches(0)))
    assert batch.features.keys() == batch.present.keys() == {"audio"}


def test_the_sample_for_statistics_is_the_same_on_every_worker(store):
    samples = [flat(loader(store, rank=rank, world=3).sample_batches(10)) for rank in range(3)]
    assert samples[0] == samples[1] == samples[2] and len(set(samples[0])) == 10
    assert sorted(flat(loader(store).sample_batches(10**6))) == sorted(store.index("train")["clip_id"].to_pylist())


def test_what_the_store_does_not_hold_is_refused_by_name(store, tmp_path):
    with pytest.raises(JobError, match="holds no text; it has video, audio"):
        feature_specs(store, ["video", "text"])
    with pytest.raises(JobError, match=r"--tasks lable: .* declares label, mood"):
        task_specs(store, ["lable"])
    assert list(task_specs(store, ["mood"])) == ["mood"]
    assert task_specs(store)["label"].classes == ("a", "b")
    with pytest.raises(JobError, match="split val has no sample; see its failures"):
        loader(write_store(tmp_path, make_clips(4)), "val")
