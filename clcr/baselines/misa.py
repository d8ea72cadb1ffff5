"""MISA: modality-invariant and modality-specific representations (Hazarika et al. 2020, arXiv 2005.03545).

    c[m] = E_c(P[m] u[m])   one encoder for all modalities         p[m] = E[m](P[m] u[m])   one for each
    y^ = head(concat of the 2 M vectors after attending to each other)
    L = L_task + a L_sim + b L_diff + g L_recon
    L_sim    mean over pairs of CMD_5(c[m], c[n]), the central moment discrepancy (Zellinger et al. 2017)
    L_diff   mean over m of |C[m]^T P[m]|^2 / n^2 and over pairs of |P[m]^T P[n]|^2 / n^2, n centred rows of unit length
    L_recon  mean over m of |u[m] - D[m](c[m] + p[m])|^2 / d

u[m] is a modality's pooled summary of a task or bin. L_diff is at most 1 for any width, batch, number of tasks and of
modalities. Rows come from all workers. u[m] is a constant of L_recon: else an encoder learned from scratch lowers it by
summaries that are the same for every clip.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clcr.aggregation import TaskHeads, TimePooling
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig, MISAConfig
from clcr.errors import ConfigError
from clcr.precision import without_autocast
from clcr.regularizers import gather_rows
from clcr.tasks import TaskSpec
from clcr.windows import Windows

MOMENTS = 5
EPSILON = 1e-6


class MISA(MultimodalModel):
    """Shared and private parts of every modality, fused by attention; those of a missing modality are left out."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        if len(features) < 2:
            raise ConfigError(f"misa looks for what modalities share: it needs two or more, got {list(features)}")
        model, width = config.model, config.model.width
        if width % model.heads:
            raise ConfigError(f"--model.heads {model.heads}: must divide --model.width {width} for misa")
        super().__init__(config, features, tasks, levels=[model.levels - 1])
        self.pooling = nn.ModuleList(TimePooling(len(tasks), width, model.pooling) for _ in features)
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in features
        )
        # Sigmoids bound the parts to [0, 1], the interval that CMD is defined on.
        self.shared = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
        self.private = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for _ in features)
        self.restore = nn.ModuleList(nn.Linear(width, width) for _ in features)
        self.fusion = nn.TransformerEncoderLayer(width, model.heads, 2 * width, model.dropout, batch_first=True)
        outputs = [task.outputs for task in tasks.values()]
        self.heads = TaskHeads(2 * len(features) * width, width, outputs, model.dropout)

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        (deepest,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        summaries, presence = [], []
        for tokens, pooling, project in zip(deepest.values(), self.pooling, self.project, strict=True):
            shares = windows.shares(tokens)
            summaries.append(project(pooling.summary(tokens.values, shares, windows.task)))
            presence.append((shares > 0).any(dim=-1))
        u, present = torch.stack(summaries, dim=2), torch.stack(presence, dim=2)  # (B, N, M, d), (B, N, M)
        shared = self.shared(u)
        private = torch.stack([encode(u[:, :, m]) for m, encode in enumerate(self.private)], dim=2)
        logits = self.heads(self._fuse(shared, private, present), windows)
        losses = {}
        if self.training:
            restored = [decode((shared + private)[:, :, m]) for m, decode in enumerate(self.restore)]
            losses = self._losses(u, shared, private, torch.stack(restored, dim=2), present)
        return Output(logits=dict(zip(self.tasks, logits, strict=True)), losses=losses)

    def _fuse(self, shared: Tensor, private: Tensor, present: Tensor) -> Tensor:
        """(B, N, M, d) twice, (B, N, M) -> (B, N, 2 M d), zero for what is missing."""
        # Centred: what all clips have in common (a sigmoid's .5) hides what they differ by.
        parts = 2 * rearrange([shared, private], "k b n m d -> (b n) (k m) d") - 1
        known = rearrange(torch.stack([present, present]), "k b n m -> (b n) (k m)")
        # Where nothing is present all are read, which gives no NaN, and set to zero after.
        fused = self.fusion(parts, src_key_padding_mask=~known & known.any(dim=1, keepdim=True))
        fused = fused.float() * known[..., None]
        return rearrange(fused, "(b n) k d -> b n (k d)", b=present.shape[0])

    def _losses(
        self, u: Tensor, shared: Tensor, private: Tensor, restored: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The weighted losses; everything (B, N, M, d)."""
        with without_autocast(u):
            rows = torch.stack([u, shared, private, restored], dim=2).float().flatten(0, 1)
            even = not any(task.rate for task in self.tasks.values())  # how many bins there are differs by worker
            rows, present = gather_rows(rows, present.flatten(0, 1), even)
            of_u, of_shared, of_private, of_restored = (rows[:, i].unbind(dim=1) for i in range(4))
            return weighted_losses(of_u, of_shared, of_private, of_restored, present, self.config.misa)


def weighted_losses(
    u: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    private: tuple[Tensor, ...],
    restored: tuple[Tensor, ...],
    present: Tensor,
    weights: MISAConfig,
) -> dict[str, Tensor]:
    """MISA's three losses of every modality's rows (n, d); present: (n, M), which rows each modality has."""
    modalities = range(len(u))
    pairs = list(combinations(modalities, 2))
    similarity = [central_moment_discrepancy(shared[m], shared[n], present[:, m] & present[:, n]) for m, n in pairs]
    overlaps = [overlap(shared[m], private[m], present[:, m]) for m in modalities]
    overlaps += [overlap(private[m], private[n], present[:, m] & present[:, n]) for m, n in pairs]
    errors = [_mean((u[m].detach() - restored[m]).square(), present[:, m]).mean() for m in modalities]
    return {
        "similarity": weights.similarity * torch.stack(similarity).mean(),
        "difference": weights.difference * torch.stack(overlaps).mean(),
        "reconstruction": weights.reconstruction * torch.stack(errors).mean(),
    }


def central_moment_discrepancy(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """CMD_5 of rows in [0, 1]: distance of the means, plus those of the central moments 2 to 5. x, y: (n, d)."""
    means = _mean(x, mask), _mean(y, mask)
    total = _length(means[0] - means[1])
    x, y = x - means[0], y - means[1]
    for power in range(2, MOMENTS + 1):
        total = total + _length(_mean(x**power, mask) - _mean(y**power, mask))
    return total


def overlap(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """|X^T Y|^2 / n^2 in [0, 1]: mean of <x_i, x_j> <y_i, y_j>, rows centred over the batch and of unit length.

    x, y: (n, d).
    """
    x, y = (F.normalize(rows - _mean(rows, mask), dim=-1, eps=EPSILON) * mask[:, None] for rows in (x, y))
    return (x.T @ y).square().sum() / mask.sum().clamp(min=1) ** 2


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    return rows.where(mask[:, None], 0.0).sum(dim=0) / mask.sum().clamp(min=1)


def _length(vector: Tensor) -> Tensor:
    return (vector.square().sum() + EPSILON**2).sqrt()  # a plain norm has no gradient at zero
