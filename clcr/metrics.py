"""What is reported of predictions, per task and over all tasks. Computed by scikit-learn and NumPy from gathered ones.

scikit-learn is imported where it is used: it loads SciPy, a second that a job's driver need not spend.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clcr.tasks import MISSING_CLASS, TaskSpec


@dataclass
class Predictions:
    """Outputs of one task over a split: clip_ids, logits (N, outputs), targets (N,); missing targets included.

    Of events logits are (N, bins, outputs) and targets (N, bins); bins beyond a clip's end are missing targets.
    """

    clip_ids: list[str]
    logits: Tensor
    targets: Tensor

    def known(self, task: TaskSpec) -> tuple[Tensor, Tensor]:
        """Logits (n, outputs) and targets (n,) of the clips, or bins, whose label is known."""
        keep = task.known(self.targets)
        return self.logits[keep], self.targets[keep]


def task_metrics(task: TaskSpec, predictions: Predictions, spread: float = 1.0) -> dict[str, float]:
    """Metrics of one task; empty when no label is known. What is not finite is left out.

    Classification: accuracy, macro_f1. Events: the same over bins (AVE's segment accuracy: the share of bins right).
    Regression: mae, pearson, skill (1 - MAE over the MAE of the split's median: 1 is exact, 0 is a constant guess; -MAE
    of a split whose targets are all equal, in units of `spread`, that of the training labels).
    Sentiment: those and `sentiment_metrics`. All: n, the number of labelled clips or bins.
    """
    from sklearn.metrics import accuracy_score, f1_score

    logits, targets = predictions.known(task)
    if len(targets) == 0:
        return {}
    truth = targets.numpy()
    if task.has_classes:
        guess = logits.argmax(-1).numpy()
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "macro_f1": float(f1_score(truth, guess, average="macro")),
            "n": len(targets),
        }
    values, truth = logits.squeeze(-1).double().numpy(), targets.double().numpy()
    middle = np.median(truth)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is left out below
        mae = float(np.abs(values - truth).mean())
        constant = float(np.abs(truth - middle).mean())
        pearson = _pearson((values - middle) / spread, (truth - middle) / spread)
    found = {
        "mae": mae,
        "pearson": pearson,
        "skill": 1 - mae / constant if constant > 0 else -mae / spread,
        **(sentiment_metrics(values, truth) if task.kind == "sentiment" else {}),
        "n": len(targets),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _pearson(values: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Pearson's correlation of standardised numbers (n,); 0 where either does not vary."""
    return float(np.corrcoef(values, truth)[0, 1]) if values.std() > 0 and truth.std() > 0 else 0.0


def sentiment_metrics(values: NDArray[np.floating], targets: NDArray[np.floating]) -> dict[str, float]:
    """What papers on CMU-MOSI and CMU-MOSEI report besides MAE and Pearson's r, as MMSA computes it; (n,) numbers.

    acc7, acc5: share of clips with the right class after clipping both numbers to [-3, 3] or [-2, 2] and rounding
    (halves to even). acc2, f1: negative against the rest, `_has0` with the neutral clips (>= 0 is the rest), `_non0`
    without the clips labelled 0 (> 0 is positive); f1 is weighted by the classes' numbers. No _non0 without such clips.
    """
    from sklearn.metrics import accuracy_score, f1_score

    def right(limit: int) -> float:
        guess, truth = (np.round(np.clip(x, -limit, limit)) for x in (values, targets))
        return float(np.mean(guess == truth))

    def binary(name: str, guess: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
        if not len(truth):
            return {}
        f1 = f1_score(truth, guess, average="weighted")
        return {f"acc2_{name}": float(accuracy_score(truth, guess)), f"f1_{name}": float(f1)}

    polar = targets != 0
    return {
        "acc7": right(3),
        "acc5": right(2),
        **binary("has0", values >= 0, targets >= 0),
        **binary("non0", values[polar] > 0, targets[polar] > 0),
    }


def split_metrics(
    tasks: Mapping[str, TaskSpec], predictions: Mapping[str, Predictions], spreads: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """`task_metrics` of every task that has a labelled clip; spreads: of the training labels, by task."""
    metrics = {
        name: task_metrics(task, predictions[name], (spreads or {}).get(name, 1.0)) for name, task in tasks.items()
    }
    return {name: values for name, values in metrics.items() if values}


def main_metric(metrics: Mapping[str, float]) -> float:
    """What one task counts by: accuracy (classes) or skill (numbers); -inf for a skill that was not finite."""
    return metrics["accuracy"] if "accuracy" in metrics else metrics.get("skill", -math.inf)


def bounded(skill: float) -> float:
    """A skill within [-1, 1]: itself where it is 0 or more, below 0 skill / (1 - skill).

    That is (MAE of the median) / (MAE of the model) - 1: it grows with the skill, is smooth at 0, and -1 is the limit
    of a model that is infinitely wrong.
    """
    if skill == -math.inf:
        return -1.0
    return skill if skill >= 0 else skill / (1 - skill)


def score(metrics: Mapping[str, Mapping[str, float]], kind: Literal["bounded", "skill"] = "bounded") -> float:
    """One number to select by: the mean over tasks of accuracy (classes) and of `bounded` or plain skill (numbers)."""
    terms = []
    for values in metrics.values():
        plain = main_metric(values)
        terms.append(plain if "accuracy" in values or kind == "skill" else bounded(plain))
    return sum(terms) / len(terms)


def tracked(
    split: str, metrics: Mapping[str, Mapping[str, float]], kind: Literal["bounded", "skill"] = "bounded"
) -> dict[str, float]:
    """Metrics under their tracking names: `val/color/accuracy`, and the mean over tasks as `val/accuracy`.

    kind: that of `score`, which is `val/score`.
    """
    flat = {f"{split}/score": score(metrics, kind)}
    by_name: dict[str, list[float]] = {}
    for task, values in metrics.items():
        for name, value in values.items():
            if name != "n":
                by_name.setdefault(name, []).append(value)
                if len(metrics) > 1:
                    flat[f"{split}/{task}/{name}"] = value
    return flat | {f"{split}/{name}": sum(values) / len(values) for name, values in by_name.items()}


def confusion_matrix(task: TaskSpec, predictions: Predictions) -> Tensor:
    """Counts (classes, classes): row = true class, column = predicted class."""
    from sklearn.metrics import confusion_matrix as count

    logits, targets = predictions.known(task)
    return torch.from_numpy(count(targets.numpy(), logits.argmax(-1).numpy(), labels=range(task.outputs)))


def concatenate(parts: list[Mapping[str, Predictions]]) -> dict[str, Predictions]:
    """Predictions of several workers or batches as one, by task; padding samples (no clip id) fall out.

    Events are padded to the most bins of any part.
    """
    joined = {}
    for task in parts[0]:
        ids = [clip_id for part in parts for clip_id in part[task].clip_ids]
        real = torch.tensor([bool(clip_id) for clip_id in ids], dtype=torch.bool)
        joined[task] = Predictions(
            clip_ids=[clip_id for clip_id in ids if clip_id],
            logits=_stacked([part[task].logits for part in parts], fill=0)[real],
            targets=_stacked([part[task].targets for part in parts], fill=MISSING_CLASS)[real],
        )
    return joined


def _stacked(parts: list[Tensor], fill: int) -> Tensor:
    """Rows of all parts, (N, ...); the second axis, of bins where there are any, is padded to the longest."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    most, behind = max(part.shape[1] for part in parts), [0, 0] * (parts[0].ndim - 2)
    return torch.cat([F.pad(part, [*behind, 0, most - part.shape[1]], value=fill) for part in parts])
