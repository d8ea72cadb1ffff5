"""Stems: stored feature values of one modality -> token features, (B, T, *shape) -> (B, T, width).

Vectors are standardised and projected; hidden layers of a network likewise, each by maps of its own; frames go
through linear patches, a small convolutional trunk or ResNet-18. What labels a clip is often what moves in it: with
`motion` the clip's mean is removed and temporal differences are added, while the mean itself (a voice's timbre; of
frames a coarse copy: static colour, layout) is added to every token, so nothing is thrown away.

Standardisation lives in buffers: `observe` training batches, then `fit`; until then they are neutral.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcr.batches import FeatureSpec
from clcr.config import StemConfig
from clcr.precision import without_autocast

MOST_PATCHES = 24  # per side of a frame
CLIP = 10.0  # standard deviations: broken values (NaN, infinities, +-255 in a unit feature) must not own a sum


class Moments:
    """Running mean and standard deviation over the leading axes, in float64; non-finite values are left out."""

    def __init__(self) -> None:
        self.count: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor, axes: int) -> None:
        """Add values whose last `axes` axes are features."""
        rows = values.double().flatten(0, values.ndim - axes - 1)
        finite = rows.isfinite()
        rows = rows.where(finite, 0.0)
        self.count = self.count + finite.sum(0)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def mean(self) -> Tensor:
        """Mean per feature."""
        return self.total / torch.as_tensor(self.count).clamp(min=1)

    def std(self) -> Tensor:
        """Standard deviation per feature; 1 where a feature is constant."""
        variance = self.squares / torch.as_tensor(self.count).clamp(min=1) - self.mean().square()
        std = variance.clamp(min=0).sqrt()
        return std.where(std > 1e-6 * (1 + self.mean().abs()), torch.ones_like(std))


class Standardise(nn.Module):
    """(x - mean) / std per feature; broken values (NaN, infinities) become ordinary ones."""

    mean: Tensor  # both are buffers
    std: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.moments = Moments()

    def observe(self, values: Tensor, valid: Tensor) -> None:
        """Add the valid tokens of a training batch to the statistics."""
        self.moments.add(values[valid], axes=self.mean.ndim)

    def fit(self) -> None:
        """Set the standardisation from what was observed."""
        self.mean.copy_(self.moments.mean())
        self.std.copy_(self.moments.std())
        self.moments = Moments()

    def forward(self, values: Tensor) -> Tensor:
        """values: (..., *shape), any dtype -> float32."""
        return ((values.float() - self.mean) / self.std).nan_to_num(0.0, CLIP, -CLIP).clamp(-CLIP, CLIP)


class VectorStem(nn.Module):
    """Standardise and project vectors: (B, T, D) -> (B, T, width).

    With motion: what moves, and its differences. A rhythm in log-mel is small compared with the spectrum that carries
    it: without this it stayed at chance, with it it was learned at once (synthetic corpus, 1,200 clips, 4 epochs).
    Differences span `lag` tokens: of log-mel's neighbours, 10 ms apart, they are mostly noise (GRID, sound alone: .83
    after 20 epochs, .88 with the 40 ms from one token of the shallow level to the next).
    """

    moving_std: Tensor  # both are buffers
    step_std: Tensor

    def __init__(self, dim: int, width: int, motion: bool, lag: int = 1) -> None:
        super().__init__()
        self.motion = motion
        self.lag = lag
        self.standardise = Standardise(dim)
        self.project = nn.Linear(2 * dim if motion else dim, width)
        if motion:
            self.scene = _from_zero(dim, width)
            self.register_buffer("moving_std", torch.ones(dim))
            self.register_buffer("step_std", torch.ones(dim))
            self.moving, self.steps = Moments(), Moments()

    def observe(self, values: Tensor, valid: Tensor) -> None:
        """Add a training batch to the statistics."""
        self.standardise.observe(values, valid)
        if self.motion:
            values = _mask(values.float(), valid)
            moving = values - _clip_mean(values, valid)
            self.moving.add(moving[valid & _moves(valid, valid.ndim)], axes=1)
            steps, known = _differences(moving, valid, self.lag)
            self.steps.add(steps[known], axes=1)

    def fit(self) -> None:
        """Set the standardisation from what was observed."""
        self.standardise.fit()
        if self.motion:
            for buffer, moments in ((self.moving_std, self.moving), (self.step_std, self.steps)):
                std = moments.std() / self.standardise.std
                buffer.copy_(std.clamp(min=0.1))  # what never moves must not have its noise amplified
            self.moving, self.steps = Moments(), Moments()

    def forward(self, values: Tensor, valid: Tensor) -> Tensor:
        """values: (B, T, D); valid: (B, T) -> (B, T, width), zero on padding."""
        x = self.standardise(values)
        if not self.motion:
            return _mask(self.project(x), valid)
        mean = _clip_mean(x, valid)
        moves = _moves(valid, x.ndim)
        moving = x - mean.where(moves, 0.0)
        steps = _differences(moving, valid, self.lag)[0] / self.step_std
        tokens = self.project(torch.cat([torch.where(moves, moving / self.moving_std, moving), steps], dim=-1))
        return _mask(tokens + self.scene(mean), valid)


class LayersStem(nn.Module):
    """Hidden layers of a network: (B, T, L, D) -> (B, T, picks, width), each pick projected by its own map."""

    def __init__(self, layers: int, dim: int, width: int, picks: list[int]) -> None:
        super().__init__()
        self.picks = picks
        self.standardise = Standardise(layers, dim)
        self.project = nn.ModuleList(nn.Linear(dim, width) for _ in picks)

    def observe(self, values: Tensor, valid: Tensor) -> None:
        """Add a training batch to the statistics."""
        self.standardise.observe(values, valid)

    def fit(self) -> None:
        """Set the standardisation from what was observed."""
        self.standardise.fit()

    def forward(self, values: Tensor, valid: Tensor) -> Tensor:
        """values: (B, T, L, D); valid: (B, T) -> (B, T, picks, width), zero on padding."""
        values = self.standardise(values)
        picked = [project(values[:, :, i]) for project, i in zip(self.project, self.picks, strict=True)]
        return _mask(torch.stack(picked, dim=2), valid)


class StagedStem(nn.Module):
    """Hidden layers of a network, one for each stage: (B, T, L, D) -> (B, T, stages, width)."""

    def __init__(self, parts: Sequence[nn.Module], entering: Sequence[int]) -> None:
        super().__init__()
        self.entering = entering
        self.parts: Any = nn.ModuleList(parts)

    def observe(self, values: Tensor, valid: Tensor) -> None:
        """Add a training batch to the statistics."""
        for part, i in zip(self.parts, self.entering, strict=True):
            part.observe(values[:, :, i], valid)

    def fit(self) -> None:
        """Set the standardisation from what was observed."""
        for part in self.parts:
            part.fit()

    def forward(self, values: Tensor, valid: Tensor) -> Tensor:
        """values: (B, T, L, D); valid: (B, T) -> (B, T, stages, width), zero on padding."""
        several = [part(values[:, :, i], valid) for part, i in zip(self.parts, self.entering, strict=True)]
        return torch.stack(several, dim=2)


class FrameStem(nn.Module):
    """Frames to tokens: (B, T, H, W, 3) -> (B, T, width).

    Frames are averaged over patches of `patch` pixels (1: left as they are) and go through `embed`, a network from
    (N, C, H, W) to (N, features); C = 3, or 6 with motion: what moves, and its differences, both scaled per pixel.
    """

    mean: Tensor  # all four are buffers
    std: Tensor
    moving_std: Tensor
    step_std: Tensor

    def __init__(
        self,
        embed: nn.Module,
        features: int,
        size: tuple[int, int],
        patch: int,
        width: int,
        motion: bool,
        lag: int,
        shift: float,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.lag = lag
        self.shift = shift
        self.embed = embed
        self.motion = motion
        self.project = nn.Linear(features, width)
        # Neutral start: pixels to about [-1, 1], what moves to about unit size.
        self.register_buffer("mean", torch.full((3,), 127.5))
        self.register_buffer("std", torch.full((3,), 127.5))
        self.pixels, self.moving, self.steps = Moments(), Moments(), Moments()
        if motion:
            self.scene = _from_zero(3 * 4 * 4, width)
            self.register_buffer("moving_std", torch.full((*size, 3), 32.0))
            self.register_buffer("step_std", torch.full((*size, 3), 16.0))

    def observe(self, values: Tensor, valid: Tensor) -> None:
        """Add a training batch to the statistics."""
        frames = self._average(values)
        self.pixels.add(frames[valid], axes=1)
        if self.motion:
            moving, _ = self._split(frames, valid)
            steps, known = _differences(moving, valid, self.lag)
            self.moving.add(moving[valid], axes=3)
            self.steps.add(steps[known], axes=3)

    def fit(self) -> None:
        """Set the standardisation from what was observed: per colour, and per pixel for what moves."""
        self.mean.copy_(self.pixels.mean())
        self.std.copy_(self.pixels.std())
        if self.motion:
            for buffer, moments in ((self.moving_std, self.moving), (self.step_std, self.steps)):
                std = moments.std()
                buffer.copy_(std.clamp(min=0.1 * std.mean()))  # a pixel that never moves must not amplify its noise
        self.pixels, self.moving, self.steps = Moments(), Moments(), Moments()

    def forward(self, values: Tensor, valid: Tensor) -> Tensor:
        """values: (B, T, H, W, 3); valid: (B, T) -> (B, T, width), zero on padding."""
        if self.training and self.shift:
            values = random_shift(values, self.shift)
        frames = self._average(values)
        if not self.motion:
            return _mask(self.project(self._embed((frames - self.mean) / self.std)), valid)
        moving, clip_mean = self._split(frames, valid)
        steps = _differences(moving, valid, self.lag)[0] / self.step_std
        tokens = self.project(self._embed(torch.cat([moving / self.moving_std, steps], dim=-1)))
        coarse = ((clip_mean - self.mean) / self.std)[:, 0].movedim(-1, 1)
        scene = self.scene(F.adaptive_avg_pool2d(coarse, 4).flatten(1))
        return _mask(tokens + scene[:, None], valid)

    def _average(self, values: Tensor) -> Tensor:
        return values.float() if self.patch == 1 else patch_means(values, self.patch)

    def _split(self, frames: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What moves (B, T, H, W, 3), and the clip's mean frame (B, 1, H, W, 3)."""
        clip_mean = _clip_mean(frames, valid)
        return frames - clip_mean.where(_moves(valid, frames.ndim), self.mean), clip_mean

    def _embed(self, frames: Tensor) -> Tensor:
        # Frames are stored channels-last, and so is this view of them: convolutions take it without a copy.
        tokens = self.embed(frames.flatten(0, 1).movedim(-1, 1))
        return tokens.unflatten(0, frames.shape[:2])


