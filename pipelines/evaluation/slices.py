"""Where a model is weak: figures of parts of the clips, the worst clips, and whether a file's metadata gives it away.

A slice is the clips that share a value of a column of the store's index, or a quarter of a column of numbers.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features.store.quality import FACE, QUALITY_SCHEMA
from pipelines.common.errors import JobError
from pipelines.evaluation.scores import Figures, Scored, summary

QUARTERS = 8  # distinct numbers above which a column is cut into quarters
MOST = 20  # values of a column; rarer ones count together
LEAST = 20  # labelled training clips that a probe needs


def slice_clips(index: pa.Table, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The slice of every clip by column, (clips,) text each; none named = length, and modalities that some clips lack.

    Raises JobError for a column that the index lacks.
    """
    names = {column: find_column(index, column) for column in columns}
    slices = {column: _values(index[name]) for column, name in names.items()}
    if not columns:
        slices = {"duration": _values(index["duration"])}
        for name in index.column_names:
            absent = np.array([not n for n in index[name].to_pylist()]) if name.startswith("tokens_") else np.zeros(0)
            if absent.any():
                slices[name.removeprefix("tokens_")] = np.where(absent, "absent", "present")
    return {column: values for column, values in slices.items() if len(set(values)) > 1 or columns}


def find_column(index: pa.Table, column: str) -> str:
    """A column of the index by its name, or a label's by the label's name."""
    for name in (column, f"label_{column}"):
        if name in index.column_names and not pa.types.is_nested(index[name].type):
            return name
    plain = [name for name in index.column_names if not pa.types.is_nested(index[name].type)]
    raise JobError(f"--slices {column}: the store's index has no such column; it has {', '.join(plain)}")


def _values(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        numbers = column.cast(pa.float64()).to_numpy()
        known = numbers[np.isfinite(numbers)]
        if len(np.unique(known)) > QUARTERS:
            edges = np.unique(np.quantile(known, (0, 0.25, 0.5, 0.75, 1)))
            part = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
            texts = _named(edges)
            return np.where(np.isfinite(numbers), np.array(texts, dtype=object)[part], "unknown").astype(str)
    values = np.array(["unknown" if value is None else str(value) for value in column.to_pylist()])
    names, counts = np.unique(values, return_counts=True)
    if len(names) > MOST:
        common = names[np.argsort(-counts, kind="stable")[: MOST - 1]]
        values = np.where(np.isin(values, common), values, "others")
    return values


def _named(edges: np.ndarray) -> list[str]:
    """`low to high` of each part, with as many digits as tell the edges apart."""
    for digits in range(4, 18):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len({*texts}) == len(texts):
            break
    return [f"{low} to {high}" for low, high in itertools.pairwise(texts)]


def slice_figures(scored: Scored, slices: Mapping[str, np.ndarray]) -> dict[str, dict[str, Figures]]:
    """`summary` of each slice by column and value, of those with a labelled row."""
    found: dict[str, dict[str, Figures]] = {}
    for column, values in slices.items():
        rows = values[scored.rows]
        found[column] = {str(value): summary(scored.take(rows == value)) for value in np.unique(rows)}
    return found


def worst_clips(scored: Scored, index: Sequence[Mapping[str, Any]], most: int) -> list[Figures]:
    """The clips with the largest mean loss, and what there is to know of them; index: rows of all clips asked.

    `row` is a clip's position there: in a mixture of stores, clips may share a clip_id.
    """
    if not len(scored.truth):
        return []
    counts, totals = np.bincount(scored.rows), np.bincount(scored.rows, scored.losses)
    clips = np.flatnonzero(counts)
    losses = totals[clips] / counts[clips]
    found = []
    for position in np.argsort(-losses, kind="stable")[:most]:
        clip = clips[position]
        row, mine = index[clip], scored.take(scored.rows == clip)
        tokens = {name.removeprefix("tokens_"): value for name, value in row.items() if name.startswith("tokens_")}
        entry = {"row": int(clip), "clip_id": row["clip_id"], "loss": float(losses[position])} | _said(mine)
        entry |= {"duration": row["duration"], "nbytes": row["nbytes"], "tokens": tokens, "shard": row["shard"]}
        found.append(entry)
    return found


def _said(scored: Scored) -> Figures:
    """What a clip's label is and what the model says of it."""
    if scored.task.rate:
        return {"wrong_bins": int((scored.guess != scored.truth).sum()), "bins": len(scored.truth)}
    if not scored.task.has_classes:
        return {"label": float(scored.truth[0]), "predicted": float(scored.guess[0])}
    labels, truth, guess = scored.labels, scored.truth[0], scored.guess[0]
    given = float(scored.probabilities[0, truth]) if truth < len(scored.task.classes) else 0.0
    said = {"label": labels[truth], "probability_of_label": given, "predicted": labels[guess]}
    return said | {"probability": float(scored.probabilities[0, guess])}


def metadata_probe(task: Any, train: pa.Table, tested: pa.Table, seed: int) -> Figures | None:
    """How well the label is told by a file's length, size and quality figures alone, learned on the train split.

    A figure well above `baseline` (the most frequent class, or the median) is a leak: clips of one class come from
    other files than those of another. None for events, and where too few labels are known.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    label = f"label_{task.name}"
    if task.rate or train.filter(train[label].is_valid()).num_rows < LEAST:
        return None
    train, tested = (t.filter(t[label].is_valid()) for t in (train, tested))
    if not len(tested):
        return None
    figures_of = ("duration", "nbytes", FACE.name, *QUALITY_SCHEMA.names)
    columns = [c for c in tested.column_names if c in figures_of or c[:7] == "tokens_"]
    x, x_test = (np.stack([t[c].cast(pa.float64()).to_numpy() for c in columns], 1) for t in (train, tested))
    y, y_test = (np.array(t[label].to_pylist()) for t in (train, tested))
    options = {"n_estimators": 100, "max_depth": 8, "random_state": seed, "n_jobs": 1}
    if not task.has_classes:
        guess = RandomForestRegressor(**options).fit(x, y).predict(x_test)
        error, constant = float(np.abs(guess - y_test).mean()), float(np.abs(np.median(y) - y_test).mean())
        return {
            "figure": "mae",
            "value": error,
            "baseline": constant,
            "columns": columns,
            "leak": error < 0.8 * constant,
        }
    from scipy.stats import binomtest

    y, y_test = y.astype(str), y_test.astype(str)
    names, counts = np.unique(y, return_counts=True)
    right = RandomForestClassifier(**options).fit(x, y).predict(x_test) == y_test
    majority = float((y_test == names[counts.argmax()]).mean())
    p = binomtest(int(right.sum()), len(right), max(majority, 1 / len(names)), alternative="greater").pvalue
    figures = {"figure": "accuracy", "value": float(right.mean()), "baseline": majority, "p": float(p)}
    return figures | {"columns": columns, "leak": bool(p < 0.001)}
