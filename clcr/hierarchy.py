"""Semantic-hierarchy encoder: K levels of tokens per modality (CLCR, sec. Semantic-Hierarchy Encoder).

    H[l,m] = LayerNorm(Z[l,m] W[l,m] + P[l,m])            (B, T[l,m], d)

Video and sound pass a temporal convolution network of K stages whose receptive field grows stage by stage (local
appearance, then parts and rhythm, then context); stage l gives Z[l,m]. Language gives hidden layers of its encoder
instead, an early one to a late one. Of frames and sound the layers of a network, (T, L, D), enter the stages one by one
(ours, `--stem.layers`): most such networks see a frame or a moment at a time. P is a learned linear map of sinusoids of
the token's own time in seconds, the same whatever the length of the batch.

Neighbouring tokens of fast inputs (log-mel at 100 Hz) are averaged before the first stage, so that the shallow level
has at most `max_rate` tokens per second; each later stage averages `stride` tokens into one, so exchange gets cheaper
with depth, but never below `min_rate`.
Padding is zeroed before anything looks at a neighbour, and norms are per token: padding never changes a result.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcr.batches import Batch, Features, FeatureSpec
from clcr.config import ModelConfig, StemConfig
from clcr.stems import LayersStem, StagedStem, build_stem

CLIPS_PER_PASS = 8  # of the statistics, which hold clips in float64, some thirty times their bytes


class Tokens(NamedTuple):
    """Tokens of one modality at one level. values: (B, T, d); valid: (B, T) bool.

    spans: (T, 2) float64, the second at which each begins and ends; -inf to inf in a modality without time.
    """

    values: Tensor
    valid: Tensor
    spans: Tensor


class Conv(nn.Module):
    """A convolution over time, (B, T, d) -> (B, T, d)."""

    def __init__(self, width: int, dilation: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=dilation * (kernel // 2), dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d), zero on padding."""
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class ResidualConv(nn.Module):
    """x + Linear(GELU(Conv(LayerNorm(x)))), dilated."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = Conv(width, dilation)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x: (B, T, d); valid: (B, T)."""
        return x + self.dropout(self.out(F.gelu(self.conv(self.norm(x) * valid[..., None]))))


class Merge(nn.Module):
    """Average `stride` neighbouring tokens into one; it is valid if any of them is.

    An average rather than a strided convolution: what it gives depends little on where in its window something
    happens, which a small corpus cannot teach the weights of each offset.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, d), zero on padding; valid: (B, T) -> the same with ceil(T / stride) tokens."""
        if self.stride == 1:
            return x, valid
        missing = -x.shape[1] % self.stride
        x, valid = F.pad(x, (0, 0, 0, missing)), F.pad(valid, (0, missing))
        count = valid.unflatten(1, (-1, self.stride)).sum(dim=2)
        total = x.unflatten(1, (-1, self.stride)).sum(dim=2)
        return total / count.clamp(min=1)[..., None], count > 0


