"""Token budget: which tokens take part in the exchange, and how much (CLCR, sec. IntraCED).

    a~_t  = sigmoid(scale * (e_t - threshold)),      e_t the evidence: the token's size in the shared subspace
    alpha = Proj_Delta(a~),      Delta = { a : 0 <= a_t <= 1, sum_t a_t <= budget }
    budget = gamma * sigmoid(rho) * (number of valid tokens)

Exact Euclidean projection: alpha_t = clip(a~_t - tau, 0, 1) with tau = 0 if that fits, else the tau at which the sum
equals the budget. On the interior I = {0 < alpha < 1} of an active budget d alpha / d a~ is the identity minus the
mean over I, and d alpha / d budget = 1 / |I|.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Admission(NamedTuple):
    """alpha: (B, T) weight of every token; participation: (B,) sum(alpha) / valid tokens; active: (B,) bool."""

    alpha: Tensor
    participation: Tensor
    active: Tensor


def project(activation: Tensor, budget: Tensor, valid: Tensor | None = None) -> Tensor:
    """Project onto the truncated simplex {a : 0 <= a <= 1, sum(a) <= budget} (CLCR, sec. IntraCED).

    activation: (..., T) any real; budget: (...,) tokens; valid: (..., T) bool, padding is 0 in the result.
    Exact gradient in both arguments. Raises ValueError if budget is negative.
    """
    if not torch.compiler.is_compiling() and bool((budget < 0).any()):
        raise ValueError(f"the budget is negative ({budget.min().item():g}): no vector of weights fits it")
    valid = torch.ones_like(activation, dtype=torch.bool) if valid is None else valid
    budget = budget[..., None]
    with torch.no_grad():
        rest = activation.where(valid, 0.0)
        active = (rest.clamp(0, 1) * valid).sum(-1, keepdim=True) > budget
        tau = torch.where(active, _threshold(rest, budget, valid), 0.0)
        full = valid & (rest - tau >= 1)
        interior = valid & (rest - tau > 0) & ~full
        size = interior.sum(-1, keepdim=True)
    # The same tau once more, as a function of both arguments: autograd then gives the exact gradient, and the
    # rounding of the running sums in the search drops out.
    exact = ((activation.where(interior, 0.0).sum(-1, keepdim=True) + full.sum(-1, keepdim=True)) - budget) / (
        size.clamp(min=1)
    )
    tau = torch.where(active & (size > 0), exact, tau)
    return torch.where(interior, (activation - tau).clamp(0, 1), full.to(activation.dtype))


def _threshold(activation: Tensor, budget: Tensor, valid: Tensor) -> Tensor:
    """The tau with sum_t clip(a_t - tau, 0, 1) = budget, from the sorted breakpoints a_t - 1 and a_t.

    Between breakpoints the sum is linear in tau; its slope is minus the number of interior tokens, which grows by one
    at each a_t - 1 and shrinks by one at each a_t.
    """
    breakpoints, order = torch.cat([activation - 1, activation], dim=-1).sort(dim=-1)
    enters = valid.to(activation.dtype)
    interior = torch.cat([enters, -enters], dim=-1).gather(-1, order).cumsum(-1)  # just after each breakpoint
    drops = interior[..., :-1] * breakpoints.diff(dim=-1)
    sums = enters.sum(-1, keepdim=True) - torch.nn.functional.pad(drops.cumsum(-1), (1, 0))
    last = ((sums >= budget).sum(-1, keepdim=True) - 1).clamp(min=0)  # the sums fall: the last that is large enough
    slope = interior.gather(-1, last)
    return breakpoints.gather(-1, last) + (sums.gather(-1, last) - budget).clamp(min=0) / slope.clamp(min=1)


class TokenBudget(nn.Module):
    """Admits the tokens of one level, of every modality alike.

    The budget is a share of a clip's own tokens (rho is per level), so it means the same at every length. While it
    does not bind, rho has no gradient: the start matters. `start` is that share (rho = logit(start)).
    """

    def __init__(self, k_shared: int, start: float, gamma: float, threshold: float, scale: float) -> None:
        super().__init__()
        self.k_shared = k_shared
        self.gamma = gamma
        self.rho = nn.Parameter(torch.tensor(math.log(start / (1 - start))))
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.raw_scale = nn.Parameter(torch.tensor(math.log(math.expm1(scale))))  # softplus gives the scale

    @property
    def scale(self) -> Tensor:
        """Steepness of the activation, positive."""
        return nn.functional.softplus(self.raw_scale)

    def evidence(self, shared: Tensor) -> Tensor:
        """(B, T, k_s) -> (B, T): the norm, centred and scaled to unit spread at any width."""
        norm = torch.linalg.vector_norm(shared.float(), dim=-1)
        return (norm / math.sqrt(self.k_shared) - 1) * math.sqrt(2 * self.k_shared)

    def forward(self, shared: Tensor, valid: Tensor) -> Admission:
        """shared: (B, T, k_s) coordinates; valid: (B, T)."""
        activation = torch.sigmoid(self.scale * (self.evidence(shared) - self.threshold))
        tokens = valid.sum(dim=1).float()
        budget = torch.minimum(self.gamma * torch.sigmoid(self.rho) * tokens, tokens)
        alpha = project(activation, budget, valid)
        active = (activation * valid).sum(dim=1) > budget
        return Admission(alpha, alpha.sum(dim=1) / tokens.clamp(min=1), active)


def admit_all(valid: Tensor) -> Admission:
    """No budget: every valid token takes part in full."""
    alpha = valid.float()
    return Admission(alpha, valid.any(dim=1).float(), torch.zeros_like(valid[:, 0]))
