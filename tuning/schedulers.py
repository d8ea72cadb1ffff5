"""Who stops weak trials early (Ray Tune's schedulers): after a kill, each decides as if there had been none."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from optuna.trial import FrozenTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from pipelines.common.errors import JobError
from tuning.objectives import Objective
from tuning.samplers import SamplerName

SchedulerName = Literal["auto", "asha", "hyperband", "median", "none"]
GOLDEN_RATIO = 0.618033988749895
BEFORE = "before-"  # a trial of an earlier start, by its number
NEVER = float("inf")
NUMBERS = Callable[[str], int]  # the study's number of a trial, by Tune's id


class HyperBand(ASHAScheduler):
    """Tune's asynchronous HyperBand: brackets of ASHA with longer and longer grace.

    A trial's bracket follows from its number in the study, as after a restart it must; Tune draws it at random.
    """

    def __init__(self, number_of: NUMBERS, **options: Any) -> None:
        super().__init__(**options)
        self._number_of = number_of

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Give the trial its bracket: those with more rungs get more trials, as Tune shares them out."""
        sizes = [2.718281828 ** len(bracket._rungs) for bracket in self._brackets]
        place = (self._number_of(trial.trial_id) * GOLDEN_RATIO) % 1 * sum(sizes)
        for bracket, size in zip(self._brackets, sizes, strict=True):
            self._trial_info[trial.trial_id] = bracket
            if (place := place - size) < 0:
                return


class Median(MedianStoppingRule):
    """Tune's median rule: stops a trial whose best is worse than the median of the others' means by then."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        """The last result is known already, and that of a failed trial has no epoch, which Tune's own asks for."""


class Earlier:
    """A trial of an earlier start, as a scheduler sees it: it reads nothing but the id."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{BEFORE}{number}"


def scheduler(
    name: SchedulerName,
    objectives: list[Objective],
    epochs: int,
    grace: int,
    reduction: int,
    trials: Iterable[FrozenTrial],
    number_of: NUMBERS,
) -> TrialScheduler:
    """A scheduler that has seen `trials`, those of earlier starts. `name` is none of auto."""
    (objective, *_), grace = objectives, min(grace, epochs)
    seen: dict[str, Any] = {
        "time_attr": "epoch",
        "metric": objective.metric,
        "mode": objective.direction[:3],
        "grace_period": grace,
    }
    made: TrialScheduler
    if name == "none":
        return FIFOScheduler()
    if name == "median":  # a trial that waited would begin anew: none ever waits
        made = Median(**seen, min_time_slice=NEVER)  # type: ignore[arg-type]  # seen: of several types
    elif name == "hyperband":
        brackets = next(s for s in range(1, epochs + 2) if grace * reduction**s > epochs)
        made = HyperBand(
            lambda trial: int(trial.removeprefix(BEFORE)) if trial.startswith(BEFORE) else number_of(trial),
            **seen,
            max_t=epochs,
            reduction_factor=reduction,
            brackets=brackets,
        )
    else:
        made = ASHAScheduler(**seen, max_t=epochs, reduction_factor=reduction)
    replay(made, trials, objective.metric)
    return made


def chosen(name: SchedulerName, sampler: SamplerName, objectives: list[Objective]) -> SchedulerName:
    """The scheduler that `auto` stands for. Raises JobError for one that cannot judge several objectives.

    With several none: a trial that is weak in one may be the best in another. With gp and nsga2 none either: trials
    that were stopped teach them nothing.
    """
    if name == "auto":
        return "none" if len(objectives) > 1 or sampler in ("gp", "nsga2") else "asha"
    if name != "none" and len(objectives) > 1:
        raise JobError(
            f"--scheduler {name}: stops trials by one objective, --objectives names {len(objectives)}; take none"
        )
    return name


def replay(scheduler: TrialScheduler, trials: Iterable[FrozenTrial], metric: str) -> None:
    """Show a new scheduler the results of an earlier start's trials, so that it decides as the old one would."""
    no_controller: Any = None  # none of them asks anything of it
    for trial in trials:
        earlier: Any = Earlier(trial.number)
        scheduler.on_trial_add(no_controller, earlier)
        for epoch, value in sorted(trial.intermediate_values.items()):
            scheduler.on_trial_result(no_controller, earlier, {"epoch": epoch, metric: value})