class Stage(nn.Module):
    """One stage of the network: merge, a plain convolution, then residual ones with growing dilation.

    The plain convolution keeps the stem's features from running straight through to every level, as residual ones
    alone would let them. It starts as the identity: three random ones in a row made the deep level so slow to learn
    that only the shallow one was used (GRID, 20 epochs: the picture alone, read at the deep level, .35 instead of .47).
    """

    def __init__(self, stride: int, model: ModelConfig) -> None:
        super().__init__()
        self.merge = Merge(stride)
        self.enter = Conv(model.width)
        nn.init.dirac_(self.enter.conv.weight)
        assert self.enter.conv.bias is not None
        nn.init.zeros_(self.enter.conv.bias)
        self.norm = nn.LayerNorm(model.width)
        self.blocks = nn.ModuleList(ResidualConv(model.width, 2**i, model.dropout) for i in range(model.blocks))

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, d), zero on padding; valid: (B, T) -> the same with ceil(T / stride) tokens."""
        x, valid = self.merge(x, valid)
        x = F.gelu(self.norm(self.enter(x)))
        for block in self.blocks:
            x = block(x, valid)
        return x * valid[..., None], valid


class Position(nn.Module):
    """Learned linear map of sinusoids of the time in seconds, periods from 0.1 s to 100 s."""

    frequencies: Tensor  # a buffer

    def __init__(self, width: int, periods: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi / torch.logspace(-1, 2, periods), persistent=False)
        self.project = nn.Linear(2 * periods, width, bias=False)

    def forward(self, length: int, seconds_per_token: float) -> Tensor:
        """-> (length, d): token k covers [k, k + 1) * seconds_per_token, its time is the middle."""
        times = (torch.arange(length, device=self.frequencies.device) + 0.5) * seconds_per_token
        angles = times[:, None] * self.frequencies
        return self.project(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Level(nn.Module):
    """The end of a stage: H = LayerNorm(Z W + P). timed: whether its tokens have a time, or belong to all of it."""

    def __init__(self, width: int, timed: bool) -> None:
        super().__init__()
        self.timed = timed
        self.project = nn.Linear(width, width)
        self.position = Position(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, valid: Tensor, seconds_per_token: float) -> Tokens:
        """z: (B, T, d); valid: (B, T)."""
        h = self.norm(self.project(z) + self.position(z.shape[1], seconds_per_token))
        edges = torch.arange(z.shape[1] + 1, device=z.device, dtype=torch.float64) * seconds_per_token
        spans = torch.stack([edges[:-1], edges[1:]], dim=1)
        if not self.timed:
            spans = torch.stack([torch.full_like(edges[1:], end) for end in (-math.inf, math.inf)], dim=1)
        return Tokens(h * valid[..., None], valid, spans)


class TemporalHierarchy(nn.Module):
    """Stem and temporal convolution network of one modality; `read`: the stages whose output is wanted."""

    def __init__(self, spec: FeatureSpec, model: ModelConfig, stem: StemConfig, read: Sequence[int]) -> None:
        super().__init__()
        self.seconds = _seconds_per_token(spec)
        self.strides = _strides(spec.rate, model)
        self.stem = self.make_stem(spec, model, stem)
        self.stages = nn.ModuleList(Stage(stride, model) for stride in self.strides)
        self.levels = nn.ModuleDict({str(stage): Level(model.width, spec.rate > 0) for stage in read})

    def make_stem(self, spec: FeatureSpec, model: ModelConfig, stem: StemConfig) -> nn.Module:
        """Differences reach as far as the tokens of the shallow level lie apart."""
        return build_stem(spec, stem, model.width, lag=self.strides[0])

    def forward(self, features: Features) -> list[Tokens]:
        """Tokens of the levels that are read, shallow to deep."""
        entering, valid, seconds, outputs = self.stem(features.values, features.valid), features.valid, self.seconds, []
        x: Tensor | None = None
        for index, (stage, stride) in enumerate(zip(self.stages, self.strides, strict=True)):
            x, valid = stage(self.enter(x, entering, features.valid, index), valid)
            seconds = seconds * stride
            if str(index) in self.levels:
                outputs.append(self.levels[str(index)](x, valid, seconds))
        return outputs

    def enter(self, x: Tensor | None, entering: Tensor, valid: Tensor, stage: int) -> Tensor:
        """What a stage is given: the stem's tokens, later what the stage before found."""
        return entering if x is None else x


class StagedHierarchy(TemporalHierarchy):
    """The same of a network's hidden layers, early to late: every stage is given one more of them.

    A layer of a network that reads frames or moments one by one knows nothing of the others, and what an early one
    holds, a late one may have lost: as levels of their own (GRID, efficientnet_lite0's) CLCR had .37, like this .55.
    """

    def __init__(self, spec: FeatureSpec, model: ModelConfig, stem: StemConfig, read: Sequence[int]) -> None:
        super().__init__(spec, model, stem, read)
        self.merges = nn.ModuleList(Merge(math.prod(self.strides[:stage])) for stage in range(model.levels))

    def make_stem(self, spec: FeatureSpec, model: ModelConfig, stem: StemConfig) -> nn.Module:
        """A vector's stem for each stage's layer."""
        layers, dim = spec.shape
        entering, make = _spread(layers, model.levels), super().make_stem
        return StagedStem([make(replace(spec, shape=(dim,)), model, stem) for _ in entering], entering)

    def enter(self, x: Tensor | None, entering: Tensor, valid: Tensor, stage: int) -> Tensor:
        """What a stage is given: x of the stage before, and its layer's tokens, as far apart."""
        tokens, _ = self.merges[stage](entering[:, :, stage], valid)
        return tokens if x is None else x + tokens


