"""Tasks: what is predicted for a clip, and the loss of each kind over the targets that are known."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from clcr.errors import ConfigError

MISSING_CLASS = -1  # a classification target that is not known; an unknown regression target is NaN


@dataclass(frozen=True)
class TaskSpec:
    """One thing to predict per clip: a class out of `classes`, or (regression) one number."""

    name: str
    kind: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # a JSON list becomes hashable
        if self.kind not in ("classification", "regression"):
            raise ConfigError(f"task {self.name!r}: kind {self.kind!r} is neither classification nor regression")
        if self.kind == "classification" and len(self.classes) < 2:
            raise ConfigError(f"task {self.name!r}: classification needs two classes or more, got {self.classes}")

    @property
    def outputs(self) -> int:
        """Width of the task's logits."""
        return len(self.classes) if self.kind == "classification" else 1


def task_loss(spec: TaskSpec, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the task's loss over the valid targets, and their count (divide by the global count).

    logits: (B, outputs); target: (B,) int64 with -1 missing, or float32 with NaN missing.
    Cross-entropy for classes, absolute error for numbers (the field reports MAE).
    """
    logits = logits.float()
    if spec.kind == "classification":
        valid = target != MISSING_CLASS
        return F.cross_entropy(logits, target, ignore_index=MISSING_CLASS, reduction="sum"), valid.sum()
    valid = ~target.isnan()
    error = (logits.squeeze(-1) - target.nan_to_num(0.0)).abs()  # NaN times 0 is NaN: replaced before it is masked
    return (error * valid).sum(), valid.sum()
