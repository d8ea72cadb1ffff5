"""Relations between clips: one graph per modality, and what features are among a clip's neighbours (MM-ORIENT, CMRL).

    A[n]_ij  = cos(e[n]_i, e[n]_j) > threshold[n]            e: a clip's global embedding in n; no gradient through A
    r[m,n]_i = ReLU(W x[m]_i + V mean over j of x[m]_j)      j: clip i itself and its neighbours in A[n] that have m

The released code has unit length in place of the ReLU (`--mm-orient.sage normalised`).

The second line is GraphSAGE with the mean aggregator (Hamilton et al. 2017, arXiv 1706.02216), weights of its own for
every pair: in-modal for m = n, else cross-modal. Features of m meet features of m alone; n only says whose.

A threshold of .9 on raw vectors links all clips of one corpus and none of another, so embeddings are standardised with
training clips and the threshold is the quantile of their pairs that links a chosen share of them.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clcr.batches import Features, FeatureSpec
from clcr.config import MMOrientConfig
from clcr.hierarchy import masked_mean
from clcr.precision import without_autocast
from clcr.regularizers import gather_rows
from clcr.stems import Standardise

GRID = 4  # a clip's mean frame is seen as so many cells per side
START = 0.9  # least cosine before training clips are seen


class Clips(NamedTuple):
    """Clips by what others are compared with or averaged over.

    embeddings: per modality (B, G), unit length; nodes: (B, M, d); pooled: (B, M, d), of HIMA; present: (B, M) bool.
    """

    embeddings: list[Tensor]
    nodes: Tensor
    pooled: Tensor
    present: Tensor

    def of_all_workers(self) -> tuple["Clips", Tensor]:
        """The clips of every worker's batch, with gradient, and which of them each one here is: (B, R) bool."""
        sizes = [e.shape[1] for e in self.embeddings]
        flat = torch.cat([*self.embeddings, self.nodes.flatten(1), self.pooled.flatten(1)], dim=1)
        rows, present = gather_rows(flat, self.present)
        parallel = dist.is_available() and dist.is_initialized()
        first = dist.get_rank() * (len(rows) // dist.get_world_size()) if parallel else 0
        here = torch.arange(flat.shape[0], device=flat.device) + first
        *embeddings, nodes, pooled = rows.split([*sizes, *[self.nodes[0].numel()] * 2], dim=1)
        shape = self.nodes.shape[1:]
        everyone = Clips(embeddings, nodes.unflatten(1, shape), pooled.unflatten(1, shape), present)
        return everyone, torch.arange(rows.shape[0], device=flat.device) == here[:, None]


class GlobalEmbedding(nn.Module):
    """One modality's embedding of a whole clip, the mean of its stored values, standardised; and whom it links."""

    threshold: Tensor  # a buffer

    def __init__(self, spec: FeatureSpec, config: MMOrientConfig) -> None:
        super().__init__()
        self.spec, self.linked, self.fixed = spec, config.linked, config.threshold is not None
        self.dim = 3 * GRID * GRID if len(spec.shape) == 3 else spec.shape[-1]
        self.standardise = Standardise(self.dim)
        self.register_buffer("threshold", torch.tensor(config.threshold if self.fixed else START))
        self.observed: list[Tensor] = []

    def observe(self, features: Features) -> None:
        """Add a training batch to the statistics."""
        self.observed.append(self._raw(features)[features.valid.any(dim=1)])

    def fit(self) -> None:
        """Set standardisation and threshold from what was observed; a fixed threshold stays, on raw vectors."""
        rows, self.observed = torch.cat(self.observed), []
        if self.fixed or len(rows) < 2:
            return
        self.standardise.observe(rows[:, None], torch.ones_like(rows[:, :1], dtype=torch.bool))
        self.standardise.fit()
        unit = F.normalize(self.standardise(rows), dim=-1)
        first, second = torch.triu_indices(len(unit), len(unit), offset=1)
        self.threshold.copy_((unit @ unit.T)[first, second].quantile(1 - self.linked))

    def vector(self, features: Features) -> Tensor:
        """(B, G), standardised unless the threshold is fixed."""
        raw = self._raw(features)
        return raw if self.fixed else self.standardise(raw)

    def links(self, clips: Tensor, others: Tensor) -> Tensor:
        """Which others each clip is linked with: unit vectors (B, G), (R, G) -> (B, R) bool."""
        with without_autocast(clips):
            return clips.detach() @ others.detach().T > self.threshold

    def _raw(self, features: Features) -> Tensor:
        """(B, G): mean over time of a clip's vectors, of their last layer, or of frames as a coarse grid of colours."""
        values = features.values[:, :, -1] if len(self.spec.shape) == 2 else features.values
        values = values.float()
        mean = masked_mean(values.where(values.isfinite(), 0.0).flatten(2), features.valid)
        if len(self.spec.shape) < 3:
            return mean
        frame = rearrange(mean, "b (h w c) -> b c h w", h=self.spec.shape[0], c=3)
        return F.adaptive_avg_pool2d(frame, GRID).flatten(1)


class NeighbourMean(nn.Module):
    """GraphSAGE with the mean aggregator, one layer; normalised: to unit length, without an activation."""

    def __init__(self, width: int, normalised: bool = False) -> None:
        super().__init__()
        self.normalised = normalised
        self.own = nn.Linear(width, width)
        self.around = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, others: Tensor, links: Tensor) -> Tensor:
        """x: (B, d); others: (R, d); links: (B, R) bool, without a clip's own -> (B, d)."""
        weights = links.float()
        mean = (x + weights @ others) / (1 + weights.sum(dim=1, keepdim=True))
        joined = self.own(x) + self.around(mean)
        return F.normalize(joined, dim=-1) if self.normalised else F.relu(joined)


class Relations(nn.Module):
    """In-modal and cross-modal features of every modality along the graph of every modality."""

    def __init__(self, modalities: int, width: int, normalised: bool = False) -> None:
        super().__init__()
        self.along: Any = nn.ModuleList(  # torch has no type for the items of one
            nn.ModuleList(NeighbourMean(width, normalised) for _ in range(modalities)) for _ in range(modalities)
        )

    def forward(self, clips: Clips, others: Clips, links: list[Tensor]) -> Tensor:
        """links: per modality's graph (B, R) -> (B, M, M, d), features of the first M along the graph of the second.

        Zero for a modality that a clip lacks; along the graph of one that it lacks it has no neighbours.
        """
        rows = []
        for m, layers in enumerate(self.along):
            row = [
                layer(clips.nodes[:, m], others.nodes[:, m], links[n] & others.present[:, m])
                for n, layer in enumerate(layers)
            ]
            rows.append(torch.stack(row, dim=1) * clips.present[:, m, None, None])
        return torch.stack(rows, dim=1)
