"""Even classes and batches of like length: functions of (seed, epoch), the same on any number of workers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import losses, recipe, run

from clcr.class_loss import ClassLossConfig
from clcr.tasks import TaskSpec
from pipelines.common.errors import JobError
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs
from pipelines.training.order import bucketed, chances, count_classes


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=60))
def test_every_class_that_occurs_has_the_same_chance_and_rows_without_label_keep_theirs(classes):
    chance, rows = chances(np.array([-1 if c is None else c for c in classes])), len(classes)
    assert chance.sum() == pytest.approx(1)
    by_class = {c: sum(p for p, k in zip(chance, classes, strict=True) if k == c) for c in set(classes) - {None}}
    assert all(total == pytest.approx(max(by_class.values())) for total in by_class.values())
    assert all(p == pytest.approx(1 / rows) for p, k in zip(chance, classes, strict=True) if k is None)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_bucketing_keeps_every_row_once_and_pads_no_more_than_before(rows, size, buckets, epoch):
    rng = np.random.default_rng(rows)
    order, lengths = rng.permutation(rows), rng.integers(1, 3000, rows)
    result = bucketed(order, lengths, size, buckets, 0, epoch)
    assert sorted(result) == list(range(rows))
    assert (result == bucketed(order, lengths, size, buckets, 0, epoch)).all()
    whole = rows // size * size
    assert (result[whole:] == order[whole:]).all(), "what is left over stays the last, short batch"

    def padded(of):
        return sum(lengths[of[first : first + size]].max() * size for first in range(0, whole, size))

    assert padded(result) <= padded(order)


def test_the_order_of_the_batches_differs_by_epoch_and_seed():
    order, lengths = np.arange(400), np.arange(400)
    orders = [bucketed(order, lengths, 4, 100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not any((a == b).all() for a, b in zip(orders, orders[1:] + orders[:1], strict=True))


def test_classes_are_counted_by_clip_or_by_bin():
    task = TaskSpec("t", "classification", ("a", "b", "c"))
    assert count_classes(task, np.array([0, 2, -1, 2])) == [1, 0, 2] and count_classes(task, np.array([-1])) == [
        0,
        0,
        0,
    ]
    assert count_classes(task, [np.array([0, 1, -1]), np.array([1])]) == [1, 2, 0]


def loader(store, config, world=1, rank=0, split="train"):
    return SplitLoader(
        store, split, feature_specs(store), task_specs(store), config, batch_size=8, seed=3, rank=rank, world=world
    )


@pytest.mark.parametrize("config", [LoaderConfig(balance="label"), LoaderConfig(buckets=2)])
def test_workers_share_the_batches_that_one_would_see_and_resume_in_mid_epoch(config, store):
    def ids(batches):
        return [batch.clip_ids for batch in batches]

    alone = ids(loader(store, config).batches(2))
    first, second = (ids(loader(store, config, 2, rank).batches(2)) for rank in (0, 1))
    shared = [[c for c in (*a, *b) if c] for a, b in zip(first, second, strict=True)]
    assert [sorted(batch) for batch in shared] == [sorted(batch) for batch in alone]
    assert (
        ids(loader(store, config).batches(2, first=2)) == alone[2:] and ids(loader(store, config).batches(1)) != alone
    )
    plain = ids(loader(store, LoaderConfig(), split="val").batches(0))
    assert ids(loader(store, config, split="val").batches(0)) == plain, "validation is as it was"


def test_a_task_that_cannot_be_balanced_is_named(store):
    for task in ("mood", "other"):
        with pytest.raises(JobError, match=f"--loader.balance {task}: name a learned task .*: label"):
            loader(store, LoaderConfig(balance=task))


def test_a_recipe_with_all_of_it_learns_and_is_another_training(store):
    plain = recipe(epochs=1)
    changed = replace(
        plain,
        loader=LoaderConfig(balance="label", buckets=2),
        classes=ClassLossConfig(smoothing=0.1, focal=2.0),
    )
    first, second = (losses(run(Learner(store.uri, each)))[0] for each in (plain, changed))
    assert first["train/loss_label"] != second["train/loss_label"] and np.isfinite(second["val/score"])


@pytest.mark.parametrize("other", [{"balance": "label"}, {"buckets": 50}])
def test_an_order_by_windows_is_refused_beside_another(other):
    with pytest.raises(JobError, match=f"--loader.window and --loader.{next(iter(other))}: .*leave one out"):
        LoaderConfig(window=4, **other)
