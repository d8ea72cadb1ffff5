"""Test accuracy of several models on one corpus, over seeds: extract once, train each, all by `ray job submit`.

    python -m tests.benchmarks.accuracy --corpus corpus.csv --tasks color,digit --out DIR --seeds 3 --epochs 40

Run again with the same options and it goes on from what is finished. Prints the mean over seeds and half the width of
the 95 % t interval, per task.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from infra.head import ROOT, Head, local_head


@dataclass(frozen=True)
class AccuracyConfig:
    """What is compared."""

    corpus: str
    """manifest of the clips"""
    out: Path
    """folder for store, runs and mlflow.db"""
    tasks: str
    """tasks learned together, separated by commas"""
    models: str = "clcr,concat,audio,video"
    """models to train, separated by commas"""
    seeds: int = 3
    """seeds 0, 1, ... of each model"""
    epochs: int = 40
    """epochs of each training"""
    extract: str = ""
    """further options of pipelines/extract.py, in one string"""
    train: str = ""
    """further options of pipelines/train.py, in one string"""


def compare(config: AccuracyConfig) -> int:
    """Extract, train every model with every seed, two trainings at a time on one CPU each; print the table."""
    out = config.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with local_head() as head:
        corpus = os.path.abspath(config.corpus)
        options = ["--corpus", corpus, "--store", str(out / "store"), *config.extract.split()]
        if submit(head, out / "logs" / "extract.log", "pipelines/extract.py", *options):
            return 1
        runs = [(model, seed) for seed in range(config.seeds) for model in config.models.split(",")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(lambda run: train(head, config, out, *run), runs))
    if any(codes):
        return 1
    print_table(config, out)
    return 0


def train(head: Head, config: AccuracyConfig, out: Path, model: str, seed: int) -> int:
    """One training as a job; its exit code."""
    name = f"{model}-{seed}"
    options = ["--store", str(out / "store"), "--model", model, "--tasks", config.tasks, "--out", str(out / name)]
    options += ["--seed", str(seed), "--epochs", str(config.epochs), "--cpus-per-worker", "1", *config.train.split()]
    return submit(head, out / "logs" / f"{name}.log", "pipelines/train.py", *options)


def submit(head: Head, log: Path, *job: str) -> int:
    """Run one job, its output in a file; its exit code."""
    command = head.submit_command("python", *job)
    with open(log, "w") as file:
        code = subprocess.run(command, cwd=ROOT, env=dict(head.env), stdout=file, stderr=file).returncode
    print(f"{log.stem}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
    return code


def print_table(config: AccuracyConfig, out: Path) -> None:
    """Models by task; the last column is the mean over the tasks."""
    tasks = config.tasks.split(",")
    table = Table("test accuracy", *tasks, "mean", title=f"{config.seeds} seeds, {config.epochs} epochs")
    for model in config.models.split(","):
        files = [out / f"{model}-{seed}" / "metrics.json" for seed in range(config.seeds)]
        runs = [json.loads(file.read_text()) for file in files]
        scores = np.array([[run[task]["accuracy"] for task in tasks] for run in runs])
        scores = np.concatenate([scores, scores.mean(1, keepdims=True)], axis=1)
        table.add_row(model, *(interval(column) for column in scores.T))
    Console(width=160).print(table)


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of the 95 % t interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


if __name__ == "__main__":
    sys.exit(compare(tyro.cli(AccuracyConfig, description=__doc__)))
