"""Logits as rows of predictions: what predict, evaluate, serve and the MLflow model all give of a clip.

classification   TASK the class, TASK_probability of it, TASK_probabilities of every class by its name
numbers          TASK
events           TASK a list of {start, end, label} in seconds, as a manifest has them: bins of one class in a row
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor

from clcr import TaskSpec
from clcr.answers import to_events
from features.corpus.events import EVENTS
from pipelines.common.errors import JobError

Row = Mapping[str, Any]  # of the store's index


def to_table(tasks: Mapping[str, TaskSpec], rows: Sequence[Row], logits: Mapping[str, Tensor]) -> pa.Table:
    """Predictions as a part has them."""
    columns = row_columns(rows)
    seconds = [row["duration"] for row in rows]
    for name, task in tasks.items():
        columns |= answers(task, logits[name], seconds)
    return pa.table(columns)


def row_columns(rows: Sequence[Row]) -> dict[str, pa.Array]:
    """Which clip each row is: clip_id, split and fold, and its store's name where the rows are of several stores."""
    texts = ["clip_id", "split", *(["store"] if rows and "store" in rows[0] else [])]
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in texts}
    return columns | {"fold": pa.array([row["fold"] for row in rows], pa.int64())}


def answers(task: TaskSpec, logits: Tensor, seconds: Sequence[float]) -> dict[str, pa.Array]:
    """Logits (B, outputs), of events (B, bins, outputs), as the columns of a task; seconds: the clips' lengths."""
    if not task.has_classes:
        return {task.name: pa.array(logits.squeeze(-1).numpy())}
    if task.rate:
        bins = logits.argmax(-1).numpy()
        return {task.name: pa.array([to_events(task, *clip) for clip in zip(bins, seconds, strict=True)], EVENTS)}
    probabilities = logits.float().softmax(-1).numpy()
    best, probability, each = columns_of(task)
    return {
        best: pa.array([task.classes[i] for i in probabilities.argmax(-1)], pa.string()),
        probability: pa.array(probabilities.max(-1)),
        each: pa.StructArray.from_arrays(
            [pa.array(column) for column in probabilities.T.copy()], names=distinct_names(task.classes)
        ),
    }


def columns_of(task: TaskSpec) -> list[str]:
    """The names of a task's columns."""
    if task.kind != "classification":
        return [task.name]
    return [task.name, f"{task.name}_probability", f"{task.name}_probabilities"]


def require_distinct_columns(tasks: Mapping[str, TaskSpec], mixture: bool = False) -> None:
    """Raise JobError for tasks that would write one column: `mood` with classes, and a task `mood_probability`.

    mixture: whether the rows are of several stores.
    """
    owners = dict.fromkeys(("clip_id", "split", "fold", *(["store"] if mixture else [])), "every row")
    for task in tasks.values():
        for column in columns_of(task):
            if column in owners:
                raise JobError(
                    f"task {task.name}: its column {column} is one of {owners[column]} too; train with tasks of other "
                    "names, or without one of them (--tasks)"
                )
            owners[column] = f"task {task.name}"


def distinct_names(classes: Sequence[str]) -> list[str]:
    """Names of a struct's fields that differ by more than case, which DuckDB does not tell apart: A, a -> A, a_2."""
    taken: set[str] = {name.lower() for name in classes}
    seen: set[str] = set()
    names = []
    for name in classes:
        if name.lower() in seen:
            number = 2
            while f"{name}_{number}".lower() in taken:
                number += 1
            name = f"{name}_{number}"
            taken.add(name.lower())
        seen.add(name.lower())
        names.append(name)
    return names
