"""Logits as rows of predictions: what predict, evaluate, serve and the MLflow model all give of a clip.

classification   TASK the class, TASK_probability of it, TASK_probabilities of every class by its name
numbers          TASK
events           TASK a list of {start, end, label} in seconds, as a manifest has them: bins of one class in a row
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from clcr import TaskSpec
from features.corpus.events import BACKGROUND, EVENTS, bin_events

Row = Mapping[str, Any]  # of the store's index


def to_table(tasks: Mapping[str, TaskSpec], rows: Sequence[Row], logits: Mapping[str, Tensor]) -> pa.Table:
    """Predictions as a part has them."""
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("clip_id", "split")}
    columns["fold"] = pa.array([row["fold"] for row in rows], pa.int64())
    seconds = [row["duration"] for row in rows]
    for name, task in tasks.items():
        columns |= answers(task, logits[name], seconds)
    return pa.table(columns)


def answers(task: TaskSpec, logits: Tensor, seconds: Sequence[float]) -> dict[str, pa.Array]:
    """Logits (B, outputs), of events (B, bins, outputs), as the columns of a task; seconds: the clips' lengths."""
    if not task.has_classes:
        return {task.name: pa.array(logits.squeeze(-1).numpy())}
    if task.rate:
        best = logits.argmax(-1).numpy()
        return {task.name: pa.array([to_events(task, *clip) for clip in zip(best, seconds, strict=True)], EVENTS)}
    probabilities = logits.softmax(-1).numpy()
    return {
        task.name: pa.array([task.classes[i] for i in probabilities.argmax(-1)], pa.string()),
        f"{task.name}_probability": pa.array(probabilities.max(-1)),
        f"{task.name}_probabilities": pa.StructArray.from_arrays(
            [pa.array(column) for column in probabilities.T.copy()], names=list(task.classes)
        ),
    }


def to_events(task: TaskSpec, bins: np.ndarray, seconds: float) -> list[dict[str, Any]]:
    """Classes of bins (bins,), of which a clip has as many as its length holds, as events: runs of one class."""
    bins = bins[: len(bin_events(None, seconds, task.rate, {}))]
    edges = np.flatnonzero(np.diff(bins, prepend=-1, append=-1))
    runs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    events = [
        {"start": first / task.rate, "end": min(last / task.rate, seconds), "label": task.classes[bins[first]]}
        for first, last in runs
    ]
    return [event for event in events if event["label"] != BACKGROUND and event["start"] < event["end"]]
