"""CLCR (arXiv 2602.19605): hierarchy, intra-level exchange, inter-level aggregation, heads, regularisers - in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, cast

import torch
from torch import Tensor, nn

from clcr.aggregation import Synchronise, TaskHeads, TimePooling, co_aggregation, own_heads
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.budget import NoBudget, TokenBudget
from clcr.config import CLCRConfig, ModelConfig
from clcr.errors import ConfigError
from clcr.exchange import CoExchange, places
from clcr.hierarchy import masked_mean
from clcr.precision import without_autocast
from clcr.regularizers import Rows, regularizers
from clcr.subspaces import Subspaces, WholeSpace
from clcr.tasks import TaskSpec
from clcr.windows import Windows


@dataclass
class Flows:
    """One level after the exchange, by modality.

    shared: (B, T, k_s) coordinates in u_sh (d, k_s); private: (B, T, k_p) in u_pr (d, k_p); own: (B, T, k_s) shared
    flows before the exchange; valid, alpha: (B, T); active: (B,) whether the budget bound.
    """

    u_sh: Tensor
    u_pr: dict[str, Tensor]
    shared: dict[str, Tensor]
    private: dict[str, Tensor]
    own: dict[str, Tensor]
    valid: dict[str, Tensor]
    alpha: dict[str, Tensor]
    active: dict[str, Tensor]

    def participation(self) -> dict[str, Tensor]:
        """Share of the tokens that take part, by weight: (B,)."""
        return {m: a.sum(dim=1) / self.valid[m].sum(dim=1).clamp(min=1) for m, a in self.alpha.items()}

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Masked means over time of shared flows, private ones, and shared ones before, lifted to R^d: (B, d)."""
        u_sh = dict.fromkeys(self.valid, self.u_sh)
        with without_autocast(self.u_sh):
            return self._lifted(self.shared, u_sh), self._lifted(self.private, self.u_pr), self._lifted(self.own, u_sh)

    def _lifted(self, flow: dict[str, Tensor], bases: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m: masked_mean(h.float(), self.valid[m]) @ bases[m].T for m, h in flow.items()}


@dataclass
class CLCROutput(Output):
    """A forward pass. Lists are over the levels in use, shallow to deep; dicts over modalities.

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


class IntraCED(nn.Module):
    """Subspaces, budget and exchange of levels that exchange together: one, or (ablation) all of them mixed."""

    def __init__(self, modalities: int, start: float, config: CLCRConfig, mixed: bool) -> None:
        super().__init__()
        model, whole = config.model, config.model.exchange == "whole"
        self.space = "coordinates" if whole else model.space
        self.subspaces = (
            WholeSpace(modalities, model.width)
            if whole
            else Subspaces(modalities, model.width, model.k_shared, model.k_private)
        )
        budgeted = model.exchange == "budgeted"
        self.budget = TokenBudget(model.k_shared, start, config.budget) if budgeted else NoBudget()
        self.exchange = None
        if model.exchange != "none":
            self.exchange = CoExchange(
                model.exchange_width,
                model.heads,
                model.dropout,
                model.null_logit if model.null_key else None,
                model.nearest,
                model.farthest,
                model.drop_answer,
                model.alike,
                mixed and model.untimed == "average",
            )

    def forward(
        self, tokens: list[dict[str, Tensor]], valid: list[dict[str, Tensor]], spans: list[dict[str, Tensor]] | None
    ) -> list[Flows]:
        """tokens: (B, T, d), valid: (B, T) and spans: (T, 2), of each level by modality; their order means nothing."""
        u_sh, u_pr = self.subspaces()
        u_pr = dict(zip(tokens[0], u_pr, strict=True))
        h, mask = _join(tokens), _join(valid)
        own = {m: h[m] @ u_sh for m in h}
        admitted = {m: self.budget(own[m], mask[m]) for m in h}
        alpha = {m: admission.alpha for m, admission in admitted.items()}
        active = {m: admission.active for m, admission in admitted.items()}
        joined = _join(spans, dim=-2) if spans else None
        if self.space == "lifted":
            own = {m: x @ u_sh.T for m, x in own.items()}
            u_sh = torch.eye(len(u_sh), device=u_sh.device)
        if self.exchange is None:
            shared = own
        elif self.space == "tokens":
            h = self.exchange(h, alpha, mask, joined)
            shared = {m: x @ u_sh for m, x in h.items()}
        else:
            shared = self.exchange(own, alpha, mask, joined)
        private = {m: h[m] @ u_pr[m] for m in h}
        split = [_split(x, tokens) for x in (shared, private, own)]
        levels = zip(split[0], split[1], split[2], valid, _split(alpha, tokens), strict=True)
        return [Flows(u_sh, u_pr, s, p, o, v, a, active) for s, p, o, v, a in levels]


class Summary(nn.Module):
    """How the tokens of one level become summaries."""

    def __init__(self, modalities: int, tasks: int, model: ModelConfig) -> None:
        super().__init__()
        self.pooling = nn.ModuleList(TimePooling(tasks, model.width, model.pooling) for _ in range(modalities))

    def forward(self, flows: Flows, shares: dict[str, Tensor], task: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled shared and private flows, per window and lifted to R^d: (B, N, M, d) each.

        shares: (B, N, T) per modality, how much of a window a token covers; task: (N,) of each window.
        """
        shared, private = [], []
        for m, module in zip(flows.shared, self.pooling, strict=True):
            pooling = cast(TimePooling, module)
            weights = pooling(shares[m], task, (flows.shared[m], flows.u_sh), (flows.private[m], flows.u_pr[m]))
            shared.append(pooling.pool(weights, flows.shared[m], flows.u_sh))
            private.append(pooling.pool(weights, flows.private[m], flows.u_pr[m]))
        return torch.stack(shared, dim=2), torch.stack(private, dim=2)


