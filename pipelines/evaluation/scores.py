"""Figures of one task under one condition, by scikit-learn, from outputs and the labels that are known.

A row is a labelled clip, of events a labelled bin. Labels of which the model knows nothing count as classes that it
never predicts: they lower accuracy and recall, and stand in the confusion matrix.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clcr import TaskSpec
from clcr import metrics as M
from clcr.tasks import MISSING_CLASS
from features.corpus.events import bin_events

TOP = (3, 5)  # k of top-k accuracy, where there are more classes
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """Outputs and labels: rows (n,) number of the clip, truth (n,) class index or number, logits (n, outputs).

    labels: the model's classes, then those that only the labels have; empty for numbers. clip_ids: of all clips asked.
    groups: (clips,) number of each clip's group, None where every clip stands for itself.
    """

    task: TaskSpec
    labels: tuple[str, ...]
    clip_ids: tuple[str, ...]
    rows: np.ndarray
    truth: np.ndarray
    logits: np.ndarray
    groups: np.ndarray | None = None

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(n, classes of the model), as predictions/ has them."""
        return torch.from_numpy(self.logits).softmax(-1).numpy()

    @cached_property
    def guess(self) -> np.ndarray:
        """Class index or number, (n,)."""
        return self.logits.argmax(-1) if self.task.has_classes else self.logits[:, 0]

    @cached_property
    def losses(self) -> np.ndarray:
        """What training minimises, by row: -log of the right class's probability, inf for an unknown; or |error|."""
        if not self.task.has_classes:
            return np.abs(self.guess - self.truth)
        known = self.truth < len(self.task.classes)
        picked = self.probabilities[np.arange(len(self.truth)), np.where(known, self.truth, 0)]
        return np.where(known, -np.log(np.maximum(picked, 1e-12)), np.inf)

    def take(self, keep: np.ndarray) -> "Scored":
        """Some of the rows; keep: bool (n,)."""
        return replace(self, rows=self.rows[keep], truth=self.truth[keep], logits=self.logits[keep])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    exp = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True, initial=-np.inf))
    return exp / exp.sum(-1, keepdims=True)


def score_rows(task: TaskSpec, index: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray]) -> Scored:
    """The labelled part of some clips' outputs; index: their rows, with label_TASK and duration."""
    truths = [_truth(task, row) for row in index]
    known = {name: i for i, name in enumerate(task.classes)}
    unseen = sorted({name for values in truths for name in values if name is not None} - known.keys()) if known else []
    codes = known | {name: len(known) + i for i, name in enumerate(unseen)}
    rows, values, outputs = [], [], []
    for clip, (labels, answer) in enumerate(zip(truths, logits, strict=True)):
        for label, output in zip(labels, np.atleast_2d(answer)[: len(labels)], strict=True):
            if label is not None:
                rows.append(clip)
                values.append(codes[label] if task.has_classes else label)
                outputs.append(output)
    return Scored(
        task,
        (*task.classes, *unseen),
        tuple(row["clip_id"] for row in index),
        np.array(rows, np.int64),
        np.array(values, np.int64 if task.has_classes else np.float64),
        np.array(outputs, np.float32).reshape(len(rows), task.outputs),
        groups_of(index),
    )


def groups_of(index: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Number of each row's `group`, of one without a group its own; None where no two rows share one, or all do."""
    stores = [row["shard"].rpartition(":")[0] if "shard" in row else "" for row in index]  # of a mixture's store
    names = [(s, row["group"]) if row.get("group") else i for i, (s, row) in enumerate(zip(stores, index, strict=True))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names]) if 1 < len(numbers) < len(names) else None


def _truth(task: TaskSpec, row: Mapping[str, Any]) -> list[Any]:
    """Labels of a clip, one or one per bin: class names or numbers, None where they are not known."""
    label = row[f"label_{task.name}"]
    if task.rate:
        names = {"background": 0, **{event["label"]: i for i, event in enumerate(label or (), 1)}}
        names = {name: i for i, name in enumerate(dict.fromkeys(names))}
        bins = bin_events(label, row["duration"], task.rate, names)
        return [None if code == MISSING_CLASS else list(names)[code] for code in bins]
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return [None]
    return [str(label) if task.has_classes else float(label)]


def figures(scored: Scored) -> Figures:
    """The figures of a task, in full: one value by name, `per_class` and `confusion` of classes. NaN is undefined."""
    return _of_classes(scored) if scored.task.has_classes else summary(scored) | _of_numbers(scored)


def summary(scored: Scored) -> Figures:
    """What training reports too (`clcr.metrics`), `n` alone where nothing is labelled."""
    predictions = M.Predictions([], torch.from_numpy(scored.logits), torch.from_numpy(scored.truth))
    return {"n": len(scored.truth)} | M.task_metrics(scored.task, predictions)


def _of_numbers(scored: Scored) -> Figures:
    from sklearn.metrics import r2_score, root_mean_squared_error

    if not len(scored.truth):
        return {}
    return {
        "rmse": float(root_mean_squared_error(scored.truth, scored.guess)),
        "r2": float(r2_score(scored.truth, scored.guess)) if scored.truth.std() > 0 else math.nan,
        "bias": float((scored.guess - scored.truth).mean()),
    }


def _of_classes(scored: Scored) -> Figures:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    found = summary(scored)
    if not len(scored.truth):
        return found
    found["majority"] = float(np.unique(scored.truth, return_counts=True)[1].max() / len(scored.truth))
    labels = range(len(scored.labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = precision_recall_fscore_support(scored.truth, scored.guess, labels=labels, zero_division=0)
    areas = class_areas(scored)
    seen = np.union1d(scored.truth, scored.guess)  # the others have no figure to average
    for name, column in zip(("macro_precision", "macro_recall"), columns, strict=False):
        found[name] = float(column[seen].mean())
    found["auroc"] = float(np.nanmean(areas)) if np.isfinite(areas).any() else math.nan
    for k in TOP:
        if len(scored.task.classes) > k:
            found[f"top{k}"] = top_k(scored, k)
    finite = scored.losses[np.isfinite(scored.losses)]
    found["nll"] = float(finite.mean()) if len(finite) else math.nan
    names = ("precision", "recall", "f1", "support")
    rows = zip(*columns, areas, strict=True)
    found["per_class"] = {
        label: {**dict(zip(names, map(float, row), strict=False)), "auroc": float(row[-1])}
        for label, row in zip(scored.labels, rows, strict=True)
    }
    counts = confusion_matrix(scored.truth, scored.guess, labels=labels)
    found["confusion"] = {"labels": list(scored.labels), "counts": counts.tolist()}
    return found


def class_areas(scored: Scored) -> np.ndarray:
    """Area under the ROC curve of each label against the rest; NaN where all rows or none have it."""
    from sklearn.metrics import roc_auc_score

    areas = np.full(len(scored.labels), np.nan)
    for k in range(len(scored.task.classes)):
        if 0 < (positive := scored.truth == k).sum() < len(positive):
            areas[k] = roc_auc_score(positive, scored.probabilities[:, k])
    return areas


def top_k(scored: Scored, k: int) -> float:
    """Share of rows whose label is among the k most probable classes."""
    best = np.argsort(-scored.probabilities, axis=1, kind="stable")[:, :k]
    return float((best == scored.truth[:, None]).any(1).mean())


def main_figure(task: TaskSpec) -> str:
    """The one name that tables and curves show of a task: accuracy, or the mean absolute error."""
    return "accuracy" if task.has_classes else "mae"


def plain(tree: Any) -> Any:
    """The same figures as JSON has them: numbers of Python, null for what is not finite."""
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
