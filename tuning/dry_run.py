"""What a sweep would do: its space and its first points, without a cluster and without a file written."""

from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from rich.console import Console
from rich.table import Table

from tuning.objectives import shown
from tuning.options import SweepConfig
from tuning.samplers import sampler
from tuning.schedulers import chosen
from tuning.space import Distribution, values_of
from tuning.study import draw

POINTS = 5


def print_plan(config: SweepConfig) -> None:
    """Print the space and the points that a new sweep would try first."""
    space, given = config.searched, values_of(config.recipe)
    table = Table("option", "searched", "recipe", "when")
    for name, distribution in space.items():
        when = " and ".join(f"{other} {words(values)}" for other, values in space.when.get(name, {}).items())
        table.add_row(name, words(distribution), shown(given.get(name, "")), when)
    console = Console(width=120)
    console.print(table)
    goals = ", ".join(f"{objective.metric} ({objective.direction[:3]}.)" for objective in config.wanted)
    stopped = chosen(config.scheduler, config.sampler, config.wanted)
    many = f"{config.limit} trials" if config.limit else f"as many trials as {config.hours:g} hours allow"
    print(f"{many} by {config.sampler}, stopped early by {stopped}, for {goals}; the first {POINTS} points:")
    points = Table("trial", *space)
    for number, point in enumerate(first_points(config)):
        points.add_row(str(number), *(shown(point[name]) if name in point else "" for name in space))
    Console(width=max(120, 12 * len(space))).print(points)


def first_points(config: SweepConfig) -> Iterator[Mapping[str, Any]]:
    """The points that a new sweep tries first, if none of its trials ends before the last of them starts."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=[objective.direction for objective in config.wanted],
        sampler=sampler(config.sampler, config.searched, config.recipe.seed, config.limit),
    )
    for point in config.first_points:
        study.enqueue_trial(point, skip_if_exists=True)
    for _ in range(min(POINTS, config.limit or POINTS)):
        yield draw(study.ask(), config.searched)


def words(distribution: Distribution) -> str:
    """A distribution in a few words."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(map(str, distribution.choices))
    how = ", logarithmic" if distribution.log else ""
    if distribution.step and distribution.step != 1:
        how += f", step {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{how}"
