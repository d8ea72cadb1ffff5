"""Tasks: what is predicted for a clip, and the loss of each kind over the targets that are known."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from clcr.errors import ConfigError

MISSING_CLASS = -1  # a class that is not known, or a bin that is padding; an unknown number is NaN
Kind = Literal["classification", "regression", "sentiment", "events"]


@dataclass(frozen=True)
class TaskSpec:
    """One thing to predict: a class out of `classes` per clip, a number per clip, or (events) a class per bin of time.

    sentiment is a regression on the scale of -3 to 3 that is reported with the metrics of MOSI and MOSEI. rate: bins
    per second of events, bin k covering [k, k + 1) / rate seconds; 0 for a task of the whole clip.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # a JSON list becomes hashable
        if self.kind not in get_args(Kind):
            raise ConfigError(f"task {self.name!r}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.has_classes and len(self.classes) < 2:
            raise ConfigError(f"task {self.name!r}: {self.kind} needs two classes or more, got {self.classes}")
        if (self.rate > 0) != (self.kind == "events"):
            raise ConfigError(f"task {self.name!r}: {self.kind} at {self.rate} bins per second; only events have bins")

    @property
    def has_classes(self) -> bool:
        """Whether a prediction is a class, of a clip or of a bin; else it is a number."""
        return self.kind in ("classification", "events")

    @property
    def outputs(self) -> int:
        """Width of the task's logits."""
        return len(self.classes) if self.has_classes else 1

    @property
    def missing(self) -> float:
        """The target that says that it is not known."""
        return MISSING_CLASS if self.has_classes else math.nan

    def known(self, target: Tensor) -> Tensor:
        """Which targets are known: bool, of the target's shape."""
        return target != MISSING_CLASS if self.has_classes else ~target.isnan()


def target_losses(spec: TaskSpec, logits: Tensor, target: Tensor, spread: Tensor | float = 1.0) -> Tensor:
    """The loss of every target, of the target's shape, 0 where it is not known; arguments as in task_loss."""
    if spec.has_classes:
        flat = logits.float().flatten(0, -2), target.flatten()
        return F.cross_entropy(*flat, ignore_index=MISSING_CLASS, reduction="none").view(target.shape)
    known = spec.known(target)
    # NaN times 0 is NaN: replaced before it is masked.
    error = ((logits.squeeze(-1).double() - target.double().where(known, 0.0)) / spread).abs().float()
    return error * known


def task_loss(spec: TaskSpec, logits: Tensor, target: Tensor, spread: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum of the task's loss over the known targets, and their count (divide by the global count).

    logits: (B, outputs), of events (B, bins, outputs); target: (B,) or (B, bins) int64 with -1 missing, or (B,)
    float64 with NaN missing. Cross-entropy for classes, absolute error for numbers (the field reports MAE), in units
    of `spread`: logits and targets are in the unit of the labels, and only their difference fits into float32.
    """
    return target_losses(spec, logits, target, spread).sum(), spec.known(target).sum()
