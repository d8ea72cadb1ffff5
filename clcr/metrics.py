"""What is reported of predictions, per task and over all tasks. Computed by torchmetrics on gathered predictions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional import (
    mean_absolute_error,
    pearson_corrcoef,
)
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from clcr.tasks import MISSING_CLASS, TaskSpec


@dataclass
class Predictions:
    """Outputs of one task over a split: clip_ids, logits (N, outputs), targets (N,); missing targets included."""

    clip_ids: list[str]
    logits: Tensor
    targets: Tensor

    def known(self, task: TaskSpec) -> tuple[Tensor, Tensor]:
        """Logits and targets of the clips whose label is known."""
        keep = self.targets != MISSING_CLASS if task.kind == "classification" else ~self.targets.isnan()
        return self.logits[keep], self.targets[keep]


def task_metrics(task: TaskSpec, predictions: Predictions) -> dict[str, float]:
    """Metrics of one task; empty when no label is known.

    Classification: accuracy, macro_f1. Regression: mae, pearson, skill (1 - MAE over the MAE of the split's median:
    1 is exact, 0 is a constant guess). Both: n, the number of labelled clips.
    """
    logits, targets = predictions.known(task)
    if len(targets) == 0:
        return {}
    if task.kind == "classification":
        classes = task.outputs
        return {
            "accuracy": multiclass_accuracy(logits, targets, classes, average="micro").item(),
            "macro_f1": multiclass_f1_score(logits, targets, classes, average="macro").item(),
            "n": len(targets),
        }
    values = logits.squeeze(-1)
    mae = mean_absolute_error(values, targets).item()
    constant = (targets - targets.median()).abs().mean().item()
    spread = min(values.std(correction=0).item(), targets.std(correction=0).item())
    return {
        "mae": mae,
        "pearson": pearson_corrcoef(values, targets).item() if len(targets) > 1 and spread > 0 else 0.0,
        "skill": 1 - mae / constant if constant > 0 else 0.0,
        "n": len(targets),
    }


def split_metrics(tasks: Mapping[str, TaskSpec], predictions: Mapping[str, Predictions]) -> dict[str, dict[str, float]]:
    """`task_metrics` of every task that has a labelled clip."""
    metrics = {name: task_metrics(task, predictions[name]) for name, task in tasks.items()}
    return {name: values for name, values in metrics.items() if values}


def score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """One number to select by: the mean over tasks of accuracy (classification) or skill (regression)."""
    values = [m["accuracy"] if "accuracy" in m else m["skill"] for m in metrics.values()]
    return sum(values) / len(values)


def tracked(split: str, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics under their tracking names: `val/color/accuracy`, and the mean over tasks as `val/accuracy`."""
    flat, by_name = {f"{split}/score": score(metrics)}, {}
    for task, values in metrics.items():
        for name, value in values.items():
            if name != "n":
                by_name.setdefault(name, []).append(value)
                if len(metrics) > 1:
                    flat[f"{split}/{task}/{name}"] = value
    return flat | {f"{split}/{name}": sum(values) / len(values) for name, values in by_name.items()}


def confusion_matrix(task: TaskSpec, predictions: Predictions) -> Tensor:
    """Counts (classes, classes): row = true class, column = predicted class."""
    logits, targets = predictions.known(task)
    return multiclass_confusion_matrix(logits.argmax(-1), targets, num_classes=task.outputs)


def concatenate(parts: list[Mapping[str, Predictions]]) -> dict[str, Predictions]:
    """Predictions of several workers as one, by task; padding samples (no clip id) fall out."""
    joined = {}
    for task in parts[0]:
        ids = [clip_id for part in parts for clip_id in part[task].clip_ids]
        real = torch.tensor([bool(clip_id) for clip_id in ids], dtype=torch.bool)
        joined[task] = Predictions(
            clip_ids=[clip_id for clip_id in ids if clip_id],
            logits=torch.cat([part[task].logits for part in parts])[real],
            targets=torch.cat([part[task].targets for part in parts])[real],
        )
    return joined
