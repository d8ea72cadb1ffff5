"""What a running sweep records: each trial in the study, and as a child run in MLflow. Runs in the driver only."""

import time
from collections.abc import Mapping
from typing import Any

import optuna
from ray import PlacementGroupID, tune
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipelines.common.cli import Progress, to_yaml
from pipelines.tracking import run as tracking
from pipelines.training.learner import Recipe
from tuning.objectives import COST, SCORE, shown
from tuning.space import apply
from tuning.study import (
    ENDED,
    REACHED,
    STATUS,
    STOPPED,
    UNSENT,
    StudyFile,
    StudySearch,
    complete,
    draw,
    objectives_of,
    outcome,
    reached,
    rows,
    tell,
)

GROUPS = ("train/", "val/", "diag/", "perf/")  # groups of metrics that are logged
# A trial's status in MLflow: being stopped early is no failure.
STATUSES = {"FINISHED": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}
PLACEMENT = "placement_group"  # key of a result: the placement group that the trial's workers hold
QUIET = 30.0  # seconds between two lines of progress, at most, while trials report epochs
NOTE = "mlflow.note.content"  # the description that MLflow shows above a run


class Record(tune.Callback):
    """Records every epoch and every end. A trial that an earlier start left unfinished resumes its own MLflow run."""

    def __init__(
        self, run: tracking.Run, experiment: str, recipe: Recipe, search: StudySearch, file: StudyFile, trials: int
    ) -> None:
        self.run, self.experiment, self.recipe, self.search, self.file = run, experiment, recipe, search, file
        self.runs: dict[str, tracking.Run] = {}
        self.problem: Exception | None = None  # why a trial's end could not be recorded
        done = rows(search.study)
        self.objectives = objectives_of(search.study)
        self.first = self.objectives[0]  # whose best is told in lines of progress
        self.best: float | None = None
        for row in done:
            self._count(row[self.first.metric])
        self.progress, self.last_line = Progress("sweep", trials, len(done), "trials", interval=0), time.monotonic()
        experiment_id, view = run.experiment_id(), "custom_model_development"
        run.ask(lambda client: client.set_experiment_tag(experiment_id, "mlflow.experimentKind", view))
        tracking.abandon_children(run, {row["run_id"]: STATUSES[row["status"]] for row in done})
        # Empty runs: their driver was killed before it could record which trial they belong to.
        tracking.delete_children(run, "trial", keep={t.user_attrs.get("run_id") for t in search.study.trials})
        for asked in list(search.interrupted):
            if complete(asked, recipe.optim.epochs) or asked.user_attrs.keys() & {"error", STOPPED}:
                search.interrupted.remove(asked)  # only its end was not recorded
                child = self._child(asked, draw(asked, search.space))
                child.log_again(asked.user_attrs.get(UNSENT, []))
                self._end(asked, child)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the trial its MLflow run."""
        if trial.trial_id in self.runs:  # its process died, and Tune starts it again
            release(trial)
            self.runs.pop(trial.trial_id).flush()
        self.runs[trial.trial_id] = self._child(self.search.asked[trial.trial_id], trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log the metrics of one epoch in one call, or the error that ended the trial."""
        asked, run = self.search.asked[trial.trial_id], self.runs[trial.trial_id]
        if "error" in result:
            self._note_last(asked, run, "error", result["error"])
            run.log_text(result["traceback"], "error.txt")
            return
        worth = {name: result[name] for name in (SCORE, COST, *(o.metric for o in self.objectives)) if name in result}
        # The objectives go first: MLflow's parallel coordinates open with the metric that was logged first.
        metrics = worth | {name: value for name, value in result.items() if name.startswith(GROUPS)}
        run.log_metrics(metrics, result["epoch"] - 1)
        if result["epoch"] <= reached(asked).get("epoch", 0):  # recorded before the driver or the trial was killed
            return
        now = {"epoch": result["epoch"], **worth} | ({ENDED: True} if result.get(ENDED) else {})
        if ENDED in now or result["epoch"] == self.recipe.optim.epochs:
            self._note_last(asked, run, REACHED, now)
        else:
            asked.set_user_attr(REACHED, now)
        value = result.get(self.first.metric)
        if len(self.objectives) == 1 and value is not None:
            asked.report(value, result["epoch"])
        self._count(value)
        if time.monotonic() - self.last_line > QUIET:
            self._say(0, f"trial {asked.number} at epoch {result['epoch']} of {self.recipe.optim.epochs}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial that finished, was stopped early, or reported an error."""
        release(trial)
        asked, run = self.search.asked[trial.trial_id], self.runs[trial.trial_id]
        try:
            if not complete(asked, self.recipe.optim.epochs) and "error" not in asked.user_attrs:
                self._note_last(asked, run, STOPPED, True)
            self._end(asked, run)
        except Exception as error:  # Tune would take it for the trial's own, and train it again
            self.problem = error

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """End the sweep where a trial's end could not be recorded; the next start records it."""
        if self.problem:
            raise self.problem

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record as failed a trial whose process died too often."""
        release(trial)
        asked, lines = self.search.asked[trial.trial_id], str(trial.get_error()).strip().splitlines()
        why = next((line for line in lines if "Error" in line), "no reason known")
        self._note_last(asked, self.runs[trial.trial_id], "error", f"its process died: {why}")
        self._end(asked, self.runs[trial.trial_id])

    def _child(self, asked: optuna.Trial, point: Mapping[str, Any]) -> tracking.Run:
        """The trial's run, which an earlier start may have begun.

        Its parameters are only the searched options, for MLflow's charts; the whole recipe is a file.
        """
        if run_id := asked.user_attrs.get("run_id"):
            try:
                return tracking.resume_run(self.run.uri, run_id)
            except tracking.RunGoneError as error:
                print(f"trial {asked.number}: {error}: it has a new one from here on", flush=True)
        name, tags = f"trial-{asked.number:03d}", {"model": self.recipe.architecture, "trial": str(asked.number)}
        run = tracking.start_run(self.run.uri, self.experiment, name, point, tags, self.run.run_id)
        run.log_text(to_yaml(apply(self.recipe, point)), "recipe.yaml")
        asked.set_user_attr("run_id", run.run_id)
        self.file.save()
        return run

    def _note_last(self, asked: optuna.Trial, run: tracking.Run, name: str, value: Any) -> None:
        """Note what ends a trial. It is not run again then, so the study first takes the points MLflow has not."""
        asked.set_user_attr(UNSENT, run.unsent())
        asked.set_user_attr(name, value)
        self.file.save()

    def _end(self, asked: optuna.Trial, run: tracking.Run) -> None:
        """Give MLflow everything but the status before the study is told, so that a kill in between loses nothing."""
        study = self.search.study
        run.flush()
        state = outcome(study, asked, self.recipe.optim.epochs)
        run.set_tag(NOTE, describe(asked, STATUS[state], self.recipe))
        run.set_tag("ended", STATUS[state].lower())
        tell(study, asked, state)
        run.finish(STATUSES[STATUS[state]])
        self.file.save()
        self._say(1, f"trial {asked.number} {STATUS[state].lower()}")

    def _count(self, value: float | None) -> None:
        """Remember the best value of the first objective; a score that is not finite is none."""
        if value is not None:
            self.best = (
                value if self.best is None else self.first.sign * max(self.first.sign * v for v in (value, self.best))
            )

    def _say(self, ended: int, what: str) -> None:
        name = "val score" if self.first.metric == SCORE else self.first.metric.removeprefix("best/")
        best = "" if self.best is None else f", best {name} so far {self.best:.3f}"
        self.last_line = time.monotonic()
        if self.progress.total:
            return self.progress.update(ended, what + best)
        self.progress.done += ended  # only --hours limits the sweep
        left = max(0.0, self.search.deadline - self.last_line)
        print(f"sweep {self.progress.done} trials, {left:.0f} s until the last may start, {what}{best}", flush=True)


def release(trial: Trial) -> None:
    """Return the resources of a trial's workers; Ray Train does not if Tune stops the trial or its process dies."""
    if group := trial.last_result.get(PLACEMENT):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def describe(trial: optuna.Trial, status: str, recipe: Recipe) -> str:
    """The description that MLflow shows for a child run."""
    epochs, error = reached(trial).get("epoch", 0), trial.user_attrs.get("error")
    how = {
        "FINISHED": f"Trained {epochs} of {recipe.optim.epochs} epochs, to its end.",
        "STOPPED": f"Stopped early after {epochs} of {recipe.optim.epochs} epochs.",
        "FAILED": f"Failed after {epochs} epochs: {error}",
    }[status]
    values = [f"| `{name}` | {shown(v)} |" for name, v in reached(trial).items() if name not in ("epoch", ENDED)]
    point = [f"| `{name}` | {shown(v)} |" for name, v in trial.params.items()]
    table = ["| metric | |", "|---|---|", *values, "", "| searched | |", "|---|---|", *point]
    return f"Trial {trial.number}. {how}\n\n" + "\n".join(table)
