"""Inter-level co-aggregation: from the summaries of all levels and modalities to a prediction (CLCR, sec. InterCAD).

    s_bar[m] = sum_l omega[l] s[l,m],   p_bar[m] = sum_l omega[l] p[l,m]          omega: softmax over the levels
    z_sh = sum_m beta[m] s_bar[m],      beta: the global context g = mean_m s_bar[m] queries the s_bar[m]
    u_pr = concat_m eta[m] p_bar[m],    eta[m] = sigmoid(w^T LN(W p_bar[m]))
    y^   = f(z_sh concat u_pr)

Summaries are per window: one of the whole clip for each task (attention pooling has a learned query per task), and one
per bin of time for events. Everything here carries that axis N, and one set of weights serves all of it: omega, beta
and eta are per bin where a task is.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clcr.config import Aggregation, CLCRConfig, Pooling
from clcr.precision import exactly, without_autocast
from clcr.windows import Windows

EPSILON = 1e-6
EXCLUDED = -1e4  # score of what is masked out; finite, so a row of nothing but masked entries is no NaN


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis within the mask: zero outside it, and zero everywhere where it is empty."""
    return scores.float().masked_fill(~mask, EXCLUDED).softmax(dim=-1) * mask


class TimePooling(nn.Module):
    """Weights over time for the summary of one modality at one level: (B, N, T), per window, zero outside of it.

    `attention`: a learned query per task; a label that is local in time drowns in a mean. `mean`: the paper's.
    `statistics`: as attention, and a summary also says how much its tokens vary within the window.
    """

    undecayed = ("queries",)

    def __init__(self, tasks: int, width: int, pooling: Pooling) -> None:
        super().__init__()
        # Zero queries are the mean over time: the start does not prefer any token.
        self.queries = nn.Parameter(torch.zeros(tasks, width)) if pooling != "mean" else None
        self.spread = nn.Linear(width, width, bias=False) if pooling == "statistics" else None

    def forward(self, shares: Tensor, task: Tensor, *flows: tuple[Tensor, Tensor]) -> Tensor:
        """shares: (B, N, T) how much of each window each token covers; task: (N,) of each window.

        flows: coordinates (B, T, k) and the basis (d, k) they are in, summed in R^d.
        """
        if self.queries is None:
            return shares / shares.sum(dim=-1, keepdim=True).clamp(min=EPSILON)
        # q . (U h), without lifting h
        scores = reduce(torch.add, [tokens @ (self.queries @ basis).T for tokens, basis in flows])
        scores = scores.transpose(1, 2)[:, task]
        return masked_softmax(scores + shares.clamp(min=EPSILON).log(), shares > 0)

    def summary(self, tokens: Tensor, shares: Tensor, task: Tensor) -> Tensor:
        """Tokens (B, T, d) of a basis of their own, pooled: (B, N, d), zero where a window has no token."""
        identity = torch.eye(tokens.shape[-1], device=tokens.device)
        return self.pool(self(shares, task, (tokens, identity)), tokens)

    def pool(self, weights: Tensor, tokens: Tensor, basis: Tensor | None = None) -> Tensor:
        """weights: (B, N, T); tokens: (B, T, k) in basis (d, k) -> their mean in R^d, (B, N, d).

        Of statistics with a map of their standard deviation, which is zero too where a window has no token.
        """
        mean = weights @ tokens.float()
        mean = mean if basis is None else mean @ basis.T
        if self.spread is None:
            return mean
        with without_autocast(tokens):  # a small difference of large squares
            lifted = tokens.float() if basis is None else tokens.float() @ basis.float().T
            exact = weights.float()
            variance = (exact @ lifted.square() - (exact @ lifted).square()).clamp(min=EPSILON)
        return mean + self.spread(variance.sqrt()) * (weights.sum(dim=-1, keepdim=True) > 0)


class Synchronise(nn.Module):
    """Summaries of every level into one space, by a linear map per level; of private parts per level and modality.

    Each level has bases of its own, and what lives in unrelated bases cannot be averaged ("anchors synchronise semantic
    scales"). The maps start as the identity.
    """

    def __init__(self, levels: int, modalities: int, width: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.eye(width).repeat(levels, 1, 1))
        self.private = nn.Parameter(torch.eye(width).repeat(levels, modalities, 1, 1))

    def forward(self, shared: Tensor, private: Tensor) -> tuple[Tensor, Tensor]:
        """shared, private: (B, N, K, M, d), zero where missing, and so is what comes out."""
        shared = torch.einsum("bnkmd,kde->bnkme", shared, self.shared)
        return shared, torch.einsum("bnkmd,kmde->bnkme", private, self.private)


