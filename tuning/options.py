"""The options of the sweep job, and the first points to try, which follow from them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import tyro

from pipelines.common.cli import parse, require_at_least
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.objectives import COST, Objective, read_objectives
from tuning.samplers import LEARNING, SamplerName, count_points, require_able
from tuning.schedulers import SchedulerName, chosen
from tuning.space import OWN, Space, space, values_of
from tuning.space_file import read_space


@dataclass(frozen=True)
class SweepConfig:
    """Options of the sweep job."""

    store: str
    """feature store, or a YAML file of several and their weights; path or URI"""
    out: str
    """folder of this sweep; path or URI"""
    trials: int = 20
    """number of configurations to try, the first being the recipe as given; 0 = as many as --hours allows"""
    hours: float = 0.0
    """hours after the start of the job within which trials may start; 0 = no limit"""
    objectives: tuple[str, ...] = ("score",)
    """what to optimise: score (maximise the validation score), participation (minimise the share of exchanged tokens),
    or any metric that a trial logs with its direction, such as diag/participation/audio:min or perf/epoch_s:min, at the
    epoch whose weights are kept. Several give a Pareto front; the first one chooses best.yaml"""
    space: str = ""
    """YAML file of the options to search, with ranges, choices and conditions (tuning/README.md shows one); none named
    = the ranges that the model has by itself"""
    sampler: SamplerName = "tpe"
    """what proposes the next point: tpe, gp (Gaussian process), cmaes, nsga2 (for several objectives), random, or grid
    (every combination of choices and steps once)"""
    scheduler: SchedulerName = "auto"
    """what stops weak trials early: asha, hyperband, median (worse than the median of the others), or none; auto = asha
    for one objective, and none for several and for gp and nsga2, which stopped trials teach nothing"""
    dry_run: bool = False
    """print what would be searched and the first five points, and end"""
    search: tuple[str, ...] = ()
    """options or groups of options to search (budget, loss.pr, lr); none named = all that the model has"""
    start_from: tuple[str, ...] = ()
    """YAML files of options to try first, such as the best.yaml of an earlier sweep"""
    warm_start: tuple[str, ...] = ()
    """folders of other sweeps, whose finished trials teach the sampler from the beginning; path or URI"""
    final_seeds: int = 3
    """number of new seeds with which the best and the given recipe are finally trained and scored on the test split;
    0 = skip this"""
    concurrency: int = 0
    """number of trials to run at a time; 0 = as many as fit on the cluster's CPUs (and GPUs, if it has any)"""
    workers_per_trial: int = 1
    """number of data-parallel workers of each trial"""
    cpus_per_trial: int = 1
    """CPU cores of each worker of a trial"""
    gpus_per_trial: float = 1.0
    """GPUs of each worker of a trial, on a cluster that has any; with a fraction, workers share a GPU"""
    grace_epochs: int = 5
    """epochs that every trial runs before the scheduler may stop it"""
    reduction: int = 3
    """reduction factor of asha and hyperband: at each rung the best one in so many trials continues"""
    experiment: str = "clcr"
    """MLflow experiment"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        least = {"trials": 0, "hours": 0, "final_seeds": 0, "concurrency": 0, "workers_per_trial": 1}
        least |= {"cpus_per_trial": 1, "gpus_per_trial": 0, "grace_epochs": 1, "reduction": 2}
        require_at_least(self, least)
        if not self.trials and not self.hours:
            raise JobError("--trials 0: must be 1 or more, or give --hours")
        if self.space and self.search:
            raise JobError(f"--search {','.join(self.search)}: --space {self.space} names what is searched")
        searched, objectives = self.searched, self.wanted
        budgeted = self.recipe.architecture == "clcr" and self.recipe.network.model.exchange == "budgeted"
        if (
            COST in {o.metric for o in objectives}
            and not budgeted
            and not searched.keys() & {"model", "model.exchange"}
        ):
            raise JobError(f"--objectives participation: {self.recipe.architecture} as given has no token budget")
        self._require_read(searched)
        require_able(self.sampler, searched, objectives)
        if self.warm_start and self.sampler not in LEARNING:
            raise JobError(f"--warm-start: --sampler {self.sampler} learns nothing of it; take {' or '.join(LEARNING)}")
        chosen(self.scheduler, self.sampler, objectives)

    def _require_read(self, searched: Space) -> None:
        """Raise JobError for an option of --space that the model does not read: every trial would be the same."""
        model = self.recipe.architecture
        for name in searched if self.space and "model" not in searched else ():
            group = name.partition(".")[0]
            if (group in OWN and group != model) or (group == "budget" and model != "clcr"):
                raise JobError(f"--space {self.space}: {name}: {model} does not read it")

    @cached_property
    def searched(self) -> Space:
        """What is searched: the file of --space, or what the model has by itself."""
        return read_space(self.space) if self.space else Space(space(self.recipe, self.search))

    @cached_property
    def wanted(self) -> list[Objective]:
        """What is optimised."""
        return read_objectives(self.objectives)

    @property
    def limit(self) -> int:
        """How many trials there are at most; 0 = no limit but --hours. A grid has no more than its points."""
        if self.sampler != "grid":
            return self.trials
        points = count_points(self.searched)
        return min(self.trials or points, points)

    @property
    def first_points(self) -> list[dict[str, Any]]:
        """Points to try before the sampler draws any: the recipe as given, then those of --start-from.

        A recipe that lies outside of a space that the user wrote is not tried.
        """
        point, outside = self.searched.inside(values_of(self.recipe))
        return [*([] if outside else [point]), *(self._point(path) for path in self.start_from)]

    @property
    def left_out(self) -> str:
        """The option by which the recipe as given lies outside of what is searched; "" where it does not."""
        return self.searched.inside(values_of(self.recipe))[1]

    def _point(self, path: str) -> dict[str, Any]:
        other = parse(Recipe, ["--config", path])
        if other.architecture != self.recipe.architecture and "model" not in self.searched:
            raise JobError(f"--start-from {path}: has model {other.architecture}, not {self.recipe.architecture}")
        values = values_of(other)
        point, outside = self.searched.inside(values)
        if outside and outside not in values:
            raise JobError(f"--start-from {path}: has no {outside}, which is searched")
        if outside:
            raise JobError(f"--start-from {path}: {outside} {values[outside]} lies outside of what is searched")
        return point
