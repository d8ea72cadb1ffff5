"""What a sweep searches: token budgets, loss weights, learning rate and size, by option name.

A baseline, which has no budget and no regulariser, is searched over the options that it shares with CLCR and over its
own, so that a comparison tunes every model alike. An option that the recipe switches off (0, on a logarithmic scale)
stays off.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import make_dataclass, replace
from typing import Any, get_args

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from clcr.errors import ConfigError
from clcr.versions import renamed
from pipelines.common.cli import flatten, option_types, override, parse
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
OPTION_TYPES: dict[str, Any] = {name: kind for name, kind in option_types(Recipe) if name in flatten(Recipe())}


class Space(dict[str, Distribution]):
    """Distributions by option name, in the order in which they are drawn; `when`: the conditions of some.

    An option is drawn where every option that its condition names has a value that the condition's distribution holds.
    """

    def __init__(
        self, distributions: Mapping[str, Distribution], when: Mapping[str, Mapping[str, Distribution]] | None = None
    ) -> None:
        super().__init__(distributions)
        self.when = dict(when or {})

    def active(self, name: str, point: Mapping[str, Any]) -> bool:
        """Whether an option is drawn, given the values of those before it."""
        wanted = self.when.get(name, {})
        return all(other in point and holds(values, point[other]) for other, values in wanted.items())

    def inside(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The point of this space that has these values, and the name of an option that it cannot have, or ""."""
        point: dict[str, Any] = {}
        for name, distribution in self.items():
            if self.active(name, point):
                if name not in values or not holds(distribution, values[name]):
                    return point, name
                point[name] = values[name]
        return point, ""

    def points(self, so_far: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Every point of a space of choices, whole numbers and steps."""
        point = dict(so_far or {})
        name = next((name for name in self if name not in point and self.active(name, point)), None)
        if name is None:
            yield point
            return
        for value in _values(self[name]):
            yield from self.points({**point, name: value})


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


def values_of(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe's values as points have them: one `budget.start` for each level, and lists as text."""
    return {name: _storable(value) for name, value in _options(recipe).items()}


def apply(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe at a point of its space. A start of the budget at a level that it does not have counts for nothing."""
    options = {
        name: _parsed(name, value) if isinstance(value, str) else value
        for name, value in renamed(point).items()
        if not name.startswith(f"{BUDGET_START}.")
    }
    starts = options.get(BUDGET_START, recipe.network.budget.start)
    names = [f"{BUDGET_START}.{level}" for level in range(options.get("model.levels", recipe.network.model.levels))]
    if point.keys() & set(names):
        starts = starts * len(names) if len(starts) == 1 else starts
        options[BUDGET_START] = tuple(map(point.get, names, starts))
    return override(recipe, options)


def holds(distribution: Distribution, value: Any) -> bool:
    """Whether the distribution can give this value."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-8


def convert(name: str, value: Any) -> Any:
    """A value of an option, as YAML has it, in the option's own type; a list becomes text, as a study keeps it.

    Raises JobError for a value that the option cannot have.
    """
    return _storable(_parsed(name, value))


def _parsed(name: str, value: Any) -> Any:
    """What the command line makes of an option's value."""
    kind = OPTION_TYPES.get(name, float)  # float: budget.start.K
    if kind is bool or isinstance(value, bool):
        if not isinstance(value, bool) or bool not in (kind, *get_args(kind)):
            raise JobError(f"cannot be {value!r}")
        return value
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    try:
        return parse(make_dataclass("Option", [("value", kind)]), [f"--value={text}"]).value
    except JobError:
        raise JobError(f"cannot be {value!r}") from None


def _storable(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _values(distribution: Distribution) -> list[Any]:
    """Every value of a distribution. Raises JobError where there is no end of them."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if distribution.log or not distribution.step:
        raise JobError("has no steps")
    many = math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
    return [distribution.low + number * distribution.step for number in range(many)]


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
        model = replace(recipe.network.model, width=width)
    except ConfigError:
        return False
    return model.exchange_width % model.heads == 0


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
