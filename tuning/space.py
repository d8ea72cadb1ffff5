"""What a sweep searches: token budgets, loss weights, learning rate and size, by option name.

A model that has no budget and no regulariser (every baseline) is searched over the options that it shares with CLCR and
over its own, so that a comparison tunes each alike. An option that the recipe switches off (0, on a logarithmic scale)
stays off.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from clcr.errors import ConfigError
from pipelines.common.cli import JobError, flatten, override
from pipelines.training.learner import Recipe

SHARED: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(5e-4, 8e-3, log=True),
    "weight_decay": FloatDistribution(1e-4, 1e-1, log=True),
    "model.dropout": FloatDistribution(0.0, 0.4),
}  # and model.width: half, as given, and double
START = FloatDistribution(0.1, 0.95)  # budget.start.K: level K's share of admitted tokens
BUDGET: dict[str, BaseDistribution] = {
    "budget.threshold": FloatDistribution(-3.0, 1.0),
    "budget.scale": FloatDistribution(1.0, 8.0),
}
LOSS: dict[str, BaseDistribution] = {
    "loss.lambda_intra": FloatDistribution(1e-3, 1.0, log=True),
    "loss.lambda_inter": FloatDistribution(1e-3, 1.0, log=True),
}
INTER: dict[str, BaseDistribution] = {  # the weights of its terms, within lambda_inter
    f"loss.{term}": FloatDistribution(0.1, 10.0, log=True) for term in ("pr", "sp", "mix")
}
MISA = ("similarity", "difference", "reconstruction")
OWN: dict[str, dict[str, BaseDistribution]] = {  # of other models
    "mult": {"model.depth": IntDistribution(2, 6)},
    "mm_orient": {"mm_orient.linked": FloatDistribution(0.02, 0.4, log=True)},
    "misa": {f"misa.{loss}": FloatDistribution(1e-3, 1.0, log=True) for loss in MISA},
    "ogm_ge": {"ogm_ge.alpha": FloatDistribution(0.1, 1.0)},
}
BUDGET_START = "budget.start"


def space(recipe: Recipe, search: tuple[str, ...] = ()) -> dict[str, BaseDistribution]:
    """The distributions to search, by option name, each wide enough to hold the recipe's own value.

    search: options or groups of options (`budget`, `loss.pr`) to keep; none named = all. Raises JobError for one that
    the model does not have.
    """
    options = _options(recipe)
    found = {name: _widened(d, options[name]) for name, d in _of_model(recipe).items() if not _is_off(d, options[name])}
    for name in search:
        if not any(_belongs(option, name) for option in found):
            raise JobError(f"--search {name}: {recipe.architecture} has {', '.join(found)}")
    return {name: d for name, d in found.items() if not search or any(_belongs(name, s) for s in search)}


def known(recipe: Recipe, search: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the options or groups of options that the model has."""
    found = space(recipe)
    return tuple(name for name in search if any(_belongs(option, name) for option in found))


def defaults(recipe: Recipe, search: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe as it stands, as a point of its space: a sweep tries it first."""
    options = _options(recipe)
    return {name: options[name] for name in space(recipe, search)}


def apply(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe at a point of its space."""
    options = {name: value for name, value in point.items() if not name.startswith(BUDGET_START)}
    starts = {name: value for name, value in _options(recipe).items() if name.startswith(f"{BUDGET_START}.")}
    if starts.keys() & point.keys():
        options[BUDGET_START] = tuple((starts | dict(point))[name] for name in starts)
    return override(recipe, options)


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value can be drawn."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


def _of_model(recipe: Recipe) -> dict[str, BaseDistribution]:
    """What there is to search of this model with these options."""
    model = recipe.model
    widths = CategoricalDistribution([w for w in (model.width // 2, model.width, 2 * model.width) if _fits(recipe, w)])
    shared = SHARED | {"model.width": widths} | OWN.get(recipe.architecture, {})
    if recipe.architecture != "clcr":
        return shared
    starts = {f"{BUDGET_START}.{level}": START for level in range(model.levels)}
    budget = {**starts, **BUDGET} if model.exchange == "budgeted" else {}
    return {**budget, **LOSS, **(INTER if recipe.loss.lambda_inter else {}), **shared}


def _options(recipe: Recipe) -> dict[str, Any]:
    """All options by name, a budget for each level."""
    starts = recipe.budget.start * (recipe.model.levels if len(recipe.budget.start) == 1 else 1)
    return flatten(recipe) | {f"{BUDGET_START}.{level}": start for level, start in enumerate(starts)}


def _fits(recipe: Recipe, width: int) -> bool:
    try:
        return bool(replace(recipe.model, width=width))
    except ConfigError:
        return False


def _is_off(distribution: BaseDistribution, value: Any) -> bool:
    return getattr(distribution, "log", False) and value == 0


def _widened(distribution: BaseDistribution, value: Any) -> BaseDistribution:
    if holds(distribution, value):
        return distribution
    low, high = min(distribution.low, value), max(distribution.high, value)
    return type(distribution)(low, high, log=distribution.log)


def _belongs(option: str, name: str) -> bool:
    name = name.replace("-", "_")  # as the command line takes either
    return option == name or option.startswith(f"{name}.")
