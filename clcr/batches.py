"""Batches: padded, masked tensors of several modalities, and how samples (plain dicts of arrays) become one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clcr.errors import ClcrError, ConfigError
from clcr.tasks import MISSING_CLASS, TaskSpec


@dataclass(frozen=True)
class FeatureSpec:
    """What one token of a modality is: (D,) a vector, (H, W, 3) a uint8 frame, (L, D) hidden layers of one token.

    rate: tokens per second (0 for a modality without time, such as a still image).
    """

    shape: tuple[int, ...]
    rate: float
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 1 <= len(self.shape) <= 3 or (len(self.shape) == 3 and self.shape[-1] != 3):
            raise ConfigError(f"feature shape {self.shape}: one token is (D,), (layers, D) or (height, width, 3)")


@dataclass
class Features:
    """One modality of a batch. values: (B, T, *shape); valid: (B, T) bool, False is padding."""

    values: Tensor
    valid: Tensor


@dataclass
class Batch:
    """What a model sees.

    present: (B,) bool per modality; targets: (B,) per task (class index, -1 missing; or float64, NaN missing), of
    events (B, bins) class indices, -1 missing and beyond the clip; bins: (B,) int64 per events task, how many bins each
    clip has.
    """

    features: dict[str, Features]
    present: dict[str, Tensor]
    targets: dict[str, Tensor]
    clip_ids: list[str]
    bins: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clip_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; copies overlap with computation where the memory is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=True), self.clip_ids)

    def pin_memory(self) -> "Batch":
        """The same batch in memory from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory, self.clip_ids)

    def split(self, clips: int) -> list["Batch"]:
        """Batches of at most so many clips each, padded as they are."""
        starts = range(0, len(self), clips)
        return [self._rows(first, first + clips) for first in starts]

    def _rows(self, first: int, last: int) -> "Batch":
        return self._each(lambda x: x[first:last], self.clip_ids[first:last])

    def _each(self, change: Callable[[Tensor], Tensor], clip_ids: list[str]) -> "Batch":
        return replace(
            self,
            features={m: Features(change(f.values), change(f.valid)) for m, f in self.features.items()},
            present={m: change(x) for m, x in self.present.items()},
            targets={t: change(x) for t, x in self.targets.items()},
            clip_ids=clip_ids,
            bins={t: change(x) for t, x in self.bins.items()},
        )


def collate(
    samples: Sequence[Mapping[str, Any]], features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]
) -> Batch:
    """Make a batch of samples {"clip_id", "features": {modality: (T, *shape)}, "targets": {task: value or None}}.

    New clips, which have no "targets", are collated too. Values keep their stored dtype and are padded with zeros to
    the longest of the batch; a modality that a sample lacks (no key, None, or no tokens) is all padding and not
    present. The value of events is (bins,) class indices; a clip whose events are not known has -1 for each of its
    bins, which are predicted all the same.
    """
    padded = {m: _pad(samples, m, spec) for m, spec in features.items()}
    return Batch(
        features=padded,
        present={m: f.valid.any(dim=1) for m, f in padded.items()},
        targets={name: _targets(samples, spec) for name, spec in tasks.items()},
        bins={name: torch.tensor(_bins(samples, name)) for name, spec in tasks.items() if spec.kind == "events"},
        clip_ids=[sample["clip_id"] for sample in samples],
    )


def _pad(samples: Sequence[Mapping[str, Any]], modality: str, spec: FeatureSpec) -> Features:
    arrays = [sample["features"].get(modality) for sample in samples]
    lengths = [0 if array is None else len(array) for array in arrays]
    values = np.zeros((len(samples), max(1, *lengths), *spec.shape), dtype=spec.dtype)
    for row, array, length, sample in zip(values, arrays, lengths, samples, strict=True):
        if length == 0:
            continue
        if array.shape[1:] != spec.shape:
            raise ClcrError(
                f"clip {sample['clip_id']!r}: a token of {modality!r} has shape {array.shape[1:]}, "
                f"the features declare {spec.shape}; use the store that the model was built for"
            )
        row[:length] = array
    valid = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return Features(torch.from_numpy(values), valid)


def _targets(samples: Sequence[Mapping[str, Any]], spec: TaskSpec) -> Tensor:
    values = [sample.get("targets", {}).get(spec.name) for sample in samples]
    if spec.kind == "events":
        return _padded_bins(values, _bins(samples, spec.name))
    missing = MISSING_CLASS if spec.has_classes else float("nan")
    values = [missing if value is None or value != value else value for value in values]
    return torch.tensor(values, dtype=torch.int64 if spec.has_classes else torch.float64)


def _bins(samples: Sequence[Mapping[str, Any]], task: str) -> list[int]:
    values = [sample.get("targets", {}).get(task) for sample in samples]
    return [0 if value is None else len(value) for value in values]


def _padded_bins(values: Sequence[np.ndarray | None], lengths: Sequence[int]) -> Tensor:
    """Class indices of the bins of every clip, (B, bins): at least one bin, -1 where a clip has fewer."""
    bins = torch.full((len(values), max(1, *lengths)), MISSING_CLASS)
    for row, value, length in zip(bins, values, lengths, strict=True):
        if length:
            row[:length] = torch.as_tensor(value)
    return bins
