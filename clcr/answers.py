"""Answers: what a model says of clips, as plain Python values instead of logits."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from clcr.errors import ClcrError
from clcr.tasks import MISSING_CLASS, TaskSpec

BACKGROUND = "background"  # the class of a bin in which nothing happens
Answer = dict[str, Any]  # clip_id, and for each task what `answers_of` gives


def unlabelled(sample: Mapping[str, Any], tasks: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """A sample as `collate` takes it, with no target known; of events, how many bins follow from its duration.

    sample: {"clip_id", "features": {modality: (T, *shape)}}, and "duration" in seconds where a task is events.
    Raises ClcrError where that is missing.
    """
    targets = {}
    for name, task in tasks.items():
        if task.kind == "events":
            targets[name] = np.full(count_bins(seconds_of(sample, name), task.rate), MISSING_CLASS)
    return {"clip_id": sample["clip_id"], "features": sample["features"], "targets": targets}


def answers_of(task: TaskSpec, logits: Tensor, samples: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """One task's answer for each clip of a batch; logits: (B, outputs), of events (B, bins, outputs).

    A class: {TASK: its name, TASK_probability: float, TASK_probabilities: {class: float}}. A number: {TASK: float}.
    Events: {TASK: [{"start", "end", "label"}, ...]}, in seconds, without the background.
    """
    if not task.has_classes:
        return [{task.name: value} for value in logits.squeeze(-1).tolist()]
    if task.kind == "events":
        seconds = [seconds_of(sample, task.name) for sample in samples]
        bins = logits.argmax(-1).numpy()
        return [{task.name: to_events(task, *clip)} for clip in zip(bins, seconds, strict=True)]
    answers = []
    for probabilities in logits.softmax(-1).tolist():
        by_class = dict(zip(task.classes, probabilities, strict=True))
        best = max(by_class, key=by_class.__getitem__)
        answers.append(
            {task.name: best, f"{task.name}_probability": by_class[best], f"{task.name}_probabilities": by_class}
        )
    return answers


def to_events(task: TaskSpec, bins: np.ndarray, seconds: float) -> list[dict[str, Any]]:
    """Runs of one class among a clip's bins, as events in seconds; bins: (bins,) class indices, padding included."""
    bins = bins[: count_bins(seconds, task.rate)]
    edges = np.flatnonzero(np.diff(bins, prepend=-1, append=-1)).tolist()
    events = []
    for first, last in pairwise(edges):
        start, end, label = first / task.rate, min(last / task.rate, seconds), task.classes[bins[first]]
        if label != BACKGROUND and start < end:
            events.append({"start": start, "end": end, "label": label})
    return events


def count_bins(seconds: float, rate: float) -> int:
    """How many bins of 1 / rate seconds a clip has: its length, rounded, and one at least."""
    return max(1, int(seconds * rate + 0.5))


def seconds_of(sample: Mapping[str, Any], task: str) -> float:
    """A sample's length. Raises ClcrError where it does not say."""
    try:
        return float(sample["duration"])
    except KeyError:
        raise ClcrError(
            f"clip {sample['clip_id']!r}: task {task!r} is events, and the sample has no duration (seconds)"
        ) from None
