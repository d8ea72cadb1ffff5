"""Losses of classes that are rare, mislabelled or hard: class weights, label smoothing and the focal loss.

    loss = w_c (1 - p_c)^focal CE(smoothed target),   w_c = n / (C n_c)

with n known training targets in C classes, n_c of class c: the mean weight of a training target is 1, so that a task's
loss stays of the size that its task weight was chosen for. All of it is off by default, and training is not changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clcr.errors import ConfigError
from clcr.tasks import MISSING_CLASS, TaskSpec

# The loss of every target of a task with classes, of the target's shape, 0 where it is not known.
ClassLoss = Callable[[TaskSpec, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClassLossConfig:
    """What counts how much in the loss of tasks with classes."""

    weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts as much as any other in the loss, however few training clips have it"""
    smoothing: float = 0.0
    """share of each target (0-1) that is spread over all classes: label smoothing"""
    focal: float = 0.0
    """exponent of the focal loss: targets that are predicted well count less; 0 = plain cross-entropy, 2 is usual"""

    def __post_init__(self) -> None:
        if self.weights not in ("none", "balanced"):
            raise ConfigError(f"--classes.weights {self.weights}: choose none or balanced")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"--classes.smoothing {self.smoothing}: must lie in [0, 1)")
        if self.focal < 0:
            raise ConfigError(f"--classes.focal {self.focal}: must be 0 or more")


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """The weight of each class, of mean 1 over the targets counted; 1 where there are none. counts, result: (C,)"""
    number = torch.tensor(counts, dtype=torch.float64)
    seen = number > 0
    even = number.sum() / seen.sum().clamp(min=1)
    return torch.where(seen, even / number.clamp(min=1), 1.0).float()


def class_loss(config: ClassLossConfig, counts: Callable[[], Mapping[str, Sequence[int]]]) -> ClassLoss | None:
    """The loss of tasks with classes; None where it is plain cross-entropy.

    counts: gives the known training targets of each class, by task with classes; asked where weights need it.
    """
    if config == ClassLossConfig():
        return None
    counted = counts() if config.weights == "balanced" else {}
    weights = {task: balanced_weights(number) for task, number in counted.items()}

    def loss(spec: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        scores, classes = logits.float().flatten(0, -2), target.flatten()
        each = F.cross_entropy(
            scores, classes, ignore_index=MISSING_CLASS, reduction="none", label_smoothing=config.smoothing
        )
        index = classes.clamp(min=0)  # what is missing has no loss, whatever its factors
        if config.focal:
            right = scores.log_softmax(-1).gather(1, index[:, None])[:, 0].exp()
            each = each * (1 - right).clamp(min=1e-6) ** config.focal  # at 0 the power's gradient may be infinite
        if spec.name in weights:
            each = each * weights[spec.name].to(each.device)[index]
        return each.view(target.shape)

    return loss
