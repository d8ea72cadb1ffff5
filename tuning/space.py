"""What a sweep searches: token budgets, loss weights and the learning rate, by option name.

A model that has no budget and no regulariser (every baseline) is searched over the options that it shares with CLCR,
so that a comparison tunes each alike.
"""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution

from pipelines.cli import flatten, override
from pipelines.train import Recipe

SHARED: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(5e-4, 8e-3, log=True),
    "weight_decay": FloatDistribution(1e-4, 1e-1, log=True),
    "model.dropout": FloatDistribution(0.0, 0.4),
}
BUDGET: dict[str, BaseDistribution] = {
    "budget.threshold": FloatDistribution(-3.0, 1.0),
    "budget.scale": FloatDistribution(1.0, 8.0),
}
LOSS: dict[str, BaseDistribution] = {
    "loss.lambda_intra": FloatDistribution(1e-3, 1.0, log=True),
    "loss.lambda_inter": FloatDistribution(1e-3, 1.0, log=True),
}
BUDGET_START = "budget.start"


def space(recipe: Recipe) -> dict[str, BaseDistribution]:
    """The distributions to search, by option name; `budget.start.K` is level K's share of admitted tokens."""
    if recipe.architecture != "clcr":
        return dict(SHARED)
    levels = {f"{BUDGET_START}.{level}": FloatDistribution(0.1, 0.95) for level in range(recipe.model.levels)}
    return {**levels, **BUDGET, **LOSS, **SHARED}


def defaults(recipe: Recipe) -> dict[str, float]:
    """The recipe as it stands, as a point of its space: a sweep tries it first."""
    options = flatten(recipe)
    starts = recipe.budget.start * (recipe.model.levels if len(recipe.budget.start) == 1 else 1)
    options |= {f"{BUDGET_START}.{level}": start for level, start in enumerate(starts)}
    return {name: options[name] for name in space(recipe)}


def apply(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe at a point of its space."""
    options = {name: value for name, value in point.items() if not name.startswith(BUDGET_START)}
    starts = [point[name] for name in sorted(point) if name.startswith(BUDGET_START)]
    return override(recipe, options | ({BUDGET_START: tuple(starts)} if starts else {}))