class CLCR(MultimodalModel):
    """Cross-level semantic collaborative representation of two or more modalities."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        if len(features) < 2:
            raise ConfigError(f"clcr exchanges between modalities: it needs two or more, got {list(features)}")
        model, width, levels = config.model, config.model.width, range(config.model.levels)
        # The levels of the encoder that are read, and which of these exchange together.
        read, groups = {
            "levels": (levels, [[level] for level in levels]),
            "deepest": (levels[-1:], [[0]]),
            "repeated": (levels[-1:], [[level] for level in levels]),
            "mixed": (levels, [list(levels)]),
        }[model.hierarchy]
        super().__init__(config, features, tasks, read)
        self.groups = groups
        self.repeats = model.levels if model.hierarchy == "repeated" else 1
        used = range(sum(map(len, groups)))
        starts = [config.budget_start(level) for level in (levels if len(used) > 1 else read)]
        mixed = len({spec.rate > 0 for spec in features.values()}) > 1
        self.intra: Any = nn.ModuleList(  # torch has no type for the items of one
            IntraCED(len(features), mean(starts[level] for level in group), config, mixed) for group in groups
        )
        self.summaries: Any = nn.ModuleList(Summary(len(features), len(tasks), model) for _ in used)
        self.shared_norm = nn.LayerNorm(width)
        self.private_norm = nn.LayerNorm(width)
        self.synchronise = Synchronise(len(used), len(features), width) if model.synchronise else None
        self.inter = co_aggregation(model.aggregation, len(used), width)
        outputs = [task.outputs for task in tasks.values()]
        self.heads = TaskHeads(width * (1 + len(features)), width, outputs, model.dropout)
        self.own_heads = own_heads(len(features), width * len(used), width, outputs, config)
        # Without subspaces there are no flows to keep apart; only the levels' mixing is left to regularise.
        self.loss = replace(config.loss, lambda_intra=0.0, pr=0.0, sp=0.0) if model.exchange == "whole" else config.loss

    def bases(self, level: int) -> tuple[Tensor, dict[str, Tensor]]:
        """U_sh (d, k_s) of a level in use, and U_pr (d, k_p) of every modality."""
        intra = next(intra for intra, group in zip(self.intra, self.groups, strict=True) if level in group)
        u_sh, u_pr = intra.subspaces()
        return u_sh, dict(zip(self.features, u_pr, strict=True))

    def exchange(
        self,
        tokens: list[dict[str, Tensor]],
        valid: list[dict[str, Tensor]],
        present: dict[str, Tensor],
        spans: list[dict[str, Tensor]] | None = None,
    ) -> list[Flows]:
        """Exchange of given tokens: H[l][m] (B, T, d), valid (B, T), present (B,), of the levels in use.

        spans: (T, 2), the seconds of each token; without them none is near another in time.
        """
        tokens = [{m: h[m] for m in self.features} for h in tokens]
        valid = [{m: mask[m] & present[m][:, None] for m in self.features} for mask in valid]
        untimed = [m for m, spec in self.features.items() if spec.rate <= 0]
        average = self.config.model.untimed == "average"
        placed = len(untimed) > 1 and not (average and len(untimed) < len(self.features))  # a place is no second
        if spans and self.config.model.by_index and placed:
            spans = [places(span, mask, untimed, average) for span, mask in zip(spans, valid, strict=True)]
        flows = []
        for intra, group in zip(self.intra, self.groups, strict=True):
            of_group = ([values[level] for level in group] if values else None for values in (tokens, valid, spans))
            flows += intra(*of_group)
        return flows

    def forward(self, batch: Batch) -> CLCROutput:
        """Predict every task for a batch; regularisers are computed in training mode only."""
        hierarchy, windows = self.encoder(batch) * self.repeats, Windows.of(self.tasks, batch)
        # A modality is there if it is declared so and has a token; it speaks in the windows that its tokens cover.
        present = torch.stack([batch.present[m] & hierarchy[0][m].valid.any(dim=1) for m in self.features], dim=1)
        shares = [{m: windows.shares(level[m]) for m in self.features} for level in hierarchy]
        speaks = torch.stack([(shares[0][m] > 0).any(dim=-1) for m in self.features], dim=2) & present[:, None]
        tokens = [{m: t.values for m, t in level.items()} for level in hierarchy]
        valid = [{m: t.valid for m, t in level.items()} for level in hierarchy]
        spans = [{m: t.spans for m, t in level.items()} for level in hierarchy]
        flows = self.exchange(tokens, valid, batch.present, spans)
        levels = zip(self.summaries, flows, shares, strict=True)
        pooled = [summarise(flow, share, windows.task) for summarise, flow, share in levels]
        mask = speaks[:, :, None, :, None]
        shared = self.shared_norm(torch.stack([s for s, _ in pooled], dim=2)).where(mask, 0.0)
        private = self.private_norm(torch.stack([p for _, p in pooled], dim=2)).where(mask, 0.0)
        levelled = self.synchronise(shared, private) if self.synchronise is not None else (shared, private)
        summary = self.inter(*levelled, speaks)
        if self.config.model.absent == "zeros":
            summary = summary.with_zeros(speaks)
        logits = self.heads(torch.cat([summary.shared, summary.private], dim=-1), windows)
        omega, beta, eta = (windows.task_means(x, speaks) for x in (summary.omega, summary.beta, summary.eta))

        means = [flow.means() for flow in flows]
        losses, unimodal = {}, {}
        if self.training:  # a collective in evaluation would hang where workers have unequal numbers of batches
            rows = [torch.stack([_stack(mean[i]) for mean in means], dim=1) for i in range(3)]
            mixed = rows[0]
            if self.loss.regularised == "summaries":
                rows[:2] = (windows.mean(x, speaks) for x in (shared, private))
                mixed = windows.mean(levelled[0], speaks)
            losses = regularizers(Rows(rows[0], rows[1], rows[2], mixed), omega, present, self.loss)
            if self.own_heads:  # what each modality says before the exchange
                unimodal = self.by_themselves(self._before(tokens, shares, windows), windows)
        return CLCROutput(
            logits=dict(zip(self.tasks, logits, strict=True)),
            losses=losses,
            unimodal=unimodal,
            alpha=[flow.alpha for flow in flows],
            valid=[flow.valid for flow in flows],
            participation=[flow.participation() for flow in flows],
            budget_active=[flow.active for flow in flows],
            shared=[mean[0] for mean in means],
            private=[mean[1] for mean in means],
            omega=omega.mean(dim=1),
            beta=beta.mean(dim=1),
            eta=eta.mean(dim=1),
            task_omega=dict(zip(self.tasks, omega.unbind(dim=1), strict=True)),
        )

    def _before(
        self, tokens: list[dict[str, Tensor]], shares: list[dict[str, Tensor]], windows: Windows
    ) -> list[Tensor]:
        """Each modality's summaries of its tokens (B, T, d) before any exchange, all levels: (B, N, K * d)."""
        return [
            torch.cat(
                [
                    summarise.pooling[i].summary(level[m], share[m], windows.task)
                    for summarise, level, share in zip(self.summaries, tokens, shares, strict=True)
                ],
                dim=-1,
            )
            for i, m in enumerate(self.features)
        ]

    @torch.no_grad()
    def diagnostics(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """Per sample: participation, share of refused tokens, active budget, level and modality weights."""
        assert isinstance(out, CLCROutput)
        assert out.omega is not None and out.beta is not None and out.eta is not None
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
            none = torch.where(out.valid[0][m].any(dim=1), 0.0, torch.nan)  # there is no gate to open
            values[f"beta/{m}"], values[f"eta/{m}"] = out.beta[:, i], out.eta[:, i] + none
        return values


def _join(levels: list[dict[str, Tensor]], dim: int = 1) -> dict[str, Tensor]:
    """The tokens of all levels behind each other, by modality; dim: which of theirs counts tokens."""
    return {m: torch.cat([level[m] for level in levels], dim=dim) for m in levels[0]}


def _split(joined: dict[str, Tensor], levels: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Inverse of `_join`, by the lengths of the given levels."""
    parts = {m: x.split([level[m].shape[1] for level in levels], dim=1) for m, x in joined.items()}
    return [{m: parts[m][i] for m in joined} for i in range(len(levels))]


def _stack(by_modality: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(by_modality.values()), dim=1)
