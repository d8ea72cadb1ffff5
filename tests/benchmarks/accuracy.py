"""Test accuracy of several models on one corpus, over seeds: extract once, then train all side by side.

    python -m tests.benchmarks.accuracy --corpus corpus.csv --tasks color,digit --out DIR --seeds 3 --epochs 40

Runs the jobs as a user would. Run it again with the same options to resume. Ends with the table
of `tuning/ablate.py`, where the full model is called `full`: mean over seeds, 95 % interval, paired tests.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from infra.head import ROOT


@dataclass(frozen=True)
class AccuracyConfig:
    """What is compared."""

    corpus: str
    """manifest of the clips"""
    out: Path
    """folder for store, runs and mlflow.db"""
    tasks: str
    """tasks learned together, separated by commas"""
    models: str = "concat,audio,video"
    """models to train alongside clcr, separated by commas"""
    seeds: int = 3
    """seeds 0, 1, ... of each model"""
    epochs: int = 40
    """epochs of each training"""
    extract: str = ""
    """further options of pipelines/extract.py, in one string"""
    train: str = ""
    """further options of tuning/ablate.py, in one string"""


def compare(config: AccuracyConfig) -> int:
    """Extract, train every model with every seed; the exit code."""
    store, out = str(config.out.resolve() / "store"), str(config.out.resolve() / "runs")
    corpus = str(Path(config.corpus).resolve())
    options = [*("--variants", "full", "--alongside", config.models), *config.train.split()]
    trained = ["--tasks", config.tasks, "--seeds", str(config.seeds), "--epochs", str(config.epochs), *options]
    return job("pipelines/extract.py", "--corpus", corpus, "--store", store, *config.extract.split()) or job(
        "tuning/ablate.py", "--store", store, "--out", out, *trained
    )


def job(script: str, *options: str) -> int:
    """One of the project's jobs, as a user runs it; its exit code."""
    return subprocess.run([sys.executable, script, *options], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(compare(tyro.cli(AccuracyConfig, description=__doc__)))