def _spread(layers: int, levels: int) -> list[int]:
    """The layer of each level: from the first to the last; of one level the last."""
    return torch.linspace(0, layers - 1, levels).round().int().tolist() if levels > 1 else [layers - 1]


class LayersHierarchy(nn.Module):
    """Hidden layers of an encoder of text, sound or pictures, early to late: each is a level, no convolution."""

    def __init__(self, spec: FeatureSpec, model: ModelConfig, stem: StemConfig, read: Sequence[int]) -> None:
        super().__init__()
        self.seconds = _seconds_per_token(spec)
        layers, dim = spec.shape
        spread = _spread(layers, model.levels)
        self.stem = LayersStem(layers, dim, model.width, [spread[level] for level in read])
        self.levels = nn.ModuleList(Level(model.width, spec.rate > 0) for _ in read)

    def forward(self, features: Features) -> list[Tokens]:
        """Tokens of the levels that are read, shallow to deep."""
        z = self.stem(features.values, features.valid)
        return [level(z[:, :, i], features.valid, self.seconds) for i, level in enumerate(self.levels)]


def _strides(rate: float, model: ModelConfig) -> list[int]:
    """Tokens merged before each stage: down to max_rate before the first, then by `stride` while min_rate allows."""
    strides = [max(1, math.ceil(rate / model.max_rate))]
    rate /= strides[0]
    for _ in range(model.levels - 1):
        strides.append(model.stride if rate / model.stride >= model.min_rate else 1)
        rate /= strides[-1]
    return strides


def _seconds_per_token(spec: FeatureSpec) -> float:
    return 1.0 / spec.rate if spec.rate > 0 else 1.0


def hierarchy_of(spec: FeatureSpec, stem: StemConfig) -> type[TemporalHierarchy | LayersHierarchy]:
    """What makes levels of a modality's tokens."""
    if len(spec.shape) != 2:
        return TemporalHierarchy
    return StagedHierarchy if stem.staged(spec.rate) else LayersHierarchy


class SemanticHierarchy(nn.Module):
    """All modalities of a batch to levels of tokens; `read`: which of the K levels, shallow to deep."""

    def __init__(
        self, features: Mapping[str, FeatureSpec], model: ModelConfig, stem: StemConfig, read: Sequence[int]
    ) -> None:
        super().__init__()
        self.modalities = tuple(features)
        self.encoders: Any = nn.ModuleList(  # torch has no type for the items of one
            hierarchy_of(spec, stem)(spec, model, stem, read) for spec in features.values()
        )

    def forward(self, batch: Batch) -> list[dict[str, Tokens]]:
        """-> for every level read the tokens of every modality; those of a modality not present are all padding."""
        towers = {}
        for m, encoder in zip(self.modalities, self.encoders, strict=True):
            features = batch.features[m]
            towers[m] = encoder(Features(features.values, features.valid & batch.present[m][:, None]))
        levels = range(len(towers[self.modalities[0]]))
        return [{m: towers[m][level] for m in self.modalities} for level in levels]

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Set the stems' standardisation from training batches."""
        for part in (part for batch in batches for part in batch.split(CLIPS_PER_PASS)):
            for m, encoder in zip(self.modalities, self.encoders, strict=True):
                encoder.stem.observe(part.features[m].values, part.features[m].valid)
        for encoder in self.encoders:
            encoder.stem.fit()


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens: (B, T, d), (B, T) -> (B, d), zero where none is valid."""
    total = values.where(valid[..., None], 0.0).sum(dim=1)
    return total / valid.sum(dim=1, keepdim=True).clamp(min=1)
