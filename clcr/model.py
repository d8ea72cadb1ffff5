"""CLCR (arXiv 2602.19605): hierarchy, intra-level exchange, inter-level aggregation, heads, regularisers - in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clcr.aggregation import CoAggregation, LevelWeights, TaskHeads, TimePooling, UniformWeights
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.budget import TokenBudget, admit_all
from clcr.config import CLCRConfig
from clcr.errors import ConfigError
from clcr.exchange import CoExchange
from clcr.hierarchy import Tokens, masked_mean
from clcr.regularizers import regularizers
from clcr.subspaces import Subspaces
from clcr.tasks import TaskSpec
from clcr.windows import Windows


@dataclass
class Flows:
    """One level after the exchange, by modality.

    shared: (B, T, k_s), private: (B, T, k_p) coordinates; valid: (B, T); alpha: (B, T); participation: (B,);
    active: (B,) whether the budget bound.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    private: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)
    alpha: dict[str, Tensor] = field(default_factory=dict)
    participation: dict[str, Tensor] = field(default_factory=dict)
    active: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class CLCROutput(Output):
    """A forward pass. Lists are over levels, dicts over modalities.

    alpha: (B, T) token weights; valid: (B, T) the tokens that are not padding; participation: (B,) share of tokens;
    budget_active: (B,) bool; shared, private: (B, d) masked means of the flows, lifted to R^d; omega: (B, K) and
    beta, eta: (B, M), means over the tasks; task_omega: (B, K) per task, of events the mean over the bins.
    """

    alpha: list[dict[str, Tensor]] = field(default_factory=list)
    valid: list[dict[str, Tensor]] = field(default_factory=list)
    participation: list[dict[str, Tensor]] = field(default_factory=list)
    budget_active: list[dict[str, Tensor]] = field(default_factory=list)
    shared: list[dict[str, Tensor]] = field(default_factory=list)
    private: list[dict[str, Tensor]] = field(default_factory=list)
    omega: Tensor | None = None
    beta: Tensor | None = None
    eta: Tensor | None = None
    task_omega: dict[str, Tensor] = field(default_factory=dict)


