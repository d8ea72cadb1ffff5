"""The study of a sweep: Optuna's record of every trial, kept on disk, and how Ray Tune asks for the next point.

A sweep that was killed reads from it which trials have ended, which were running, and what ASHA has seen. Tune's own
OptunaSearch pickles its state only now and then, and would rerun what ended since; here the study is the only record.
`optuna-dashboard OUT/study.journal` opens it.

What this file takes from Optuna beyond its documented interface stands in `reopen` and `StudyFile._break_lock`;
tests/tuning/test_study.py fails when a new version of Optuna changes it.
"""

import contextlib
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from clcr.versions import renamed
from features.files import open_fs, write_atomic
from tuning.objectives import BY_SCORE, KNOWN, SCORE, Objective
from tuning.space import Space

REACHED = "reached"  # user attribute of a trial: the last epoch that it reported, and its metrics at that time
ENDED = "ended"  # in REACHED and in a result: the training ended by itself, after all epochs or by --patience
STOPPED = "stopped"  # user attribute of a trial that the scheduler stopped: it is not run again
UNSENT = "unsent"  # user attribute of a trial whose training ended: points that MLflow had not confirmed by then
FROM = "from"  # user attribute of a trial that another study lent: where it comes from

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "STOPPED", TrialState.FAIL: "FAILED"}
NAME = "study.journal"
LOCK_SECONDS = 2.0  # no living process holds a journal's lock for so long: it is taken to write one line


class StudyFile:
    """The journal in a sweep's folder. An object store cannot append: there `save` uploads a whole copy."""

    def __init__(self, out: str) -> None:
        fs, folder = open_fs(out)
        self._remote = None if fs.type_name == "local" else (fs, f"{folder}/{NAME}")
        self.path = Path(folder if self._remote is None else tempfile.mkdtemp(prefix="study-")) / NAME
        if self._remote:
            try:
                with fs.open_input_file(f"{folder}/{NAME}") as f:
                    self.path.write_bytes(f.read())
            except FileNotFoundError:
                pass
        self._break_lock()
        self._cut_torn_line()

    def open(self, objectives: Sequence[Objective]) -> optuna.Study:
        """The study in the journal, or a new one, with Optuna's default sampler."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name="sweep",
                storage=JournalStorage(JournalFileBackend(str(self.path))),
                directions=[objective.direction for objective in objectives],
                load_if_exists=True,
            )
            if study.metric_names is None:
                study.set_metric_names([objective.metric for objective in objectives])
        return study

    def save(self) -> None:
        """Upload the journal to an object store. A local file needs nothing: Optuna syncs every event."""
        if self._remote:
            write_atomic(*self._remote, self.path.read_bytes())

    def _break_lock(self) -> None:
        """Remove the lock of a driver that was killed while it wrote: Optuna would wait half a minute for it."""
        lock = f"{self.path}.lock"
        with contextlib.suppress(FileNotFoundError):
            locked_at = os.lstat(lock).st_mtime_ns
            time.sleep(LOCK_SECONDS)
            if os.lstat(lock).st_mtime_ns == locked_at:
                os.unlink(lock)

    def _cut_torn_line(self) -> None:
        """Drop an unfinished last line, which a host that died left: nothing after it could be read."""
        if not self.path.exists():
            return
        written = self.path.read_bytes()
        if not written.endswith(b"\n"):
            with open(self.path, "r+b") as f:
                f.truncate(written.rfind(b"\n") + 1)


class StudySearch(Searcher):
    """What Ray Tune asks for the next point: interrupted trials first, then the sampler, until the budget is spent.

    trials: how many the study shall hold, 0 = no limit. hours: from now on, 0 = no limit; running trials may finish.
    """

    def __init__(self, study: optuna.Study, space: Space, trials: int, hours: float) -> None:
        super().__init__()
        self.study, self.space = study, space
        self.limit, self.deadline = trials or math.inf, time.monotonic() + 3600 * (hours or math.inf)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self.interrupted = [reopen(study, trial) for trial in running]  # of an earlier start
        self.asked: dict[str, Trial] = {}  # by Tune's id

    @property
    def over(self) -> bool:
        """Whether no further trial may start."""
        if self.interrupted:
            return False
        started = len(own_trials(self.study, TrialState.RUNNING, *STATUS))
        return started >= self.limit or time.monotonic() > self.deadline

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray's hint lacks FINISHED
        """The next point to try."""
        if self.over:
            return Searcher.FINISHED
        at_once: Any = None if self.space.when else self.space  # conditions are known as values are drawn
        trial = self.interrupted.pop(0) if self.interrupted else self.study.ask(at_once)
        self.asked[trial_id] = trial
        return draw(trial, self.space)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: Record (a callback) tells the study, as it also sees the last result of a trial that ASHA stops."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the study is on disk already."""


