"""The options of the sweep job, and what they say about the first points to try."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from pipelines.common.cli import JobError, parse, require_at_least
from pipelines.training.learner import Recipe
from tuning.space import defaults, holds, space


@dataclass(frozen=True)
class SweepConfig:
    """Options of the sweep job."""

    store: str
    """feature store; path or URI"""
    out: str
    """folder of this sweep; path or URI"""
    trials: int = 20
    """configurations to try; the first is the recipe as given; 0 = as many as --hours allow"""
    hours: float = 0.0
    """no trial starts later than this, counted from this start of the job; 0 = no limit"""
    objectives: tuple[str, ...] = ("score",)
    """score (the validation score), or score,participation: also the share of tokens exchanged, as a Pareto front"""
    search: tuple[str, ...] = ()
    """options or groups of options to search (budget, loss.pr, lr); none named = all that the model has"""
    start_from: tuple[str, ...] = ()
    """YAML files of options to try first, such as an earlier sweep's best.yaml"""
    final_seeds: int = 3
    """seeds with which the best and the given recipe are trained at the end and scored on the test split; 0 = none"""
    concurrency: int = 0
    """trials at a time; 0 = as many as the cluster's CPUs (GPUs, where there are any) allow"""
    workers_per_trial: int = 1
    """data-parallel workers of each trial"""
    cpus_per_trial: int = 1
    """CPUs of each worker of a trial"""
    gpus_per_trial: float = 1.0
    """GPUs of each worker of a trial, on a cluster that has any; a fraction shares one"""
    grace_epochs: int = 5
    """epochs that every trial may run before ASHA can stop it; with two objectives it stops none"""
    reduction: int = 3
    """ASHA lets one of so many trials go on at each rung"""
    experiment: str = "clcr"
    """MLflow experiment"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        least = {"trials": 0, "hours": 0, "final_seeds": 0, "concurrency": 0, "workers_per_trial": 1}
        least |= {"cpus_per_trial": 1, "gpus_per_trial": 0, "grace_epochs": 1, "reduction": 2}
        require_at_least(self, least)
        if not self.trials and not self.hours:
            raise JobError("--trials 0: must be 1 or more, or give --hours")
        if self.objectives not in (("score",), ("score", "participation")):
            raise JobError(f"--objectives {','.join(self.objectives)}: choose score or score,participation")
        budgeted = self.recipe.architecture == "clcr" and self.recipe.model.exchange == "budgeted"
        if len(self.objectives) > 1 and not budgeted:
            raise JobError(f"--objectives participation: {self.recipe.architecture} as given has no token budget")
        space(self.recipe, self.search)

    @property
    def first_points(self) -> list[dict[str, Any]]:
        """Points to try before the sampler's: the recipe as given, then those of --start-from."""
        return [defaults(self.recipe, self.search), *(self._point(path) for path in self.start_from)]

    def _point(self, path: str) -> dict[str, Any]:
        other = parse(Recipe, ["--config", path])
        if other.architecture != self.recipe.architecture:
            raise JobError(f"--start-from {path}: has model {other.architecture}, not {self.recipe.architecture}")
        mine, point = space(self.recipe, self.search), defaults(other)
        for name, distribution in mine.items():
            if name not in point:
                raise JobError(f"--start-from {path}: has no {name}, which is searched")
            if not holds(distribution, point[name]):
                raise JobError(f"--start-from {path}: {name} {point[name]} lies outside of what is searched")
        return {name: point[name] for name in mine}