class ExchangeLevel(nn.Module):
    """Subspaces, budget and exchange of one level (IntraCED), and how its tokens become summaries."""

    def __init__(self, level: int, modalities: int, tasks: int, config: CLCRConfig) -> None:
        super().__init__()
        model, budget, k_shared = config.model, config.budget, config.model.k_shared
        self.subspaces = Subspaces(modalities, model.width, k_shared, model.k_private)
        self.budget = self.exchange = None
        if model.exchange == "budgeted":
            start = config.budget_start(level)
            self.budget = TokenBudget(k_shared, start, budget.gamma, budget.threshold, budget.scale)
        if model.exchange != "none":
            self.exchange = CoExchange(k_shared, model.heads, model.dropout)
        self.pooling = nn.ModuleList(TimePooling(tasks, model.width, model.pooling) for _ in range(modalities))

    def forward(self, tokens: dict[str, Tensor], valid: dict[str, Tensor], u_sh: Tensor, u_pr: Tensor) -> Flows:
        """tokens: (B, T, d), valid: (B, T) per modality; u_sh: (d, k_s); u_pr: (M, d, k_p)."""
        flows = Flows(valid=valid)
        for (m, h), basis in zip(tokens.items(), u_pr, strict=True):
            flows.shared[m], flows.private[m] = h @ u_sh, h @ basis
            admission = self.budget(flows.shared[m], valid[m]) if self.budget is not None else admit_all(valid[m])
            flows.alpha[m], flows.participation[m], flows.active[m] = admission
        if self.exchange is not None:
            flows.shared = self.exchange(flows.shared, flows.alpha, valid)
        return flows

    def summarise(
        self, flows: Flows, shares: dict[str, Tensor], task: Tensor, u_sh: Tensor, u_pr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled shared and private flows, per window and lifted to R^d: (B, N, M, d) each.

        shares: (B, N, T) per modality, how much of a window a token covers; task: (N,) of each window.
        """
        shared, private = [], []
        for m, pooling, basis in zip(flows.shared, self.pooling, u_pr, strict=True):
            weights = pooling(shares[m], task, (flows.shared[m], u_sh), (flows.private[m], basis))
            shared.append(weights @ flows.shared[m].float() @ u_sh.T)
            private.append(weights @ flows.private[m].float() @ basis.T)
        return torch.stack(shared, dim=2), torch.stack(private, dim=2)


class CLCR(MultimodalModel):
    """Cross-level semantic collaborative representation of two or more modalities."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        super().__init__(config, features, tasks)
        if len(features) < 2:
            raise ConfigError(f"clcr exchanges between modalities: it needs two or more, got {list(features)}")
        model, width = config.model, config.model.width
        self.levels = nn.ModuleList(
            ExchangeLevel(level, len(features), len(tasks), config) for level in range(model.levels)
        )
        self.shared_norm = nn.LayerNorm(width)
        self.private_norm = nn.LayerNorm(width)
        weights = LevelWeights(model.levels, width) if model.level_weights == "learned" else UniformWeights()
        self.aggregation = CoAggregation(width, weights)
        outputs = [task.outputs for task in tasks.values()]
        self.heads = TaskHeads(width * (1 + len(features)), width, outputs, model.dropout)

    def bases(self, level: int) -> tuple[Tensor, dict[str, Tensor]]:
        """U_sh (d, k_s) of a level, and U_pr (d, k_p) of every modality."""
        u_sh, u_pr = self.levels[level].subspaces()
        return u_sh, dict(zip(self.features, u_pr, strict=True))

    def exchange(
        self, tokens: list[dict[str, Tensor]], valid: list[dict[str, Tensor]], present: dict[str, Tensor]
    ) -> list[Flows]:
        """Intra-level exchange of given tokens: H[l][m] (B, T, d), valid (B, T), present (B,)."""
        flows = []
        for level, h, mask in zip(self.levels, tokens, valid, strict=True):
            mask = {m: mask[m] & present[m][:, None] for m in self.features}
            flows.append(level({m: h[m] for m in self.features}, mask, *level.subspaces()))
        return flows

    def forward(self, batch: Batch) -> CLCROutput:
        """Predict every task for a batch; regularisers are computed in training mode only."""
        hierarchy, windows = self.encoder(batch), Windows.of(self.tasks, batch)
        shares = [{m: windows.shares(tokens[m]) for m in self.features} for tokens in hierarchy]
        # A modality is there if it is declared so and has a token; it speaks in the windows that its tokens cover.
        present = torch.stack([hierarchy[0][m].valid.any(dim=1) for m in self.features], dim=1)
        speaks = torch.stack([(shares[0][m] > 0).any(dim=-1) for m in self.features], dim=2)
        bases = [level.subspaces() for level in self.levels]
        flows, pooled = [], []
        for level, tokens, share, basis in zip(self.levels, hierarchy, shares, bases, strict=True):
            flows.append(level(_values(tokens), _valid(tokens), *basis))
            pooled.append(level.summarise(flows[-1], share, windows.task, *basis))
        mask = speaks[:, :, None, :, None]
        shared = self.shared_norm(torch.stack([s for s, _ in pooled], dim=2)).where(mask, 0.0)
        private = self.private_norm(torch.stack([p for _, p in pooled], dim=2)).where(mask, 0.0)
        summary = self.aggregation(shared, private, speaks)
        logits = self.heads(torch.cat([summary.shared, summary.private], dim=-1), windows)
        omega, beta, eta = (windows.task_means(x, speaks) for x in (summary.omega, summary.beta, summary.eta))

        means = [_lifted_means(flow, *basis) for flow, basis in zip(flows, bases, strict=True)]
        losses = {}
        if self.training:  # a collective in evaluation would hang where workers have unequal numbers of batches
            all_shared, all_private = (torch.stack([_stack(mean[i]) for mean in means], dim=1) for i in (0, 1))
            losses = regularizers(all_shared, all_private, omega, present, self.config.loss)
        return CLCROutput(
            logits=dict(zip(self.tasks, logits, strict=True)),
            losses=losses,
            alpha=[flow.alpha for flow in flows],
            valid=[flow.valid for flow in flows],
            participation=[flow.participation for flow in flows],
            budget_active=[flow.active for flow in flows],
            shared=[shared for shared, _ in means],
            private=[private for _, private in means],
            omega=omega.mean(dim=1),
            beta=beta.mean(dim=1),
            eta=eta.mean(dim=1),
            task_omega=dict(zip(self.tasks, omega.unbind(dim=1), strict=True)),
        )

    @torch.no_grad()
    def diagnostics(self, out: CLCROutput, batch: Batch) -> dict[str, Tensor]:
        """Per sample: participation, share of refused tokens, active budget, level and modality weights."""
        values = {}
        for level in range(len(out.alpha)):
            for m in self.features:
                alpha, valid = out.alpha[level][m], out.valid[level][m]
                none = torch.where(valid.any(dim=1), 0.0, torch.nan)  # a missing modality has no share of anything
                values[f"participation/{level}/{m}"] = out.participation[level][m] + none
                values[f"budget_active/{level}/{m}"] = out.budget_active[level][m] + none
                values[f"refused/{level}/{m}"] = ((alpha == 0) & valid).sum(dim=1) / valid.sum(dim=1)
            values[f"omega/{level}"] = out.omega[:, level]
        values["omega_entropy"] = -(out.omega * out.omega.clamp(min=1e-12).log()).sum(dim=1)
        for i, m in enumerate(self.features):
            values[f"beta/{m}"], values[f"eta/{m}"] = out.beta[:, i], out.eta[:, i]
        return values


def _values(tokens: dict[str, Tokens]) -> dict[str, Tensor]:
    return {m: t.values for m, t in tokens.items()}


def _valid(tokens: dict[str, Tokens]) -> dict[str, Tensor]:
    return {m: t.valid for m, t in tokens.items()}


def _stack(by_modality: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(by_modality.values()), dim=1)


def _lifted_means(flows: Flows, u_sh: Tensor, u_pr: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masked means over time of both flows of every modality, in R^d: (B, d)."""
    shared = {m: masked_mean(h.float(), flows.valid[m]) @ u_sh.T for m, h in flows.shared.items()}
    private = {
        m: masked_mean(h.float(), flows.valid[m]) @ basis.T
        for (m, h), basis in zip(flows.private.items(), u_pr, strict=True)
    }
    return shared, private
