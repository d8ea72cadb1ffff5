"""What is left of a model when a modality is missing or noisy: a table of subsets, and a curve per modality.

Relative robustness is MultiBench's (Liang et al. 2021): the area under the curve of a figure over the level of noise,
by trapezoids; divided here by the largest level, so that it is the figure's mean over the levels. The figure is
accuracy, or of numbers the skill (1 - MAE over that of the median: higher is better). `kept` is that over the figure
without noise.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from clcr import metrics as M
from pipelines.evaluation.conditions import WHOLE, Condition
from pipelines.evaluation.scores import Figures, Scored, summary


def subset_figures(by_condition: Mapping[str, Scored], conditions: Sequence[Condition]) -> dict[str, Figures]:
    """`summary` under each condition that takes modalities away, after the clips as they are."""
    names = [WHOLE, *(c.name for c in conditions if c.absent)]
    return {name: summary(by_condition[name]) for name in names}


def noise_figures(by_condition: Mapping[str, Scored], conditions: Sequence[Condition]) -> dict[str, Figures]:
    """By modality: `levels`, `summary` at each (level 0 first), relative robustness and the share kept."""
    curves: dict[str, Figures] = {}
    for modality in dict.fromkeys(c.noisy for c in conditions if c.noisy):
        noisy = sorted((c for c in conditions if c.noisy == modality), key=lambda c: c.level)
        levels = [0.0, *(c.level for c in noisy)]
        points = [summary(by_condition[name]) for name in (WHOLE, *(c.name for c in noisy))]
        values = [M.main_metric(p) if len(p) > 1 else math.nan for p in points]
        relative = relative_robustness(levels, values)
        kept = relative / values[0] if values[0] > 0 else math.nan
        curves[modality] = {"levels": levels, "figures": points, "relative_robustness": relative, "kept": kept}
    return curves


def relative_robustness(levels: Sequence[float], values: Sequence[float]) -> float:
    """Mean of a figure over the levels of noise: the area under its curve, over the largest level."""
    return float(np.trapezoid(values, levels) / max(levels)) if max(levels, default=0) > 0 else math.nan