class LevelWeights(nn.Module):
    """omega: a softmax over levels of an MLP that reads the level's shared summary alongside the level's anchor.

    The last layer starts at zero, so omega starts uniform: with a random start it collapses onto one level early.
    """

    undecayed = ("anchors",)

    def __init__(self, levels: int, width: int) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(levels, width))
        first, last = nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.score = nn.Sequential(first, nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, shared: Tensor, present: Tensor) -> Tensor:
        """shared: (B, N, K, M, d), zero where missing; present: (B, N, M) -> (B, N, K)."""
        anchors = self.anchors.expand(*shared.shape[:2], -1, -1)
        scores = self.score(torch.cat([present_mean(shared, present), anchors], dim=-1))
        return scores.squeeze(-1).float().softmax(dim=-1)


class UniformWeights(nn.Module):
    """omega fixed at 1 / K (ablation)."""

    def forward(self, shared: Tensor, present: Tensor) -> Tensor:
        """shared: (B, N, K, M, d) -> (B, N, K)."""
        return torch.full(shared.shape[:3], 1 / shared.shape[2], device=shared.device)


class Aggregated(NamedTuple):
    """shared: z_sh (B, N, d); private: u_pr (B, N, M * d); omega: (B, N, K); beta, eta: (B, N, M)."""

    shared: Tensor
    private: Tensor
    omega: Tensor
    beta: Tensor
    eta: Tensor

    @classmethod
    def weighted(cls, s_bar: Tensor, p_bar: Tensor, omega: Tensor, beta: Tensor, eta: Tensor) -> "Aggregated":
        """Sum the modalities' shared summaries, set their private ones side by side: s_bar, p_bar (B, N, M, d)."""
        shared = torch.einsum("bnm,bnmd->bnd", beta, s_bar)
        private = (eta[..., None] * p_bar).flatten(2)
        return cls(shared, private, omega, beta, eta)

    def with_zeros(self, present: Tensor) -> "Aggregated":
        """The same, times the share of modalities that are there: even weights then leave each as loud as it was."""
        return self._replace(shared=self.shared * present.float().mean(dim=-1, keepdim=True))


class CoAggregation(nn.Module):
    """Summaries of all levels and modalities to one shared and one private representation per window."""

    def __init__(self, width: int, weights: nn.Module) -> None:
        super().__init__()
        self.weights = weights
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.gate = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, shared: Tensor, private: Tensor, present: Tensor) -> Aggregated:
        """shared, private: (B, N, K, M, d), zero where missing; present: (B, N, M)."""
        omega = self.weights(shared, present)
        s_bar, p_bar = level_mean(shared, omega), level_mean(private, omega)
        context = self.query(present_mean(s_bar, present))
        scores = torch.einsum("bnd,bnmd->bnm", context, self.key(s_bar)) / s_bar.shape[-1] ** 0.5
        beta = masked_softmax(scores, present)
        eta = self.gate(p_bar).squeeze(-1).sigmoid() * present
        return Aggregated.weighted(s_bar, p_bar, omega, beta, eta)


class MeanAggregation(nn.Module):
    """Plain means over the levels and over the modalities that are present, private summaries ungated (ablation)."""

    def forward(self, shared: Tensor, private: Tensor, present: Tensor) -> Aggregated:
        """shared, private: (B, N, K, M, d), zero where missing; present: (B, N, M)."""
        omega = UniformWeights()(shared, present)
        eta = present.float()
        beta = eta / eta.sum(dim=-1, keepdim=True).clamp(min=1)
        return Aggregated.weighted(level_mean(shared, omega), level_mean(private, omega), omega, beta, eta)


def co_aggregation(kind: Aggregation, levels: int, width: int) -> nn.Module:
    """The aggregation of a model: `attention`, or one of its ablations."""
    if kind == "mean":
        return MeanAggregation()
    return CoAggregation(width, LevelWeights(levels, width) if kind == "attention" else UniformWeights())


def level_mean(summaries: Tensor, omega: Tensor) -> Tensor:
    """Mean over the levels, weighted: (B, N, K, M, d), (B, N, K) -> (B, N, M, d)."""
    return torch.einsum("bnk,bnkmd->bnmd", omega, summaries.float())


def present_mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the modalities that are present: (B, N, ..., M, d), zero where missing; (B, N, M) -> (B, N, ..., d)."""
    count = present.sum(dim=-1).clamp(min=1)
    return values.sum(dim=-2) / count.reshape(*count.shape, *[1] * (values.ndim - 3))


class TaskHeads(nn.Module):
    """A small MLP per task."""

    def __init__(self, width_in: int, width: int, outputs: list[int], dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width_in), nn.Linear(width_in, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, n)
            )
            for n in outputs
        )

    def forward(self, representation: Tensor, windows: Windows) -> list[Tensor]:
        """representation: (B, N, width_in) -> logits of each task, (B, outputs) or (B, bins, outputs)."""
        parts = windows.split(representation)
        return [exactly(head, part) for head, part in zip(self.heads, parts, strict=True)]


def own_heads(modalities: int, width_in: int, width: int, outputs: list[int], config: CLCRConfig) -> nn.ModuleList:
    """A head for each modality by itself, for the losses of --loss.unimodal; none where their weight is 0."""
    of = range(modalities if config.loss.unimodal else 0)
    return nn.ModuleList(TaskHeads(width_in, width, outputs, config.model.dropout) for _ in of)
