"""What CLCR's equations promise, measured: projection, gradients, subspaces, leaks, invariances, budget, CKA.

    python -m tests.benchmarks.exactness

Prints the worst figure of each claim with its bound, and ends with 1 if one does not hold;
tests/clcr/test_exactness.py asserts the same claims. Everything runs on the CPU, from fixed seeds, in float32 unless it
says otherwise.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import mean

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from torch import Tensor

import clcr
from clcr.batches import collate
from clcr.budget import project
from clcr.config import ModelConfig
from clcr.exchange import CoExchange
from clcr.regularizers import debiased_cka
from clcr.tasks import task_loss

FEATURES = {
    "video": clcr.FeatureSpec((8,), 12.5, "float32"),
    "audio": clcr.FeatureSpec((6,), 25.0, "float32"),
    "text": clcr.FeatureSpec((3, 10), 3.0, "float32"),
}
TASKS = {
    "word": clcr.TaskSpec("word", "classification", ("a", "b", "c")),
    "mood": clcr.TaskSpec("mood", "regression"),
}


@dataclass(frozen=True)
class Claim:
    """A figure and the bound it keeps."""

    name: str
    bound: float
    measure: Callable[[], float]
    at_least: bool = False

    def holds(self, figure: float) -> bool:
        """False for NaN."""
        return figure >= self.bound if self.at_least else figure <= self.bound


# ---------------------------------------------------------------------------------------------- projection


def projection_cases(n: int, longest: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations (n, longest), budgets (n,), masks: ties, holes, empty rows, budgets of 0, on the edge, beyond T."""
    rng = np.random.default_rng(seed)
    a = rng.normal(0.5, rng.choice([0.2, 1.0, 5.0], (n, 1)), (n, longest))
    a = np.where(rng.random((n, 1)) < 0.3, np.round(4 * a) / 4, a)  # ties
    a = np.where(rng.random((n, 1)) < 0.05, a[:, :1], a)  # nothing but ties
    valid = (np.arange(longest) < rng.integers(0, longest + 1, (n, 1))) & (rng.random((n, longest)) < 0.9)
    a = np.where(valid, a, 1e3).astype(np.float32)
    tokens, fitting = valid.sum(1), np.where(valid, np.clip(a, 0, 1), 0).sum(1)
    share = rng.random(n)
    kinds = [share * tokens, np.zeros(n), tokens + 3 * share, np.floor(share * tokens), fitting]
    budget = np.choose(rng.choice(5, n, p=[0.5, 0.1, 0.1, 0.2, 0.1]), kinds).astype(np.float32)
    return a, budget, valid


