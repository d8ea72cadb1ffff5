"""What a linear model makes of the clips' statistics, on the divisions of `fusion`: what a network should beat.

Every modality's mean over time and, where it has more than one token, its spread; standardised, side by side, into a
logistic regression whose penalty the validation part chooses. Of a single task with classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clcr.tasks import TaskSpec
from tests.benchmarks.answers import packed

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def statistics(samples: Sequence[dict[str, Any]], modalities: Sequence[str]) -> np.ndarray:
    """A row per clip (N, D); a modality that a clip lacks is zeros, and so is a number that is not finite."""
    found = [{m: s["features"][m] for m in modalities if m in s["features"]} for s in samples]
    columns = []
    for modality in modalities:
        tokens = [clip[modality].reshape(len(clip[modality]), -1) if modality in clip else None for clip in found]
        wide = next(t.shape[1] for t in tokens if t is not None)
        tokens = [np.zeros((1, wide)) if t is None else np.nan_to_num(t.astype(np.float64)) for t in tokens]
        columns.append(np.stack([t.mean(axis=0) for t in tokens]))
        if any(len(t) > 1 for t in tokens):
            columns.append(np.stack([t.std(axis=0) for t in tokens]))
    return np.concatenate(columns, axis=1)


def fit_linear(
    samples: Sequence[dict[str, Any]], parts: Sequence[str], modalities: Sequence[str], tasks: Mapping[str, TaskSpec]
) -> dict[str, Any]:
    """A row of `fusion`: accuracy on `val` and, where there is such a part, on `test`; and which clips were right."""
    if len(tasks) > 1 or next(iter(tasks.values())).kind != "classification":
        raise SystemExit(f"linear: it answers one task with classes, and the store has {', '.join(tasks)}")
    if unknown := [m for m in modalities if not any(m in sample["features"] for sample in samples)]:
        raise SystemExit(f"linear {unknown[0]}: the store holds no such modality")
    values, part = statistics(samples, modalities), np.array(parts)
    (task,) = samples[0]["targets"]
    targets = np.array([-1 if (index := sample["targets"][task]) is None else index for sample in samples])
    part[targets < 0] = ""
    cut = {name: (values[part == name], targets[part == name]) for name in ("train", "val", "test")}
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(*cut["train"]) for c in PENALTIES
    ]
    best = max(fitted, key=lambda model: model.score(*cut["val"]))
    last = "test" if len(cut["test"][1]) else "val"
    right = best.predict(cut[last][0]) == cut[last][1]
    score = best.score(*cut["val"])
    test = float(right.mean()) if last == "test" else ""
    found = {"epochs": 0, "val": score, "last": score, "test": test, "alone": "", "participation": ""}
    return found | {"right": packed(right[:, None])}
