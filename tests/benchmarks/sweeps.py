"""What a sweep costs compared with its training, and what its sampler is worth.

    python -m tests.benchmarks.sweeps overhead --store STORE --trials 12 --epochs 6
    python -m tests.benchmarks.sweeps regret --store STORE --tasks when --trials 20 --seeds 5

overhead: seconds per one-worker trial beyond the training itself, and trials per hour of the job with two trials at a
time against plain `study.optimize` in one process with the better of one and two threads, on the same points.
regret: best validation score so far, TPE against random search with equal epochs, over seeds.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import optuna
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler

from clcr.config import CLCRConfig, ModelConfig
from clcr.training import OptimConfig
from infra.head import ROOT
from pipelines.training.learner import Learner, Recipe
from tuning.objectives import BY_SCORE
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
        recipe = Recipe(optim=OptimConfig(epochs=self.epochs), network=CLCRConfig(model=ModelConfig(width=self.width)))
        with tempfile.TemporaryDirectory() as folder:
            seconds, points, times = self.job(folder)
        begun, ended = (sorted(moments) for moments in zip(*times, strict=True))
        # With two at a time the third trial takes the place of the one that ended first, and so on.
        gap = mean(next_begins - ends for ends, next_begins in zip(ended, begun[2:], strict=False))
        # Of the first two, which also pay for their processes' imports, only the end counts.
        trial = mean(end - begin for begin, end in sorted(times)[2:])
        rate = 3600 * (len(times) - 2) / (ended[-1] - ended[1])
        alone = {threads: self.plain(recipe, points, threads) / len(points) for threads in (1, 2)}
        threads = min(alone, key=lambda t: alone[t])
        print(f"job, 2 at a time: {len(times)} trials in {seconds:.0f} s with its start, then {rate:.0f} trials/hour")
        plain = 3600 / alone[threads]
        print(f"study.optimize, {threads} threads: {plain:.0f} trials/hour; ratio {rate / plain:.2f}")
        print(
            f"trial of the job {trial:.2f} s, until the next {gap:.2f} s; training alone, one thread {alone[1]:.2f} s"
        )
        print(f"overhead per trial: {trial + gap - alone[1]:.2f} s, with what two at a time cost each other")

    def job(self, folder: str) -> tuple[float, list[dict], list[tuple[float, float]]]:
        """Run the job; its seconds, its points, and when each trial began and ended."""
        job = ["tuning/sweep.py", "--store", self.store, "--out", f"{folder}/sweep", "--model.width", str(self.width)]
        job += ["--trials", str(self.trials), "--epochs", str(self.epochs), "--grace-epochs", str(self.epochs)]
        started = time.perf_counter()
        subprocess.run([sys.executable, *job, "--concurrency", "2", "--final-seeds", "0"], cwd=ROOT, check=True)
        seconds = time.perf_counter() - started
        trials = StudyFile(f"{folder}/sweep").open([BY_SCORE]).trials
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
    tasks: tuple[str, ...] = ()
    """tasks whose mean score is searched for; all of the store's by default"""
    trials: int = 20
    """trials of each search"""
    seeds: int = 5
    """searches with each sampler"""
    epochs: int = 4
    """epochs of each trial: both samplers get as many"""
    width: int = 32
    """width of the model"""
    batch_size: int = 16
    """clips per step"""
    out: Path = Path("regret.png")
    """picture of the curves"""

    def run(self) -> None:
        """Search with both over the seeds; a table and a picture of the distance to the best score that any found."""
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=one_thread) as pool:
            searches = {name: [pool.submit(self.search, name, seed) for seed in range(self.seeds)] for name in SAMPLERS}
            done = (search for runs in searches.values() for search in runs)
            for number, _ in enumerate(as_completed(done), 1):
                print(f"{number} of {len(SAMPLERS) * self.seeds} searches done", flush=True)
            curves = {name: np.array([search.result() for search in runs]) for name, runs in searches.items()}
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        figure.savefig(self.out, dpi=150)
        print(f"written: {self.out}")

    def search(self, name: str, seed: int) -> np.ndarray:
        """Best score so far after each trial of one search."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optim = OptimConfig(epochs=self.epochs, batch_size=self.batch_size)
        recipe = Recipe(tasks=self.tasks, optim=optim, network=CLCRConfig(model=ModelConfig(width=self.width)))
        study = optuna.create_study(direction="maximize", sampler=SAMPLERS[name](seed))
        study.optimize(lambda trial: best_score(self.store, recipe, trial), n_trials=self.trials)
        return np.maximum.accumulate([trial.value for trial in study.trials])


SAMPLERS = {  # each as the job has it
    "TPE": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP),
    "random": lambda seed: RandomSampler(seed=1000 + seed),
}


def one_thread() -> None:
    """As many searches at a time as cores, so one thread each."""
    torch.set_num_threads(1)


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