def random_shift(frames: Tensor, share: float) -> Tensor:
    """Each clip's frames moved by its own random offset of up to `share` of their side; edges are repeated.

    frames: (B, T, H, W, C). Meant for corpora of a few hundred clips, which are easily learned by heart.
    """
    batch, length, height, width, channels = frames.shape

    def places(size: int) -> Tensor:
        most = max(1, round(share * size))
        offset = torch.randint(-most, most + 1, (batch, 1), device=frames.device)
        return (torch.arange(size, device=frames.device) + offset).clamp(0, size - 1)

    rows, columns = places(height)[:, None, :, None], places(width)[:, None, None, :]
    first = torch.arange(batch * length, device=frames.device).view(batch, length, 1, 1) * height
    pixels = (first + rows) * width + columns  # one index per pixel: four times as fast as one per axis
    return frames.reshape(-1, channels).index_select(0, pixels.flatten()).view(frames.shape)


def patch_means(frames: Tensor, patch: int) -> Tensor:
    """Means over squares of `patch` pixels, at the far edges over what there is of one.

    frames: (B, T, H, W, C) -> (B, T, ceil(H / patch), ceil(W / patch), C) float32. As sums of integers, row by row and
    then column by column, six times as fast on a CPU as pooling floats.
    """
    height, width = frames.shape[2:4]
    # An export sums the same integers as floats, which hold them exactly: onnxruntime pads no int16.
    fits = frames.dtype == torch.uint8 and 255 * patch < 2**15 and not torch.compiler.is_exporting()
    sums = frames.to(torch.int16 if fits else torch.float32)
    sums = F.pad(sums, (0, 0, 0, -width % patch, 0, -height % patch))
    sums = reduce(torch.add, [sums[:, :, row::patch] for row in range(patch)]).float()
    sums = reduce(torch.add, [sums[:, :, :, column::patch] for column in range(patch)])
    tall, wide = (_pixels(size, patch, frames.device) for size in (height, width))
    return sums / (tall[:, None] * wide)[..., None]


