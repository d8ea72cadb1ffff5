"""Class weights, label smoothing and the focal loss: cross-entropy where they are off, and what they say where on."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clcr.class_loss import ClassLossConfig, balanced_weights, class_loss
from clcr.errors import ConfigError
from clcr.tasks import TaskSpec

TASK = TaskSpec("t", "classification", ("a", "b", "c"))
EVENTS = TaskSpec("e", "events", ("none", "x"), rate=1.0)


def example(seed=0, rows=12, classes=3):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(-1, classes, (rows,), generator=generator)
    return torch.randn(rows, classes, generator=generator), target


def test_nothing_asked_for_is_the_plain_loss_itself():
    assert class_loss(ClassLossConfig(), lambda: {"t": [1, 2, 3]}) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any))
def test_balanced_weights_give_every_class_the_same_total_and_targets_a_mean_of_one(counts):
    weights, number = balanced_weights(counts), torch.tensor(counts, dtype=torch.float32)
    totals = (weights * number)[number > 0]
    torch.testing.assert_close(totals, totals[:1].expand_as(totals))
    torch.testing.assert_close((weights * number).sum(), number.sum())
    assert (weights[number == 0] == 1).all()


def test_weights_and_smoothing_are_torchs_own_and_missing_targets_count_for_nothing():
    logits, target = example()
    weights = balanced_weights([5, 2, 9])
    each = class_loss(ClassLossConfig(weights="balanced"), lambda: {"t": [5, 2, 9]})(TASK, logits, target)
    torch.testing.assert_close(each, F.cross_entropy(logits, target, weights, ignore_index=-1, reduction="none"))
    assert (each[target < 0] == 0).all()
    smoothed = class_loss(ClassLossConfig(smoothing=0.2), lambda: {})(TASK, logits, target)
    torch.testing.assert_close(
        smoothed, F.cross_entropy(logits, target, ignore_index=-1, reduction="none", label_smoothing=0.2)
    )


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_the_focal_loss_never_exceeds_cross_entropy_and_vanishes_where_the_answer_is_right(seed, focal):
    logits, target = example(seed)
    loss = class_loss(ClassLossConfig(focal=focal), lambda: {})
    known = target >= 0
    each = loss(TASK, logits, target)
    plain = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
    assert (each <= plain + 1e-6).all() and (each[~known] == 0).all()
    sure = logits.new_full((1, 3), -50.0).index_fill(1, torch.tensor([1]), 50.0).requires_grad_()
    value = loss(TASK, sure, torch.tensor([1])).sum()
    value.backward()
    assert value < 1e-3 and sure.grad.isfinite().all()


def test_events_are_weighed_by_bins():
    loss = class_loss(ClassLossConfig(weights="balanced"), lambda: {"e": [3, 1]})
    logits, target = torch.randn(2, 4, 2), torch.tensor([[0, 0, 1, -1], [0, -1, -1, -1]])
    each = loss(EVENTS, logits, target)
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), balanced_weights([3, 1]), ignore_index=-1, reduction="none"
    )
    assert each.shape == target.shape
    torch.testing.assert_close(each.flatten(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": "some"}, "weights some"), ({"smoothing": 1.0}, "smoothing 1.0"), ({"focal": -1.0}, "focal -1.0")],
)
def test_what_is_no_class_loss_is_named(options, message):
    with pytest.raises(ConfigError, match=f"--classes.{message}"):
        ClassLossConfig(**options)
