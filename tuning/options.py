"""The options of the sweep job, and the first points to try, which follow from them."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from pipelines.common.cli import parse, require_at_least
from pipelines.common.errors import JobError
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
    """number of configurations to try, the first being the recipe as given; 0 = as many as --hours allows"""
    hours: float = 0.0
    """hours after the start of the job within which trials may start; 0 = no limit"""
    objectives: tuple[str, ...] = ("score",)
    """score (maximise the validation score), or score,participation (also minimise the share of exchanged tokens; the
    result is a Pareto front)"""
    search: tuple[str, ...] = ()
    """options or groups of options to search (budget, loss.pr, lr); none named = all that the model has"""
    start_from: tuple[str, ...] = ()
    """YAML files of options to try first, such as the best.yaml of an earlier sweep"""
    final_seeds: int = 3
    """number of seeds with which the best and the given recipe are finally trained and scored on the test split; 0 =
    skip this"""
    concurrency: int = 0
    """number of trials to run at a time; 0 = as many as fit on the cluster's CPUs (and GPUs, if it has any)"""
    workers_per_trial: int = 1
    """number of data-parallel workers of each trial"""
    cpus_per_trial: int = 1
    """CPU cores of each worker of a trial"""
    gpus_per_trial: float = 1.0
    """GPUs of each worker of a trial, on a cluster that has any; with a fraction, workers share a GPU"""
    grace_epochs: int = 5
    """epochs that every trial runs before ASHA may stop it; with two objectives ASHA is not used"""
    reduction: int = 3
    """reduction factor of ASHA: at each rung the best one in so many trials continues"""
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
        budgeted = self.recipe.architecture == "clcr" and self.recipe.network.model.exchange == "budgeted"
        if len(self.objectives) > 1 and not budgeted:
            raise JobError(f"--objectives participation: {self.recipe.architecture} as given has no token budget")
        space(self.recipe, self.search)

    @property
    def first_points(self) -> list[dict[str, Any]]:
        """Points to try before the sampler draws any: the recipe as given, then those of --start-from."""
        return [defaults(self.recipe, self.search), *(self._point(path) for path in self.start_from)]

    def _point(self, path: str) -> dict[str, Any]:
        other = parse(Recipe, ["--config", path])
        if other.architecture != self.recipe.architecture:
            raise JobError(f"--start-from {path}: has model {other.architecture}, not {self.recipe.architecture}")
        searched, point = space(self.recipe, self.search), defaults(other)
        for name, distribution in searched.items():
            if name not in point:
                raise JobError(f"--start-from {path}: has no {name}, which is searched")
            if not holds(distribution, point[name]):
                raise JobError(f"--start-from {path}: {name} {point[name]} lies outside of what is searched")
        return {name: point[name] for name in searched}
