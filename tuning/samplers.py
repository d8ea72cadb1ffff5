"""Who proposes the next point (Optuna's samplers), and which combinations with a space and objectives cannot work."""

import importlib.util
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler
from optuna.samplers import TPESampler as TPE

from pipelines.common.errors import JobError
from tuning.objectives import Objective
from tuning.space import Space

SamplerName = Literal["tpe", "gp", "cmaes", "nsga2", "random", "grid"]
LEARNING: tuple[SamplerName, ...] = ("tpe", "gp")  # those that learn from trials which they did not propose
LARGEST_GRID = 100_000  # points that are counted at most


class Grid(BruteForceSampler):
    """Every point of a space once, in random order. The search counts the points, so nothing has to be stopped."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Optuna's own would stop a loop that Ray Tune runs."""


def sampler(name: SamplerName, space: Space, seed: int, trials: int) -> BaseSampler:
    """A fresh sampler; trials: how many there shall be, 0 = not known. The first of them are randomly sampled.

    A space with conditions is modelled in groups of options that are drawn together.
    """
    startup, population = min(10, trials // 2 or 10), max(4, min(50, trials // 4 or 50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return GPSampler(seed=seed, n_startup_trials=startup)
        if name == "cmaes":  # trials that were stopped early teach it too
            return CmaEsSampler(seed=seed, n_startup_trials=startup, consider_pruned_trials=True)
        if name == "nsga2":
            return NSGAIISampler(seed=seed, population_size=population)
        if name == "random":
            return RandomSampler(seed=seed)
        if name == "grid":
            return Grid(seed=seed)
        return TPE(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup, group=bool(space.when))


def require_able(name: SamplerName, space: Space, objectives: Sequence[Objective]) -> None:
    """Raise JobError where a sampler cannot search a space, or for these objectives, naming both options."""
    conditional = next(iter(space.when), "")
    if name in ("gp", "cmaes") and conditional:
        raise JobError(
            f"--sampler {name}: cannot search {conditional}, which has a condition; take tpe, nsga2, random or grid"
        )
    if name == "cmaes":
        if importlib.util.find_spec("cmaes") is None:
            raise JobError("--sampler cmaes: needs the package cmaes (pip install cmaes)")
        if len(objectives) > 1:
            raise JobError(f"--sampler cmaes: has one objective, --objectives names {len(objectives)}; take nsga2")
        if chosen := [option for option, kind in space.items() if isinstance(kind, CategoricalDistribution)]:
            raise JobError(f"--sampler cmaes: searches numbers alone, and {chosen[0]} has choices; take tpe or gp")
        if len(space) < 2:
            raise JobError(f"--sampler cmaes: searches two options or more, the space has {', '.join(space)} alone")
    if name == "grid":
        numbers = {option: kind for option, kind in space.items() if not isinstance(kind, CategoricalDistribution)}
        if endless := [option for option, kind in numbers.items() if kind.log or not kind.step]:
            raise JobError(f"--sampler grid: {endless[0]} needs choices, or a step in place of a logarithm")


def count_points(space: Space) -> int:
    """How many points a grid has, LARGEST_GRID at most."""
    return sum(1 for _ in islice(space.points(), LARGEST_GRID))
