"""The study of a sweep: Optuna's record of every trial, on disk as it happens, and how Ray Tune asks it for points.

A sweep that was killed finds in it what has ended, what was under way and what ASHA has seen. Tune's own OptunaSearch
pickles its state now and then, so that what ended since would be run again; here the study alone is the truth.
`optuna-dashboard OUT/study.journal` opens it.
"""

import contextlib
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from features.files import open_fs, write_atomic
from pipelines.common.compat import suggest

# MLflow's comparison opens with the metric whose name comes first: what a trial, its best checkpoint, is worth.
SCORE = "best/score"  # on the validation split
COST = "best/tokens_exchanged"  # share of tokens that this model exchanges, mean over levels and modalities
OBJECTIVES = {"score": (SCORE, "maximize"), "participation": (COST, "minimize")}
REACHED = "reached"  # a trial's last epoch and what it was worth then
ENDED = "ended"  # in it, and in a result: the training is over, by its epochs or by --patience

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "STOPPED", TrialState.FAIL: "FAILED"}
NAME = "study.journal"
LOCK_SECONDS = 2.0  # nobody who is alive holds a journal's lock for so long: it is for writing one line


class StudyFile:
    """The journal of a sweep's folder. In an object store, which cannot append, `save` puts a whole copy there."""

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

    def open(self, objectives: tuple[str, ...], seed: int, startup: int) -> optuna.Study:
        """The study in it, or a new one. The sampler never draws again what it drew before a restart."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name="sweep",
                storage=JournalStorage(JournalFileBackend(str(self.path))),
                directions=[OBJECTIVES[name][1] for name in objectives],
                load_if_exists=True,
            )
            study.sampler = optuna.samplers.TPESampler(
                seed=seed + len(study.trials), multivariate=True, constant_liar=True, n_startup_trials=startup
            )
        return study

    def save(self) -> None:
        """Nothing to do on a filesystem: every event is in the file, and synced, when Optuna returns."""
        if self._remote:
            write_atomic(*self._remote, self.path.read_bytes())

    def _break_lock(self) -> None:
        """A driver that was killed while it wrote leaves its lock, for which Optuna would wait half a minute."""
        lock = f"{self.path}.lock"
        with contextlib.suppress(FileNotFoundError):
            held = os.lstat(lock).st_mtime_ns
            time.sleep(LOCK_SECONDS)
            if os.lstat(lock).st_mtime_ns == held:
                os.unlink(lock)

    def _cut_torn_line(self) -> None:
        """A host that died in the middle of a line would make all that comes after it unreadable."""
        if self.path.exists() and not (written := self.path.read_bytes()).endswith(b"\n"):
            with open(self.path, "r+b") as f:
                f.truncate(written.rfind(b"\n") + 1)


class StudySearch(Searcher):
    """What Ray Tune asks for the next point: interrupted trials first, then the sampler, until the budget is spent.

    trials: how many the study shall hold, 0 = no limit; hours: from now on, 0 = no limit; a trial that runs may end.
    """

    def __init__(self, study: optuna.Study, space: Mapping[str, BaseDistribution], trials: int, hours: float) -> None:
        super().__init__()
        self.study, self.space = study, dict(space)
        self.limit, self.deadline = trials or math.inf, time.monotonic() + 3600 * (hours or math.inf)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self.interrupted = [Trial(study, trial._trial_id) for trial in running]  # of an earlier start
        self.asked: dict[str, Trial] = {}  # by Tune's id

    @property
    def over(self) -> bool:
        """Nothing is left to run."""
        states = (TrialState.RUNNING, *STATUS)
        begun = len(self.study.get_trials(deepcopy=False, states=states))
        return not self.interrupted and (begun >= self.limit or time.monotonic() > self.deadline)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next point to try."""
        if self.over:
            return Searcher.FINISHED
        trial = self.interrupted.pop(0) if self.interrupted else self.study.ask(self.space)
        self.asked[trial_id] = trial
        # A driver that was killed while it asked left a trial with some of its parameters: they stay, others are drawn.
        return {name: suggest(trial, name, distribution) for name, distribution in self.space.items()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The record (a callback) tells the study: it also hears of the last result of a trial that ASHA stops."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str) -> None:
        """The study is on disk already."""


def reached(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """The last epoch that a trial showed, and SCORE (and COST) at that time; empty before the first."""
    return trial.user_attrs.get(REACHED, {})


def complete(trial: FrozenTrial | Trial, epochs: int) -> bool:
    """Whether a trial's training came to its own end: after `epochs`, or where its patience ended."""
    return reached(trial).get("epoch") == epochs or reached(trial).get(ENDED, False)


def objectives_of(study: optuna.Study) -> list[str]:
    """The metrics that a study optimises."""
    return [metric for metric, _ in list(OBJECTIVES.values())[: len(study.directions)]]


def outcome(study: optuna.Study, trial: Trial, epochs: int) -> TrialState:
    """How a trial ends that will show no more: FAIL with an error (or never a finite score), PRUNED before its end."""
    values = [reached(trial).get(metric, math.nan) for metric in objectives_of(study)]
    if "error" not in trial.user_attrs and not all(map(math.isfinite, values)):
        trial.set_user_attr("error", "no epoch had a finite validation score")
    if "error" in trial.user_attrs:
        return TrialState.FAIL
    return TrialState.COMPLETE if complete(trial, epochs) else TrialState.PRUNED


def tell(study: optuna.Study, trial: Trial, state: TrialState) -> None:
    """Write down that a trial ended: from here on it is never run again."""
    values = [reached(trial)[metric] for metric in objectives_of(study)] if state == TrialState.COMPLETE else None
    study.tell(trial, values, state, skip_if_finished=True)


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """The trials that ended, by number, as a table holds them."""
    return [
        {
            "trial": trial.number,
            "run_id": trial.user_attrs.get("run_id"),
            "status": STATUS[trial.state],
            "epochs": reached(trial).get("epoch", 0),
            "error": trial.user_attrs.get("error"),
            **{metric: reached(trial).get(metric) for metric in objectives_of(study)},
            **trial.params,
        }
        for trial in study.get_trials(deepcopy=False, states=tuple(STATUS))
    ]


def ranked(trials: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of such rows those that did not fail, best first: what finished, then what ASHA stopped."""
    scored = [trial for trial in trials if trial["status"] != "FAILED"]
    return sorted(scored, key=lambda trial: (trial["status"] != "FINISHED", -trial[SCORE]))


def replay(scheduler: TrialScheduler, trials: Iterable[FrozenTrial]) -> None:
    """Let a new ASHA scheduler see what trials of an earlier start showed, as if it had been there."""
    for trial in trials:
        ghost = SimpleNamespace(trial_id=f"before-{trial.number}")
        scheduler.on_trial_add(None, ghost)
        for epoch, score in sorted(trial.intermediate_values.items()):
            scheduler.on_trial_result(None, ghost, {"epoch": epoch, SCORE: score})