def bisection(a: np.ndarray, budget: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The projection in float64, tau by halving an interval that holds it."""
    a, budget = np.where(valid, a, -np.inf).astype(np.float64), budget.astype(np.float64)[:, None]
    low, high = np.zeros_like(budget), np.maximum(a.max(1, keepdims=True), 0)
    for _ in range(80):
        middle = (low + high) / 2
        large = np.clip(a - middle, 0, 1).sum(1, keepdims=True) > budget
        low, high = np.where(large, middle, low), np.where(large, high, middle)
    fits = np.clip(a, 0, 1).sum(1, keepdims=True) <= budget
    return np.clip(a - np.where(fits, 0, high), 0, 1)


def quadratic_program(a: np.ndarray, budget: float) -> np.ndarray:
    """min |x - a|^2 / 2 over the truncated simplex, by scipy's SLSQP (an active-set least-squares solver)."""
    return minimize(
        lambda x: ((x - a) ** 2).sum() / 2,
        np.zeros_like(a),
        jac=lambda x: x - a,
        bounds=[(0, 1)] * len(a),
        constraints={"type": "ineq", "fun": lambda x: budget - x.sum(), "jac": lambda x: -np.ones_like(x)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    ).x


def projection_error() -> float:
    """Against bisection, 10,000 cases."""
    a, budget, valid = projection_cases(10_000, 100, seed=0)
    found = project(*map(torch.from_numpy, (a, budget, valid))).numpy()
    return np.abs(found - bisection(a, budget, valid)).max().item()


def projection_error_against_solver() -> float:
    """Against the quadratic program, 10,000 cases."""
    a, budget, valid = projection_cases(10_000, 12, seed=1)
    found = project(*map(torch.from_numpy, (a, budget, valid))).numpy()
    cases = [i for i in range(len(a)) if valid[i].any()]
    solved = (quadratic_program(a[i][valid[i]].astype(np.float64), float(budget[i])) for i in cases)
    return max(np.abs(found[i][valid[i]] - x).max().item() for i, x in zip(cases, solved, strict=True))


# ----------------------------------------------------------------------------------------------- gradients


def gradient_error(function: Callable[..., Tensor], *inputs: Tensor, step: float = 1e-6) -> float:
    """Largest deviation of autograd's Jacobian from central differences; inputs are float64."""
    worst = 0.0
    for i, (x, jacobian) in enumerate(zip(inputs, torch.autograd.functional.jacobian(function, inputs), strict=True)):
        for entry in range(x.numel()):
            shift = torch.zeros(x.numel(), dtype=x.dtype)
            shift[entry] = step
            up, down = (function(*inputs[:i], x + s * shift.view_as(x), *inputs[i + 1 :]) for s in (1, -1))
            numeric = (up - down) / (2 * step)
            worst = max(worst, (jacobian.flatten(-x.ndim)[..., entry] - numeric).abs().max().item())
    return worst


def projection_gradient_error() -> float:
    """In the activations and in the budget."""
    torch.manual_seed(0)
    a, valid = torch.randn(20, 7, dtype=torch.float64) + 0.5, torch.rand(20, 7) < 0.8
    budget = torch.rand(20, dtype=torch.float64) * valid.sum(1)
    return gradient_error(lambda x, b: project(x, b, valid), a, budget)


def exchange_inputs(smallest: float) -> tuple[CoExchange, list[Tensor], list[Tensor]]:
    """An exchange in float64, shared tokens of two modalities and alphas from `smallest` on."""
    torch.manual_seed(0)
    shared = [torch.randn(2, t, 4, dtype=torch.float64) for t in (3, 4)]
    alpha = [smallest + (1 - smallest) * torch.rand(2, t, dtype=torch.float64) for t in (3, 4)]
    return CoExchange(4, heads=2, dropout=0.0).double(), shared, alpha


def exchanged(exchange: CoExchange, a: Tensor, b: Tensor, alpha_a: Tensor, alpha_b: Tensor) -> Tensor:
    valid = {"a": torch.ones_like(alpha_a) > 0, "b": torch.ones_like(alpha_b) > 0}
    seconds = {m: torch.arange(x.shape[1])[:, None] * 0.3 + torch.tensor([0.0, 0.3]) for m, x in valid.items()}
    out = exchange({"a": a, "b": b}, {"a": alpha_a, "b": alpha_b}, valid, seconds)
    return torch.cat([out["a"], out["b"]], dim=1)


def exchange_gradient_error() -> float:
    """In the tokens and in alpha > 0."""
    exchange, shared, alpha = exchange_inputs(0.2)
    return gradient_error(lambda *x: exchanged(exchange, *x), *shared, *alpha)


def gradients_not_finite_at_zero() -> float:
    """How many gradients of the exchange are not finite when some tokens, and all of one sample, have alpha = 0."""
    exchange, shared, alpha = exchange_inputs(0.2)
    alpha[0][:, 0] = 0
    alpha[1][0] = 0
    inputs = [x.requires_grad_() for x in (*shared, *alpha)]
    exchanged(exchange, *inputs).square().sum().backward()
    return sum((~x.grad.isfinite()).sum().item() for x in (*inputs, *exchange.parameters()))


def cka_gradient_error() -> float:
    """In both arguments, one row masked."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 7, 3, dtype=torch.float64)
    mask = torch.arange(7) != 3
    return gradient_error(lambda a, b: debiased_cka(a, b, mask), x, y)


# --------------------------------------------------------------------------------------------------- model


def samples(n: int, seed: int = 0) -> list[dict]:
    """Noise of 1.2 to 2 s in three modalities; every fourth clip lacks one."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        seconds = rng.uniform(1.2, 2.0)
        features = {
            m: rng.normal(size=(max(2, int(seconds * spec.rate)), *spec.shape)).astype(spec.dtype)
            for m, spec in FEATURES.items()
        }
        if i % 4 == 3:
            del features[list(FEATURES)[i // 4 % 3]]
        made.append(
            {"clip_id": f"clip{i}", "features": features, "targets": {"word": i % 3, "mood": float(rng.normal())}}
        )
    return made


def small_model(seed: int = 0, **model: object) -> clcr.CLCR:
    torch.manual_seed(seed)
    model = {"width": 32, "levels": 3, "heads": 2, "dropout": 0.0, "stride": 1, **model}
    return clcr.build("clcr", clcr.CLCRConfig(ModelConfig(**model)), FEATURES, TASKS)


@torch.enable_grad()
def train(model: clcr.CLCR, batch: clcr.Batch, steps: int, bf16: bool = False) -> clcr.CLCR:
    optimizer = torch.optim.AdamW(model.train().parameter_groups(1e-2), lr=3e-3)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(batch)
        parts = [task_loss(spec, out.logits[t], batch.targets[t]) for t, spec in TASKS.items()]
        loss = sum(total / count for total, count in parts) + sum(out.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@cache
def trained() -> clcr.CLCR:
    """A model after 50 steps."""
    return train(small_model(), collate(samples(16), FEATURES, TASKS), steps=50)


def orthogonality_error() -> float:
    """Of U_sh^T U_sh - I, U_pr^T U_pr - I and U_sh^T U_pr after 1,000 steps under bf16 autocast."""
    batch = collate(samples(4), FEATURES, TASKS)
    model, worst = small_model(width=16, levels=1), 0.0
    for _ in range(10):
        train(model, batch, steps=100, bf16=True)
        u_sh, u_pr = model.bases(0)
        for u in u_pr.values():
            both = torch.cat([u_sh, u], dim=1)
            worst = max(worst, (both.T @ both - torch.eye(both.shape[1])).abs().max().item())
    return worst


@cache
@torch.no_grad()
def leaks() -> tuple[float, float]:
    """Changes of other modalities' exchanged tokens when any one token moves by 3 along any private or shared basis
    vector: the largest for private ones; for shared ones the largest of each level and modality, of these the smallest.
    """
    model, (sample, *_) = trained(), samples(1)
    tokens = model.encoder(collate([sample], FEATURES, TASKS))
    private, shared = [], []
    for level, moving in ((level, m) for level in range(len(tokens)) for m in FEATURES):
        u_sh, u_pr = model.bases(level)
        private.append(largest_change(model, tokens, level, moving, u_pr[moving]))
        shared.append(largest_change(model, tokens, level, moving, u_sh))
    return max(private), min(shared)


def largest_change(model: clcr.CLCR, tokens: list, level: int, moving: str, basis: Tensor) -> float:
    """One clip, copied once per token and basis vector; in each copy that token is moved along that vector."""
    length = tokens[level][moving].values.shape[1]
    copies = length * basis.shape[1]
    before = [{m: t.values.expand(copies, -1, -1) for m, t in by_modality.items()} for by_modality in tokens]
    valid = [{m: t.valid.expand(copies, -1) for m, t in by_modality.items()} for by_modality in tokens]
    after = deepcopy(before)
    moves = torch.einsum("ts,dk->tksd", torch.eye(length), 3 * basis)  # token, vector -> (T, d)
    after[level][moving] = before[level][moving] + moves.flatten(0, 1)
    present = {m: torch.ones(copies, dtype=torch.bool) for m in FEATURES}
    spans = [{m: t.spans for m, t in by_modality.items()} for by_modality in tokens]
    first, second = (model.exchange(x, valid, present, spans) for x in (before, after))
    others = [m for m in FEATURES if m != moving]
    return max(
        (a.shared[m] - b.shared[m]).abs().max().item() for a, b in zip(first, second, strict=True) for m in others
    )


@cache
@torch.no_grad()
def invariances() -> dict[str, float]:
    """Largest change of logits, alpha, omega, beta and eta by padding, by the order of the batch, by the neighbours."""
    model, clips = trained(), samples(8, seed=1)
    longest = {**clips[0], "features": {m: np.repeat(x, 3, axis=0) for m, x in clips[0]["features"].items()}}
    plain = rows(model, clips)
    return {
        "padding": difference(plain, rows(model, [*clips, longest])),
        "order": difference(plain, rows(model, clips[::-1])[::-1]),
        "neighbours": difference(plain, [rows(model, [clip])[0] for clip in clips]),
    }


def rows(model: clcr.CLCR, clips: list[dict]) -> list[Tensor]:
    """All that the model says of each clip, as one vector."""
    out = model(collate(clips, FEATURES, TASKS))
    said = []
    for i in range(len(clips)):
        alpha = [a[m][i][v[m][i]] for a, v in zip(out.alpha, out.valid, strict=True) for m in FEATURES]
        said.append(torch.cat([*(x[i] for x in (*out.logits.values(), out.omega, out.beta, out.eta)), *alpha]))
    return said


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Over the clips of the first."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=False))


@torch.no_grad()
def rotation_error() -> float:
    """Change of logits when every basis becomes U R, exchange weights rotated alike."""
    model, batch = deepcopy(trained()), collate(samples(8, seed=1), FEATURES, TASKS)
    before = model(batch).logits
    for intra in model.intra:
        (u_sh, u_pr), exchange = intra.subspaces(), intra.exchange
        rotation, other = (torch.linalg.qr(torch.randn(k, k)).Q for k in (u_sh.shape[1], u_pr.shape[2]))
        intra.subspaces.shared.copy_(u_sh @ rotation)  # the QR decomposition of an orthonormal matrix has Q = it
        intra.subspaces.private.copy_(u_pr @ other)
        assert torch.allclose(intra.subspaces()[0], u_sh @ rotation, atol=1e-5)
        for linear in (exchange.query, exchange.key, exchange.value):
            linear.weight.copy_(linear.weight @ rotation)
        exchange.out.weight.copy_(rotation.T @ exchange.out.weight)
    after = model(batch).logits
    return max((before[t] - after[t]).abs().max().item() for t in TASKS)


# -------------------------------------------------------------------------------------------------- budget


@torch.no_grad()
def budget_at_start() -> float:
    """Share of samples with an active budget, mean over levels, modalities and 12 models.

    Single levels and modalities scatter: how much of a token lies in a random subspace is partly common to all tokens.
    """
    batch = collate(samples(64, seed=2), FEATURES, TASKS)
    found = []
    for width, seed in product((32, 64, 128), range(4)):
        model = small_model(seed, width=width).eval()
        shown = model.diagnostics(model(batch), batch)
        found += [value.nanmean().item() for name, value in shown.items() if name.startswith("budget_active")]
    return mean(found)


@cache
def budget_moves() -> tuple[float, float]:
    """How far rho and the scale have moved after 100 steps; of all levels the least."""
    model = small_model()
    budgets = [intra.budget for intra in model.intra]
    start = [(b.rho.item(), b.scale.item()) for b in budgets]
    train(model, collate(samples(16), FEATURES, TASKS), steps=100)
    rho, scale = zip(
        *((abs(b.rho.item() - r), abs(b.scale.item() - s)) for b, (r, s) in zip(budgets, start, strict=True)),
        strict=True,
    )
    return min(rho), min(scale)


# ----------------------------------------------------------------------------------------------------- CKA


def cka_error(correlation: float) -> float:
    """Worst deviation, over widths, of the mean of 20 values from correlation^2, 64 rows each."""
    torch.manual_seed(0)
    worst = 0.0
    for width in (16, 32, 64, 128):
        x, noise = torch.randn(2, 20, 64, width)
        y = correlation * x + (1 - correlation**2) ** 0.5 * noise
        value = debiased_cka(x, y, torch.ones(20, 64, dtype=torch.bool)).mean().item()
        worst = max(worst, abs(value - correlation**2))
    return worst


CLAIMS = [
    Claim("projection: error, 10,000 cases, against bisection in float64", 1e-6, projection_error),
    Claim("projection: error, 10,000 cases, against scipy's SLSQP", 1e-6, projection_error_against_solver),
    Claim("projection: gradient error in both arguments, float64", 1e-7, projection_gradient_error),
    Claim("exchange: gradient error, float64", 1e-7, exchange_gradient_error),
    Claim("exchange: gradients not finite at alpha = 0", 0, gradients_not_finite_at_zero),
    Claim("CKA: gradient error, float64", 1e-7, cka_gradient_error),
    Claim("bases: orthogonality error, 1,000 steps in bf16", 1e-5, orthogonality_error),
    Claim("leak: others' change by a private move, after 50 steps", 1e-5, lambda: leaks()[0]),
    Claim("control: others' change by a shared move", 1e-3, lambda: leaks()[1], at_least=True),
    *(
        Claim(f"invariance: change of all outputs by {what}", 1e-5, lambda what=what: invariances()[what])
        for what in ("padding", "order", "neighbours")
    ),
    Claim("rotation: change of logits under U -> U R", 1e-5, rotation_error),
    Claim("budget: mean share of samples it binds at the start", 0.8, budget_at_start, at_least=True),
    Claim("budget: move of rho in 100 steps", 1e-3, lambda: budget_moves()[0], at_least=True),
    Claim("budget: move of the scale in 100 steps", 1e-3, lambda: budget_moves()[1], at_least=True),
    Claim("CKA: of independent rows, widths 16 to 128", 0.02, lambda: cka_error(0.0)),
    Claim("CKA: of rows correlated by 0.7, less 0.49", 0.05, lambda: cka_error(0.7)),
    Claim("CKA: of identical rows, less 1", 1e-5, lambda: cka_error(1.0)),
]


def main() -> int:
    """Measure all, print one table."""
    table = Table("claim", "worst", "bound", "")
    broken = 0
    for claim in CLAIMS:
        figure = claim.measure()
        broken += not claim.holds(figure)
        sign = ">=" if claim.at_least else "<="
        table.add_row(claim.name, f"{figure:.1e}", f"{sign} {claim.bound:g}", "" if claim.holds(figure) else "BROKEN")
    Console(width=100).print(table)
    return 1 if broken else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