def _pixels(size: int, patch: int, device: torch.device) -> Tensor:
    """How many of a side's pixels each patch holds."""
    return (size - torch.arange(0, size, patch, device=device)).clamp(max=patch)


def _clip_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens: (B, T, ...), (B, T) -> (B, 1, ...). In float32: what moves is much smaller."""
    weights = valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
    with without_autocast(values):
        return torch.einsum("bt,bt...->b...", weights, values)[:, None]


def _moves(valid: Tensor, axes: int) -> Tensor:
    """(B, 1, ...): False for a still image or a lone vector, of which the corpus mean is removed and not itself."""
    return (valid.sum(dim=1) > 1).reshape(-1, *[1] * (axes - 1))


def _from_zero(features: int, width: int) -> nn.Linear:
    """The map of a clip's mean to its tokens. A mean tells a clip from all others: with a random start clips are
    learned by heart at once, and what moves is never looked at (GRID: chance level). From zero it is used as it pays.
    """
    linear = nn.Linear(features, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _differences(values: Tensor, valid: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """x[t] - x[t - lag] where both are valid, else 0; and where they are: (B, T, ...), (B, T)."""
    known = torch.cat([torch.zeros_like(valid[:, :lag]), valid[:, lag:] & valid[:, :-lag]], dim=1)
    steps = torch.cat([torch.zeros_like(values[:, :lag]), values[:, lag:] - values[:, :-lag]], dim=1)
    return _mask(steps, known), known


def _mask(tokens: Tensor, valid: Tensor) -> Tensor:
    return tokens.where(valid.reshape(*valid.shape, *[1] * (tokens.ndim - 2)), 0.0)


def _trunk(channels: int) -> tuple[nn.Module, int]:
    """Small strided convolutional net; a 4 x 4 grid is kept, because where something moves matters."""
    layers: list[nn.Module] = []
    for c_in, c_out, kernel, stride in ((channels, 16, 7, 4), (16, 32, 3, 2), (32, 64, 3, 2)):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
        layers += [conv, nn.GroupNorm(8, c_out), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten()), 64 * 16


def _resnet18(channels: int) -> tuple[nn.Module, int]:
    """ResNet-18 from scratch, with GroupNorm: a frame's features may not depend on its neighbours."""
    from torchvision.models import resnet18  # heavy, and needed by this stem alone

    net = resnet18(weights=None, norm_layer=lambda features: nn.GroupNorm(32, features))
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    net.fc = nn.Identity()
    return net, 512


def build_stem(spec: FeatureSpec, config: StemConfig, width: int, lag: int = 1) -> nn.Module:
    """The stem for a modality's token shape: vectors or frames; lag: tokens from one to the one it is compared with."""
    if len(spec.shape) == 1:
        return VectorStem(spec.shape[0], width, config.vectors_move and spec.rate > 0, lag)
    height, columns, _ = spec.shape
    motion = config.uses_motion
    channels = 6 if motion else 3
    if config.video == "patches":
        # Patch means into one linear map: with learned patch filters before it GRID trained far more slowly.
        patch = math.ceil(max(height, columns) / MOST_PATCHES)
        size = (math.ceil(height / patch), math.ceil(columns / patch))
        features = channels * size[0] * size[1]
        return FrameStem(nn.Flatten(), features, size, patch, width, motion, lag, config.shift)
    embed, features = (_trunk if config.video == "trunk" else _resnet18)(channels)
    return FrameStem(embed, features, (height, columns), 1, width, motion, lag, config.shift)
