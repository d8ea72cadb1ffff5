"""Regularisers: a measure that tells dependence from independence, and does not depend on the number of workers."""

import pytest
import torch
from learners import on_two_workers

from clcr.config import LossConfig
from clcr.regularizers import Rows, debiased_cka, regularizers, whitened_correlation

ALL = torch.ones(64, dtype=torch.bool)


def test_whitened_correlation_hardly_tells_them_apart_at_usual_sizes():
    x, y = torch.randn(2, 64, 64)
    assert whitened_correlation(x, y, ALL) == pytest.approx(0.64, abs=0.1)
    assert whitened_correlation(x, x, ALL) == pytest.approx(0.74, abs=0.1)


@pytest.mark.parametrize("measure", [debiased_cka, whitened_correlation])
def test_gradcheck_of_the_measures(measure):
    x, y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True).unbind()
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda a, b: measure(a, b, mask), (x.detach().requires_grad_(), y.detach()))


@pytest.mark.parametrize("measure", [debiased_cka, whitened_correlation])
def test_masked_rows_count_for_nothing(measure):
    x, y = torch.randn(2, 20, 8)
    mask = torch.arange(20) < 12
    other = x.where(mask[:, None], torch.full_like(x, 1e4))
    assert torch.allclose(measure(other, y, mask), measure(x[:12], y[:12], mask[:12]), atol=1e-5)


@pytest.mark.parametrize("measure", [debiased_cka, whitened_correlation])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_too_few_or_constant_rows_give_zero_and_finite_gradients(measure, rows):
    x = torch.ones(6, 5, requires_grad=True)
    value = measure(x, torch.randn(6, 5), torch.arange(6) < rows)
    value.backward()
    assert value == 0 and x.grad.isfinite().all()
    measure(x, torch.randn(6, 5), torch.ones(6, dtype=torch.bool)).backward()
    assert x.grad.isfinite().all()


def flows(rows=12, levels=3, modalities=2, width=6):
    generator = torch.Generator().manual_seed(1)
    shared, private, own = torch.randn(3, rows, levels, modalities, width, generator=generator)
    omega = torch.randn(rows, 2, levels, generator=generator).softmax(-1)
    present = torch.rand(rows, modalities, generator=generator) > 0.2
    return Rows(shared, private, own, shared), omega, present


@pytest.mark.parametrize("correlation", ["cka", "whitened"])
def test_a_weight_of_zero_removes_a_term_and_losses_are_never_negative(correlation):
    losses = regularizers(*flows(), LossConfig(lambda_intra=0.0, lambda_inter=1.0, correlation=correlation))
    assert losses["intra"] == 0 and all(loss >= 0 for loss in losses.values())
    assert regularizers(*flows(), LossConfig(lambda_intra=0.0, lambda_inter=0.0)) == {}


def test_equal_private_flows_cost_more_than_independent_ones():
    rows, omega, present = flows(64)
    same = rows.private.clone()
    same[:, :, 1] = same[:, :, 0]
    config = LossConfig(1.0, 1.0)
    assert regularizers(rows._replace(private=same), omega, present, config)["intra"] > 0.2
    assert regularizers(rows, omega, present, config)["intra"] < 0.1


def test_mixing_moves_the_level_weights_and_not_the_summaries():
    rows, omega, present = flows()
    rows.mixed.requires_grad_(), omega.requires_grad_()
    regularizers(rows, omega, present, LossConfig(1.0, 1.0))["inter_mix"].backward()
    assert omega.grad.abs().max() > 0 and not rows.mixed.grad.any()


def test_the_aligning_term_falls_as_two_modalities_say_the_same_before_the_exchange():
    rows, omega, present = flows(64)
    own = rows.own.clone()
    own[:, :, 1] = own[:, :, 0]
    config = LossConfig(0.0, 0.0, align=1.0)
    apart, together = (regularizers(rows._replace(own=x), omega, present, config)["align"] for x in (rows.own, own))
    assert apart > 0.9 and together < 0.01


def loss_and_gradients(rows: slice):
    compared, omega, present = flows()
    inputs = [x[rows].requires_grad_() for x in (*compared[:3], omega)]
    losses = regularizers(Rows(*inputs[:3], inputs[0]), inputs[3], present[rows], LossConfig(1.0, 1.0, align=1.0))
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}, [x.grad for x in inputs]


def of_share(_, rank, world):
    losses, gradients = loss_and_gradients((slice(0, 5), slice(5, 12))[rank])  # unequal on purpose
    return losses, [g.numpy() for g in gradients]


def test_two_workers_get_the_losses_and_gradients_of_one():
    (losses_0, gradients_0), (losses_1, gradients_1) = on_two_workers(of_share, None)
    losses, gradients = loss_and_gradients(slice(0, 12))
    assert losses_0 == pytest.approx(losses, abs=1e-6) and losses_1 == pytest.approx(losses, abs=1e-6)
    for whole, first, second in zip(gradients, gradients_0, gradients_1, strict=True):
        split = torch.cat([torch.from_numpy(first), torch.from_numpy(second)]) / 2  # workers' gradients are averaged
        assert torch.allclose(split, whole, atol=1e-6)
