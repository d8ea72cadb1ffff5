"""Tasks and their losses over known targets only."""

import pytest
import torch

import clcr
from clcr.errors import ConfigError
from clcr.tasks import task_loss


def test_missing_classes_add_nothing_to_the_loss():
    spec = clcr.TaskSpec("word", "classification", ("a", "b"))
    logits = torch.randn(3, 2, requires_grad=True)
    total, count = task_loss(spec, logits, torch.tensor([0, -1, 1]))
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([0, 1]), reduction="sum")
    assert torch.allclose(total, expected) and count == 2


def test_missing_numbers_add_nothing_to_the_loss_or_its_gradient():
    logits = torch.randn(3, 1, requires_grad=True)
    total, count = task_loss(clcr.TaskSpec("mood", "regression"), logits, torch.tensor([1.0, float("nan"), 2.0]))
    total.backward()
    assert count == 2 and logits.grad.isfinite().all() and logits.grad[1] == 0


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_no_target_at_all_is_a_loss_of_zero(kind):
    spec = clcr.TaskSpec("x", kind, ("a", "b") if kind == "classification" else ())
    missing = torch.tensor([-1, -1]) if kind == "classification" else torch.full((2,), float("nan"))
    total, count = task_loss(spec, torch.randn(2, spec.outputs, requires_grad=True), missing)
    total.backward()
    assert total == 0 and count == 0


def test_one_class_is_refused():
    with pytest.raises(ConfigError, match="two classes"):
        clcr.TaskSpec("word", "classification", ("a",))
