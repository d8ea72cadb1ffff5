"""The token budget: an exact projection with exact gradients, active from the start."""

import numpy as np
import pytest
import torch

from clcr.budget import TokenBudget, project
from clcr.config import BudgetConfig


def random_cases(n, length, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(0.5, rng.choice([0.2, 1.0, 5.0], size=(n, 1)), size=(n, length))
    valid = np.arange(length) < rng.integers(1, length + 1, size=(n, 1))
    budget = rng.uniform(0, 1, size=n) * valid.sum(1)
    return a, budget, valid


def test_gradients_are_exact_in_both_arguments():
    a, budget, valid = random_cases(20, 6, seed=3)
    a, budget = (torch.from_numpy(x).requires_grad_() for x in (a, budget))
    assert torch.autograd.gradcheck(lambda x, b: project(x, b, torch.from_numpy(valid)), (a, budget))


def test_gradient_is_the_identity_minus_the_mean_over_the_interior():
    a = torch.tensor([0.9, 0.8, 0.1, 3.0], dtype=torch.float64)  # outside the budget of 2: 3.0 is full, 0.1 refused
    jacobian = torch.autograd.functional.jacobian(lambda x: project(x, torch.tensor(2.0, dtype=torch.float64)), a)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[:2, :2] = torch.eye(2) - 0.5
    assert torch.allclose(jacobian, expected)


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.0, 3.0, 5.0])
def test_ties_corners_and_an_empty_interior_give_no_nan(budget):
    a = torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-3.0, 9.0, 9.0]], requires_grad=True)
    b = torch.full((4,), budget, requires_grad=True)
    alpha = project(a, b)
    alpha.sum().backward()
    assert (alpha.sum(1) <= budget + 1e-6).all() and (alpha >= 0).all() and (alpha <= 1).all()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_no_valid_token_gives_zero_and_finite_gradients():
    a = torch.randn(2, 4, requires_grad=True)
    alpha = project(a, torch.zeros(2), torch.zeros(2, 4, dtype=torch.bool))
    alpha.sum().backward()
    assert not alpha.any() and not a.grad.any()


def test_a_budget_is_a_number_or_a_tensor_of_one_per_row():
    a = torch.randn(3, 4, 9)
    expected = project(a, torch.full((3, 4), 2.5))
    for budget in (
        2.5,
        torch.tensor(2.5),
        torch.full((4,), 2.5),
        torch.full((3, 4, 1), 2.5),
        torch.tensor(2.5).double(),
    ):
        assert torch.equal(project(a, budget), expected)
    assert torch.equal(project(a[0, 0], 2), project(a, 2)[0, 0])
    with pytest.raises(RuntimeError, match="expand"):
        project(a, torch.ones(3, 4, 9))


def test_strides_and_half_precision_change_nothing_but_the_rounding():
    a, budget, valid = (torch.from_numpy(x) for x in random_cases(20, 30))
    strided = project(a.T.contiguous().T, budget, valid.T.contiguous().T)
    assert torch.allclose(strided, project(a, budget, valid), rtol=0, atol=1e-12)
    half = a.bfloat16()
    alpha = project(half, budget, valid)
    assert alpha.dtype == torch.bfloat16
    assert torch.equal(alpha, project(half.float(), budget, valid).bfloat16())


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="negative"):
        project(torch.rand(3), torch.tensor(-1.0))


@torch.no_grad()
def test_a_steep_activation_refuses_tokens():
    budget = TokenBudget(48, 0.68, BudgetConfig(scale=4.0, threshold=-1.0))
    tokens = torch.nn.functional.layer_norm(torch.randn(200, 60, 96), (96,))[..., :48]
    out = budget(tokens, torch.ones(200, 60, dtype=torch.bool))
    assert 0 < (out.alpha == 0).float().mean() < 0.15


@pytest.mark.parametrize("k", [16, 48, 64, 128])
def test_budget_binds_at_the_start_at_any_width(k):
    budget = TokenBudget(k, 0.68, BudgetConfig())
    tokens = torch.nn.functional.layer_norm(torch.randn(200, 60, 2 * k), (2 * k,))[..., :k]
    out = budget(tokens, torch.ones(200, 60, dtype=torch.bool))
    assert out.active.float().mean() >= 0.99
    assert out.alpha.std(dim=1).mean() > 0.1
    assert (out.alpha.mean(dim=1) - 0.68).abs().max() < 1e-5


def test_budget_means_the_same_share_at_every_length():
    budget = TokenBudget(32, 0.5, BudgetConfig())
    tokens = torch.randn(2, 40, 32)
    valid = torch.arange(40) < torch.tensor([[10], [40]])
    share = budget(tokens, valid).alpha.sum(dim=1) / valid.sum(dim=1)
    assert torch.allclose(share, torch.tensor(0.5), atol=1e-5)


def test_projection_compiles_as_one_graph():
    a, budget, valid = (torch.from_numpy(x) for x in random_cases(8, 12))
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(a, budget, valid), project(a, budget, valid))
