"""Windows: the stretch of a clip's time that one prediction is about (CLCR, sec. InterCAD, for temporal tasks too).

A task of the whole clip has one window, events have one per bin; all tasks' windows lie side by side on one axis N, so
that pooling, aggregation and heads are the same for both. A token belongs to every window that it overlaps, with the
share of the window that it covers: coarse levels, whose tokens outlast a bin, speak in each bin that they cover.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clcr.batches import Batch
from clcr.hierarchy import Tokens
from clcr.tasks import TaskSpec

TOUCHING = 1e-6  # seconds; a token and a bin that share less only touch, up to rounding


@dataclass(frozen=True)
class Windows:
    """The windows of a batch's tasks. rates: bins per second of each task, 0 = the whole clip; counts: windows of it.

    task: (N,) which task each window belongs to, N = sum of counts; own: (B, N) bool, False for bins beyond a clip's.
    """

    rates: tuple[float, ...]
    counts: tuple[int, ...]
    task: Tensor
    own: Tensor

    @classmethod
    def of(cls, tasks: Mapping[str, TaskSpec], batch: Batch) -> "Windows":
        """One window per task, or per bin of its targets."""
        counts, own, index = [], [], []
        for number, (name, task) in enumerate(tasks.items()):
            target = batch.targets[name]
            counts.append(target.shape[1] if task.rate else 1)
            bins = torch.arange(counts[-1], device=target.device)
            own.append(bins < (batch.bins[name][:, None] if task.rate else torch.ones_like(target[:, None])))
            index.append(torch.full_like(bins, number))
        return cls(tuple(t.rate for t in tasks.values()), tuple(counts), torch.cat(index), torch.cat(own, dim=1))

    def shares(self, tokens: Tokens) -> Tensor:
        """How much of each window each token covers, (B, N, T); of a whole clip one for each token.

        Zero for tokens that are padding, and in bins beyond the clip's own: whose they are depends on the batch.
        """
        begin, end = tokens.spans.unbind(dim=1)
        parts = []
        for rate, count in zip(self.rates, self.counts, strict=True):
            if not rate:
                parts.append(torch.ones_like(begin)[None])
                continue
            edges = torch.arange(count + 1, device=begin.device, dtype=begin.dtype)[:, None] / rate
            overlap = torch.minimum(end, edges[1:]) - torch.maximum(begin, edges[:-1])
            parts.append((overlap * rate).where(overlap > TOUCHING, 0.0))
        return torch.cat(parts).float() * (tokens.valid[:, None] & self.own[..., None])

    def split(self, values: Tensor) -> list[Tensor]:
        """(B, N, ...) by task: (B, ...), of events (B, bins, ...)."""
        parts = values.split(self.counts, dim=1)
        return [part if rate else part.squeeze(1) for rate, part in zip(self.rates, parts, strict=True)]

    def mean(self, summaries: Tensor, speaks: Tensor) -> Tensor:
        """Mean over the windows in which a modality speaks: (B, N, K, M, d), (B, N, M) -> (B, K, M, d), else zero."""
        weights = speaks.float() / speaks.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bnm,bnkmd->bkmd", weights, summaries.float())

    def task_means(self, values: Tensor, present: Tensor) -> Tensor:
        """Mean over each task's windows in which a modality is present: (B, N, X), (B, N, M) -> (B, tasks, X)."""
        means = []
        for part, spoken in zip(values.split(self.counts, dim=1), present.split(self.counts, dim=1), strict=True):
            known = spoken.any(dim=-1, keepdim=True)
            known = known | ~known.any(dim=1, keepdim=True)  # of a clip without any modality: all
            means.append((part * known).sum(dim=1) / known.sum(dim=1))
        return torch.stack(means, dim=1)
