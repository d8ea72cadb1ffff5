"""Whether what a CLCR keeps private to a modality is private: does one modality's private flow predict another's?

A ridge regression learns it on training clips, from the mean flows of all levels; R² is that of the evaluated clips. A
private flow that predicts another's by as much as the shared ones do was not kept apart. Zero is ideal. What remains
also follows from the labels: whatever tells the class is alike in all modalities.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch

from clcr.base import MultimodalModel
from clcr.model import CLCROutput
from features.store import Store
from pipelines.answering.batches import batch_of
from pipelines.evaluation.inference import Row
from pipelines.evaluation.scores import Figures

LEAST = 20  # clips with both modalities, of each split
LEAK = 0.1  # R² above which the report warns
STRENGTHS = tuple(10.0**k for k in range(-2, 7))  # of the ridge, chosen on the training clips

Flows = dict[str, dict[str, np.ndarray]]  # private and shared, by modality: (clips, levels * d), NaN for the missing


def flow_probe(model: MultimodalModel, store: Store, train: Sequence[Row], tested: Sequence[Row], size: int) -> Figures:
    """R² by ordered pair `a -> b`, private and shared, and `leak`; empty for a model without flows, or for few clips.

    train, tested: rows of the index; size: clips that pass the model at once.
    """
    if len(model.features) < 2 or min(len(train), len(tested)) < LEAST:
        return {}
    seen, asked = (mean_flows(model, store, rows, size) for rows in (train, tested))
    if not (seen and asked):
        return {}
    found: Figures = {}
    for a, b in permutations(model.features, 2):
        values = {kind: r_squared(seen[kind][a], seen[kind][b], asked[kind][a], asked[kind][b]) for kind in seen}
        if values["private"] is not None:
            found[f"{a} -> {b}"] = values | {"leak": values["private"] > LEAK}
    return found


@torch.no_grad()
def mean_flows(model: MultimodalModel, store: Store, rows: Sequence[Row], size: int) -> Flows:
    """The flows of some clips; empty for a model that has none."""
    device = next(model.parameters()).device
    parts: dict[str, dict[str, list[torch.Tensor]]] = {kind: {} for kind in ("private", "shared")}
    for first in range(0, len(rows), size):
        batch = batch_of(model, store, rows[first : first + size]).to(device)
        output: Any = model(batch)
        if not isinstance(output, CLCROutput):
            return {}
        for kind, by_modality in parts.items():
            levels = getattr(output, kind)
            for m in model.features:
                values = torch.cat([level[m] for level in levels], dim=1).cpu()
                by_modality.setdefault(m, []).append(values.where(batch.present[m].cpu()[:, None], torch.nan))
    return {kind: {m: torch.cat(v).double().numpy() for m, v in of.items()} for kind, of in parts.items()}


def r_squared(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float | None:
    """R² of a ridge regression, weighted by the variance of what is predicted; None for too few known rows."""
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, known_test = (np.isfinite(np.hstack(pair)).all(1) for pair in ((x, y), (x_test, y_test)))
    if min(known.sum(), known_test.sum()) < LEAST:
        return None
    probe = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS)).fit(x[known], y[known])
    guess = probe.predict(x_test[known_test])
    return float(r2_score(y_test[known_test], guess, multioutput="variance_weighted"))