def reopen(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """A running trial of an earlier start, ready to be reported to again. Optuna has no public way to do this."""
    return Trial(study, trial._trial_id)


def draw(trial: Trial, space: Space) -> dict[str, Any]:
    """A trial's point: options whose condition does not hold are left out.

    A driver that was killed while it asked left a trial with some parameters: these stay, the others are drawn.
    """
    point: dict[str, Any] = {}
    for name, distribution in space.items():
        if space.active(name, point):
            point[name] = suggest_value(trial, name, distribution)
    return point


def own_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """A study's trials in these states, by number, without those that another study lent; no state named = all."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return [trial for trial in trials if FROM not in trial.user_attrs]


def front(study: optuna.Study) -> set[int]:
    """Numbers of the finished trials of this study that no other of them beats in everything."""
    own = own_trials(study, TrialState.COMPLETE)
    return {own[trial.number].number for trial in finished(study).best_trials}


def finished(study: optuna.Study) -> optuna.Study:
    """A copy in memory of the finished trials of this study, without lent ones."""
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(own_trials(study, TrialState.COMPLETE))
    return copy


def suggest_value(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value of one option: what was drawn before, or else a value drawn now."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution), distribution
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def reached(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """The last epoch that a trial reported, and the objectives at that time; empty before the first."""
    return trial.user_attrs.get(REACHED, {})


def complete(trial: FrozenTrial | Trial, epochs: int) -> bool:
    """Whether a trial's training ended by itself: after `epochs`, or when its patience ran out."""
    return reached(trial).get("epoch") == epochs or reached(trial).get(ENDED, False)


def objectives_of(study: optuna.Study) -> list[Objective]:
    """What a study optimises. Studies of before they said so optimise the score, or that and the participation."""
    if study.metric_names is None:
        return [BY_SCORE, KNOWN["participation"]][: len(study.directions)]
    directions = [direction.name.lower() for direction in study.directions]
    pairs = zip(study.metric_names, directions, strict=True)
    return [Objective(*pair) for pair in pairs]  # type: ignore[arg-type]  # Optuna has these two words alone


def outcome(study: optuna.Study, trial: Trial, epochs: int) -> TrialState:
    """The final state of a trial: FAIL after an error or without a finite score, PRUNED if it was stopped early."""
    metrics = [objective.metric for objective in objectives_of(study)]
    missing = [metric for metric in metrics if not math.isfinite(reached(trial).get(metric, math.nan))]
    if "error" not in trial.user_attrs and missing:
        what = "validation score" if SCORE in missing else missing[0]
        trial.set_user_attr("error", f"no epoch had a finite {what}")
    if "error" in trial.user_attrs:
        return TrialState.FAIL
    return TrialState.COMPLETE if complete(trial, epochs) else TrialState.PRUNED


def tell(study: optuna.Study, trial: Trial, state: TrialState) -> None:
    """Record that a trial ended; it is never run again."""
    complete = state == TrialState.COMPLETE
    values = [reached(trial)[objective.metric] for objective in objectives_of(study)] if complete else None
    study.tell(trial, values, state, skip_if_finished=True)


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """The trials that ended, in the order of their numbers, as rows of a table."""
    measured = [objective.metric for objective in objectives_of(study)]
    return [
        {
            "trial": trial.number,
            "run_id": trial.user_attrs.get("run_id"),
            "status": STATUS[trial.state],
            "epochs": reached(trial).get("epoch", 0),
            "error": trial.user_attrs.get("error"),
            **{metric: reached(trial).get(metric) for metric in dict.fromkeys([SCORE, *measured])},
            **renamed(trial.params),
        }
        for trial in own_trials(study, *STATUS)
    ]


def ranked(trials: Iterable[Mapping[str, Any]], by: Objective = BY_SCORE) -> list[Mapping[str, Any]]:
    """Those of `rows` that did not fail, best first: those that finished, then those that were stopped early."""
    scored = [trial for trial in trials if trial["status"] != "FAILED"]
    return sorted(scored, key=lambda trial: (trial["status"] != "FINISHED", -by.sign * trial[by.metric]))
