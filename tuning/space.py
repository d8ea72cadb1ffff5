"""What a sweep searches: token budgets, loss weights, learning rate and size, by option name.

A baseline, which has no budget and no regulariser, is searched over the options that it shares with CLCR and over its
own, so that a comparison tunes every model alike. An option that the recipe switches off (0, on a logarithmic scale)
stays off.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from clcr.errors import ConfigError
from pipelines.common.cli import flatten, override
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

SHARED: dict[str, Distribution] = {
    "lr": FloatDistribution(5e-4, 8e-3, log=True),
    "weight_decay": FloatDistribution(1e-4, 1e-1, log=True),
    "model.dropout": FloatDistribution(0.0, 0.4),
}  # alongside model.width: half of the recipe's, the same, and double
START = FloatDistribution(0.1, 0.95)  # budget.start.K: level K's share of admitted tokens
BUDGET: dict[str, Distribution] = {
    "budget.threshold": FloatDistribution(-3.0, 1.0),
    "budget.scale": FloatDistribution(1.0, 8.0),
}
LOSS: dict[str, Distribution] = {
    "loss.lambda_intra": FloatDistribution(1e-3, 1.0, log=True),
    "loss.lambda_inter": FloatDistribution(1e-3, 1.0, log=True),
}
INTER: dict[str, Distribution] = {  # the weights of the terms that lambda_inter scales
    f"loss.{term}": FloatDistribution(0.1, 10.0, log=True) for term in ("pr", "sp", "mix")
}
MISA = ("similarity", "difference", "reconstruction")
OWN: dict[str, dict[str, Distribution]] = {  # options that one baseline alone has
    "mult": {"mult.depth": IntDistribution(2, 6)},
    "mm_orient": {"mm_orient.linked": FloatDistribution(0.02, 0.4, log=True)},
    "misa": {f"misa.{loss}": FloatDistribution(1e-3, 1.0, log=True) for loss in MISA},
    "ogm_ge": {"ogm_ge.alpha": FloatDistribution(0.1, 1.0)},
}
BUDGET_START = "budget.start"


def space(recipe: Recipe, search: tuple[str, ...] = ()) -> dict[str, Distribution]:
    """The distributions to search, by option name, each wide enough to hold the recipe's own value.

    search: options or groups of options (`budget`, `loss.pr`) to keep; none named = all. Raises JobError for one that
    the model does not have.
    """
    options = _options(recipe)
    searchable = {
        name: _widened(distribution, options[name])
        for name, distribution in _searchable(recipe).items()
        if not _is_off(distribution, options[name])
    }
    if not search:
        return searchable
    for group in search:
        if not any(_belongs(name, group) for name in searchable):
            raise JobError(f"--search {group}: {recipe.architecture} has {', '.join(searchable)}")
    return {name: d for name, d in searchable.items() if any(_belongs(name, group) for group in search)}


def known(recipe: Recipe, search: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the options or groups of options in `search` that the model has."""
    searchable = space(recipe)
    return tuple(group for group in search if any(_belongs(name, group) for name in searchable))


def defaults(recipe: Recipe, search: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe's own values as a point of its space: the first point that a sweep tries."""
    options = _options(recipe)
    return {name: options[name] for name in space(recipe, search)}


def apply(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe at a point of its space."""
    options = {name: value for name, value in point.items() if not name.startswith(BUDGET_START)}
    starts = {name: value for name, value in _options(recipe).items() if name.startswith(f"{BUDGET_START}.")}
    if starts.keys() & point.keys():
        options[BUDGET_START] = tuple((starts | dict(point))[name] for name in starts)
    return override(recipe, options)


def holds(distribution: Distribution, value: Any) -> bool:
    """Whether the distribution can give this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


def _searchable(recipe: Recipe) -> dict[str, Distribution]:
    """Every option that can be searched for this model with these options."""
    model = recipe.network.model
    widths = [width for width in (model.width // 2, model.width, 2 * model.width) if _fits(recipe, width)]
    shared = {**SHARED, "model.width": CategoricalDistribution(widths), **OWN.get(recipe.architecture, {})}
    if recipe.architecture != "clcr":
        return shared
    searchable: dict[str, Distribution] = {}
    if model.exchange == "budgeted":
        searchable |= {f"{BUDGET_START}.{level}": START for level in range(model.levels)}
        searchable |= BUDGET
    searchable |= LOSS
    if recipe.network.loss.lambda_inter:
        searchable |= INTER
    return searchable | shared


def _options(recipe: Recipe) -> dict[str, Any]:
    """All options by name, with one `budget.start` for each level."""
    starts = recipe.network.budget.start
    if len(starts) == 1:  # one for all levels
        starts = starts * recipe.network.model.levels
    return flatten(recipe) | {f"{BUDGET_START}.{level}": start for level, start in enumerate(starts)}


def _fits(recipe: Recipe, width: int) -> bool:
    try:
        replace(recipe.network.model, width=width)
    except ConfigError:
        return False
    return True


def _is_off(distribution: Distribution, value: Any) -> bool:
    return not isinstance(distribution, CategoricalDistribution) and distribution.log and value == 0


def _widened(distribution: Distribution, value: Any) -> Distribution:
    if isinstance(distribution, CategoricalDistribution) or holds(distribution, value):
        return distribution
    low, high = min(distribution.low, value), max(distribution.high, value)
    return type(distribution)(low, high, log=distribution.log)


def _belongs(name: str, group: str) -> bool:
    """Whether an option is the one named, or one of the group named; hyphens and underscores are the same."""
    group = group.replace("-", "_")
    return name == group or name.startswith(f"{group}.")
