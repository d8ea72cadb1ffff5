"""The weight alpha of every token over time, as strips below a clip on a contact sheet."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

import clcr
from clcr.batches import collate


def alpha_strips(model: clcr.CLCR) -> dict[str, Any]:
    """For the contact sheet: a strip per level with the weight of every token, over time."""

    def draw(axes: Axes, sample: Mapping[str, Any], level: int) -> None:
        given = {m: sample[m] for m in model.features if m in sample}
        batch = collate([{"clip_id": "x", "features": given, "targets": {}}], model.features, model.tasks)
        with torch.no_grad():
            out = model(batch)
            spans = model.encoder(batch)[level]
        for m in given:
            keep = out.valid[level][m][0]
            edges = spans[m].spans[keep]
            alpha = out.alpha[level][m][0, keep].numpy()
            steps = [*edges[:, 0].tolist(), edges[-1, 1].item()]
            if not np.isfinite(steps).all():  # tokens without time, in their order
                steps = np.linspace(*axes.get_xlim(), len(steps)).tolist()
            axes.stairs(alpha, steps, baseline=None, label=m)
        axes.set(ylim=(-0.05, 1.05))
        axes.legend(loc="lower right", fontsize=6, ncols=len(given), framealpha=0.6)

    levels = range(len(model.summaries))
    return {f"alpha {level}": lambda axes, sample, level=level: draw(axes, sample, level) for level in levels}
