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

from clcr.config import BudgetConfig
from clcr.precision import without_autocast


class Admission(NamedTuple):
    """alpha: (B, T) weight of every token; active: (B,) bool, whether the budget bound."""

    alpha: Tensor
    active: Tensor


def project(activation: Tensor, budget: Tensor | float, valid: Tensor | None = None) -> Tensor:
    """Project onto the truncated simplex {a : 0 <= a <= 1, sum(a) <= budget} (CLCR, sec. IntraCED).

    activation: (..., T) any real; budget: tokens, a number, (...,) or (..., 1); valid: (..., T) bool, padding is 0 in
    the result. Computed in float32 at least, returned in the activation's dtype. Exact gradient in both arguments.
    Raises ValueError if a budget is negative and on the CPU: no other device is asked.
    """
    a = activation.to(torch.promote_types(activation.dtype, torch.float32))
    budget = budget.to(a) if isinstance(budget, Tensor) else a.new_full((), budget)
    if budget.device.type == "cpu" and not torch.compiler.is_compiling() and bool((budget < 0).any()):
        raise ValueError(f"the budget is negative ({budget.min().item():g}): no vector of weights fits it")
    budget = (budget if budget.ndim == a.ndim else budget[..., None]).expand(*a.shape[:-1], 1)
    valid = torch.ones_like(a, dtype=torch.bool) if valid is None else valid
    return _project(a, budget, valid).to(activation.dtype)


def _project(a: Tensor, budget: Tensor, valid: Tensor) -> Tensor:
    """The same of floats (..., T) and budgets (..., 1) that are not negative; asks nothing of what they hold."""
    with torch.no_grad():
        active = _excess(a, budget, valid).tokens > 0
        tau = torch.where(active, _threshold(a.where(valid, 0.0), budget, valid), 0.0)
    # The rest of tau, as a function of both arguments: autograd then gives the exact gradient, and the rounding of the
    # search drops out. Relative to the tau found: a large one is known to 1e-6 only in float32.
    a = a - tau
    excess = _excess(a, budget, valid)
    rest = (excess.tokens / excess.interior.sum(-1, keepdim=True).clamp(min=1)).where(active, 0.0)
    return torch.where(excess.interior, (a - rest).clamp(0, 1), excess.full.to(a.dtype))


class _Excess(NamedTuple):
    """tokens: (..., 1) sum_t clip(a_t, 0, 1) - budget; interior: (..., T) 0 < a_t < 1; full: (..., T) a_t >= 1."""

    tokens: Tensor
    interior: Tensor
    full: Tensor


def _excess(a: Tensor, budget: Tensor, valid: Tensor) -> _Excess:
    full = valid & (a >= 1)
    interior = valid & (a > 0) & ~full
    # Full tokens against the budget first: that difference is exact, the sum over all tokens would be rounded.
    tokens = a.where(interior, 0.0).sum(-1, keepdim=True) + (full.sum(-1, keepdim=True) - budget)
    return _Excess(tokens, interior, full)


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

    scalars = ("rho", "threshold", "raw_scale")

    def __init__(self, k_shared: int, start: float, config: BudgetConfig) -> None:
        super().__init__()
        self.k_shared = k_shared
        self.gamma = config.gamma
        rho = torch.tensor(math.log(start / (1 - start)))
        if config.kind == "learned":
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)
        self.threshold = nn.Parameter(torch.tensor(float(config.threshold)))
        self.raw_scale = nn.Parameter(torch.tensor(math.log(math.expm1(config.scale))))  # softplus gives the scale
        # From zero: at the start the size alone decides.
        self.direction = nn.Parameter(torch.zeros(k_shared)) if config.evidence == "content" else None

    @property
    def scale(self) -> Tensor:
        """Steepness of the activation, positive."""
        return nn.functional.softplus(self.raw_scale)

    def evidence(self, shared: Tensor) -> Tensor:
        """(B, T, k_s) -> (B, T): the norm, centred and scaled to unit spread at any width; more for its direction."""
        norm = torch.linalg.vector_norm(shared.float(), dim=-1)
        size = (norm / math.sqrt(self.k_shared) - 1) * math.sqrt(2 * self.k_shared)
        if self.direction is None:
            return size
        with without_autocast(shared):
            return size + shared.float() @ self.direction

    def forward(self, shared: Tensor, valid: Tensor) -> Admission:
        """shared: (B, T, k_s) coordinates; valid: (B, T)."""
        activation = torch.sigmoid(self.scale * (self.evidence(shared) - self.threshold))
        tokens = valid.sum(dim=1).float()
        budget = torch.minimum(self.gamma * torch.sigmoid(self.rho) * tokens, tokens)
        active = (activation * valid).sum(dim=1) > budget
        return Admission(_project(activation, budget[:, None], valid), active)


class NoBudget(nn.Module):
    """Every valid token takes part in full (ablation)."""

    def forward(self, shared: Tensor, valid: Tensor) -> Admission:
        """shared: (B, T, k_s); valid: (B, T)."""
        return Admission(valid.float(), torch.zeros_like(valid[:, 0]))
