"""The conditions that a model is evaluated under: its input as it is, with modalities taken away, or with noise.

    all                  as stored
    only-audio           every other modality absent, as if the clips had no such track
    without-audio        this modality absent (where there are three or more)
    noise-audio-0.5      Gaussian noise of half the feature's own standard deviation added to every token

Noise is a function of (seed, clip, modality) alone, so that every model hears the same and batches do not matter. The
levels of one modality share their noise and differ in its size.
"""

import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clcr import Batch
from clcr.batches import Features

WHOLE = "all"
ALL_SUBSETS = 4  # modalities up to which every subset is evaluated; of more, each alone and each left out
SPREAD_CLIPS = 64  # clips from which the spread of a feature is measured


@dataclass(frozen=True)
class Condition:
    """What is done to a batch. absent: modalities taken away; noisy, level: noise in standard deviations of one."""

    name: str
    absent: tuple[str, ...] = ()
    noisy: str = ""
    level: float = 0.0

    def apply(self, batch: Batch, spread: Mapping[str, np.ndarray], seed: int) -> Batch:
        """The batch under this condition; spread: standard deviation of each modality's token, (*shape) or ()."""
        if self.absent:
            features = {m: _emptied(f) if m in self.absent else f for m, f in batch.features.items()}
            present = {m: f.valid.any(dim=1) for m, f in features.items()}
            return replace(batch, features=features, present=present)
        if self.noisy in batch.features:
            values = _with_noise(batch, self.noisy, self.level * spread[self.noisy], seed)
            noisy = Features(values, batch.features[self.noisy].valid)
            return replace(batch, features={**batch.features, self.noisy: noisy})
        return batch


def title(condition: str) -> str:
    """A subset of the modalities in words."""
    if condition == WHOLE:
        return "all modalities"
    kind, _, modalities = condition.partition("-")
    return f"{modalities.replace('-', ' + ')} alone" if kind == "only" else f"no {modalities}"


def subsets(modalities: Sequence[str]) -> list[Condition]:
    """Every proper subset of the modalities, smaller ones first; of many modalities only single ones and all but one.

    Empty for fewer than two.
    """
    sizes: Sequence[int] = range(1, len(modalities))
    if len(modalities) > ALL_SUBSETS:
        sizes = sorted({1, len(modalities) - 1})
    kept = [combination for size in sizes for combination in itertools.combinations(modalities, size)]
    return [_keeping(combination, modalities) for combination in kept]


def noises(modalities: Sequence[str], levels: Iterable[float]) -> list[Condition]:
    """Each modality at each level of noise."""
    return [Condition(f"noise-{m}-{level:g}", noisy=m, level=level) for m in modalities for level in levels]


def _keeping(kept: Sequence[str], modalities: Sequence[str]) -> Condition:
    absent = tuple(m for m in modalities if m not in kept)
    name = f"without-{absent[0]}" if len(absent) == 1 and len(modalities) > 2 else "only-" + "-".join(kept)
    return Condition(name, absent=absent)


def measure_spread(batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Standard deviation of each modality's tokens over the batches: per number of a vector, one for whole frames."""
    totals: dict[str, tuple[float, Tensor, Tensor]] = {}
    for batch in batches:
        for m, f in batch.features.items():
            tokens = f.values[f.valid].double()
            if tokens.ndim == 4:  # pixels
                tokens = tokens.flatten()
            n, first, second = totals.get(m, (0.0, torch.zeros(()), torch.zeros(())))
            totals[m] = n + len(tokens), first + tokens.sum(0), second + tokens.square().sum(0)
    return {
        m: ((second / max(n, 1) - (first / max(n, 1)).square()).clamp(min=0).sqrt()).numpy()
        for m, (n, first, second) in totals.items()
    }


def _emptied(features: Features) -> Features:
    """The same shape without a token."""
    return Features(torch.zeros_like(features.values), torch.zeros_like(features.valid))


def _with_noise(batch: Batch, modality: str, size: np.ndarray, seed: int) -> Tensor:
    values, valid = batch.features[modality].values, batch.features[modality].valid
    noisy = values.numpy().astype(np.float32)
    for clip, tokens, row in zip(batch.clip_ids, valid.sum(1).tolist(), noisy, strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(clip.encode()), zlib.crc32(modality.encode())])
        row[:tokens] += rng.standard_normal(row[:tokens].shape, dtype=np.float32) * size.astype(np.float32)
    if values.dtype.is_floating_point:
        limits: torch.finfo | torch.iinfo = torch.finfo(values.dtype)
    else:
        limits, noisy = torch.iinfo(values.dtype), noisy.round()
    return torch.from_numpy(noisy).clamp(limits.min, limits.max).to(values.dtype)
