"""Numeric targets in any unit: learned in units of their own spread, answered in the unit of the labels.

    standardised = (label - median) / spread        spread: 1.4826 times the median absolute deviation

Median and deviation are those of the training labels, so a few wild labels move neither, and the same labels in
another unit (degrees, dollars, seconds since 1970) are the same standardised targets. The spread is negative where the
first label that is clearly off the median lies below it: a scale that runs the other way (losses instead of gains) is
no other target either. All of this is float64: around a time stamp of 1.7e9 float32 has steps of 128 seconds.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from clcr.errors import ConfigError
from clcr.tasks import TaskSpec

NORMAL = 1.4826  # standard deviations per median absolute deviation, of a normal distribution
CLEARLY = 0.2718  # spreads off the median; no round number, so that no rounding decides on which side a label is


def robust_statistics(labels: ArrayLike) -> tuple[float, float]:
    """Median and spread of labels (n,), of which those that are not finite do not count; spread 0 if all are equal.

    Where more than half of the labels are equal the median deviation is 0, and the mean deviation takes its place.
    Without any label the neutral (0, 1).
    """
    values = np.asarray(labels, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    # The mean of the middle two, each halved first: the sum of two large numbers may overflow.
    low, high = np.quantile(values, 0.5, method="lower"), np.quantile(values, 0.5, method="higher")
    center = float(low / 2 + high / 2) if low != high else float(low)
    deviations = np.abs(values - center)
    spread = NORMAL * float(np.median(deviations))
    return center, spread or float(deviations.mean())


def _direction(standardised: NDArray[np.float64]) -> float:
    """1, or -1 where the first of the standardised labels (n,) that is clearly off the median lies below it."""
    clear = standardised[np.abs(standardised) > CLEARLY]
    return -1.0 if len(clear) and clear[0] < 0 else 1.0


class Units(nn.Module):
    """The unit of every numeric task of a model, as buffers: center and spread (numbers,) float64; see the module.

    Without `fit` they are neutral, and the model learns and answers raw numbers.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, tasks: Mapping[str, TaskSpec]) -> None:
        super().__init__()
        self.names = [name for name, task in tasks.items() if not task.has_classes]
        if self.names:
            self.register_buffer("center", torch.zeros(len(self.names), dtype=torch.float64))
            self.register_buffer("spread", torch.ones(len(self.names), dtype=torch.float64))

    def fit(self, labels: Mapping[str, ArrayLike]) -> None:
        """Take the units from training labels, by task; NaN is a missing label.

        Raises ConfigError naming a task whose labels are all equal: there is nothing to learn.
        """
        for i, name in enumerate(self.names):
            center, spread = robust_statistics(labels[name])
            if spread == 0:
                what = f"every training label is {center:.9g}, so there is nothing to learn"
                raise ConfigError(f"task {name!r}: {what}; leave the task out")
            standardised = (np.asarray(labels[name], np.float64).ravel() - center) / spread
            self.center[i], self.spread[i] = center, spread * _direction(standardised)

    def spread_of(self, task: str) -> Tensor | float:
        """The spread by which a task's errors are divided: () float64, above 0; 1 for a task with classes."""
        return self.spread[self.names.index(task)].abs() if task in self.names else 1.0

    def answer(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a model with those of numeric tasks, (B, 1), in the unit of the labels and float64."""
        units = {name: (self.center[i], self.spread[i]) for i, name in enumerate(self.names)}
        return {
            name: values.double() * units[name][1] + units[name][0] if name in units else values
            for name, values in logits.items()
        }
