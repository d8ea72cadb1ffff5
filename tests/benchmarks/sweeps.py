"""What a sweep costs beside its training, and what its sampler is worth.

    python -m tests.benchmarks.sweeps overhead --store STORE --trials 12 --epochs 6
    python -m tests.benchmarks.sweeps regret --store STORE --trials 20 --seeds 5

overhead: seconds per one-worker trial beyond the training itself, and trials per hour of the job with two trials at a
time against plain `study.optimize` in one process with the better of one and two threads, on the same points.
regret: best validation score so far, TPE against random search with equal epochs, over seeds.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import torch
import tyro
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from clcr.config import ModelConfig
from clcr.training import OptimConfig
from infra.head import ROOT
from pipelines.learner import Learner, Recipe
from tuning.space import apply, space
from tuning.study import StudyFile
from tuning.sweep import SEARCHED

STARTUP = 10  # random points before TPE's


@dataclass(frozen=True)
class Overhead:
    """The job against plain Optuna: same points, all epochs, no early stop."""

    store: str
    """feature store"""
    trials: int = 12
    """trials of each"""
    epochs: int = 6
    """epochs of each trial"""
    width: int = 32
    """width of the model"""

    def run(self) -> None:
        """Measure both and print them."""
        recipe = small(self.epochs, self.width)
        with tempfile.TemporaryDirectory() as folder:
            seconds, points, trained = self.job(folder)
        count = len(trained)
        # The first two trials also pay for Ray's start and their processes' imports.
        later = sorted(trained, key=lambda times: times[0])[2:]
        alone = {threads: self.plain(recipe, points, threads) for threads in (1, 2)}
        threads = min(alone, key=lambda t: alone[t])
        busy = sum(ended - begun for begun, ended in later)
        span = max(ended for _, ended in later) - min(begun for begun, _ in later)
        gaps = 2 * span - busy  # two slots, minus the time that trials ran in them
        print(
            f"job, 2 at a time: {count} trials in {seconds:.0f} s, {3600 * count / seconds:.0f} trials/hour with start"
        )
        print(f"  after the first two: {3600 * len(later) / span:.0f} trials/hour")
        print(f"  between trials: {gaps / len(later):.2f} s each; trial {busy / len(later):.2f} s")
        print(f"study.optimize, {threads} threads: {3600 * count / alone[threads]:.0f} trials/hour")
        print(f"  training alone on one thread: {alone[1] / count:.2f} s per trial")
        print(f"overhead per trial: {2 * span / len(later) - alone[1] / count:.2f} s (with what two at a time cost)")

    def job(self, folder: str) -> tuple[float, list[dict], list[tuple[float, float]]]:
        """Run the job; its seconds, its points, and when each trial began and ended."""
        job = ["tuning/sweep.py", "--store", self.store, "--out", f"{folder}/sweep", "--model.width", str(self.width)]
        job += ["--trials", str(self.trials), "--epochs", str(self.epochs), "--grace-epochs", str(self.epochs)]
        started = time.perf_counter()
        subprocess.run([sys.executable, *job, "--concurrency", "2", "--final-seeds", "0"], cwd=ROOT, check=True)
        seconds = time.perf_counter() - started
        trials = StudyFile(f"{folder}/sweep").open(("score",), 0, STARTUP).trials
        times = [(t.datetime_start.timestamp(), t.datetime_complete.timestamp()) for t in trials]
        return seconds, [trial.params for trial in trials], times

    def plain(self, recipe: Recipe, points: list[dict], threads: int) -> float:
        """Seconds of `study.optimize` over the same points in this process."""
        torch.set_num_threads(threads)
        study = optuna.create_study(direction="maximize")
        for point in points:
            study.enqueue_trial(point)
        started = time.perf_counter()
        study.optimize(lambda trial: best_score(self.store, recipe, trial), n_trials=len(points))
        return time.perf_counter() - started


@dataclass(frozen=True)
class Regret:
    """TPE against random search."""

    store: str
    """feature store"""
    trials: int = 20
    """trials of each search"""
    seeds: int = 5
    """searches with each sampler"""
    epochs: int = 4
    """epochs of each trial: both samplers get as many"""
    width: int = 16
    """width of the model"""
    out: Path = Path("regret.png")
    """picture of the curves"""

    def run(self) -> None:
        """Search with both over the seeds; a table and a picture of the distance to the best score that any found."""
        recipe = small(self.epochs, self.width)
        curves = {
            name: np.array([self.curve(recipe, sampler) for sampler in samplers])
            for name, samplers in self.samplers().items()
        }
        best = max(curve.max() for curve in curves.values())
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, runs in curves.items():
            regret = best - runs
            half = 1.96 * regret.std(axis=0, ddof=1) / np.sqrt(len(regret)) if len(regret) > 1 else 0
            number = np.arange(1, regret.shape[1] + 1)
            axes.plot(number, regret.mean(axis=0), label=name)
            axes.fill_between(number, regret.mean(axis=0) - half, regret.mean(axis=0) + half, alpha=0.2)
            marks = [f"{regret[:, n - 1].mean():.3f} after {n}" for n in (5, 10, 20, 40) if n <= regret.shape[1]]
            print(f"{name}: regret {', '.join(marks)} trials, {len(regret)} seeds")
        axes.set(
            xlabel="trials", ylabel="best score of any search - best so far", title="Regret on the validation split"
        )
        axes.legend()
        figure.savefig(self.out, dpi=150)
        print(f"written: {self.out}")

    def samplers(self) -> dict[str, Iterator[BaseSampler]]:
        """Each as the job has it, one per seed."""
        return {
            "TPE": (TPESampler(seed=s, multivariate=True, n_startup_trials=STARTUP) for s in range(self.seeds)),
            "random": (RandomSampler(seed=1000 + s) for s in range(self.seeds)),
        }

    def curve(self, recipe: Recipe, sampler: BaseSampler) -> np.ndarray:
        """Best score so far after each trial."""
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(lambda trial: best_score(self.store, recipe, trial), n_trials=self.trials)
        return np.maximum.accumulate([trial.value for trial in study.trials])


def small(epochs: int, width: int) -> Recipe:
    """The recipe of the trials."""
    return Recipe(optim=OptimConfig(epochs=epochs), model=ModelConfig(width=width))


def best_score(store: str, recipe: Recipe, trial: optuna.Trial) -> float:
    """Train at one point in this process."""
    point = {name: suggest(trial, name, distribution) for name, distribution in space(recipe).items()}
    learner = Learner(store, apply(recipe, point), splits=SEARCHED)
    for _ in learner.fit():
        pass
    return learner.trainer.best_score


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """A value by Optuna's define-by-run interface."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    draw = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return draw(name, distribution.low, distribution.high, log=distribution.log)


Benchmark = Annotated[Overhead, tyro.conf.subcommand("overhead")] | Annotated[Regret, tyro.conf.subcommand("regret")]

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tyro.cli(Benchmark, description=__doc__).run()
