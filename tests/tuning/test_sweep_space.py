"""Sweeps of a space with conditions, by other samplers and schedulers, through the whole job on a real Ray."""

import pyarrow.parquet as pq
import pytest
from inprocess import run_here

from tuning.options import SweepConfig
from tuning.sweep import sweep

pytestmark = pytest.mark.slow
SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "16", "--final-seeds", "0", "--tasks", "label"]
SMALL += ["--concurrency", "1"]  # one process for all trials: its imports take longer than they
SPACE = """
lr: {low: 1e-4, high: 1e-2, log: true}
model.exchange: {choices: [budgeted, dense]}
budget.scale: {low: 1, high: 8, when: {model.exchange: budgeted}}
"""


def test_three_objectives_over_a_space_with_conditions_and_twice_as_many_trials_later(store, tmp_path, shared_ray):
    (tmp_path / "space.yaml").write_text(SPACE)
    options = ["--store", store.uri, "--out", tmp_path / "out", *SMALL, "--space", tmp_path / "space.yaml"]
    options += ["--sampler", "nsga2", "--objectives", "score,participation,perf/epoch_s:min", "--epochs", "1"]
    first = run_here(sweep, SweepConfig, *options, "--trials", "4")
    assert first.returncode == 0 and "4 trials, none was to be stopped early; 0 failed" in first.stdout, first.stderr
    done = run_here(sweep, SweepConfig, *options, "--trials", "6")
    assert done.returncode == 0 and "sweep of 6 trials, 4 done" in done.stdout, done.stderr
    trials = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert [trial["status"] for trial in trials] == ["FINISHED"] * 6
    assert all((trial["budget.scale"] is None) == (trial["model.exchange"] == "dense") for trial in trials)
    values = [(t["best/score"], -t["best/tokens_exchanged"], -t["best/perf/epoch_s"]) for t in trials]
    front = {
        f"trial-{n:03d}.yaml"
        for n, mine in enumerate(values)
        if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in values)
    }
    assert {path.name for path in (tmp_path / "out" / "front").iterdir()} == front
    (tmp_path / "space.yaml").write_text(SPACE.replace("8", "9"))
    refused = run_here(sweep, SweepConfig, *options, "--trials", "8")
    assert refused.returncode == 1 and "was begun with another one (budget.scale differs)" in refused.stderr


def test_hyperband_stops_trials_of_a_warm_search(store, tmp_path, shared_ray):
    options = ["--store", store.uri, *SMALL, "--search", "lr,model.dropout", "--epochs", "3", "--grace-epochs", "1"]
    first = run_here(sweep, SweepConfig, *options, "--out", tmp_path / "first", "--trials", "4", "--scheduler", "none")
    assert first.returncode == 0, first.stderr
    options += ["--out", tmp_path / "second", "--scheduler", "hyperband", "--warm-start", tmp_path / "first"]
    done = run_here(sweep, SweepConfig, *options, "--trials", "5")
    assert done.returncode == 0, done.stderr
    assert "warm start: 4 of the 4 finished trials" in done.stdout and "HyperBand stopped " in done.stdout
    trials = pq.read_table(tmp_path / "second" / "trials.parquet").to_pylist()
    assert [t["trial"] for t in trials] == [0, 5, 6, 7, 8], "after the recipe as given come those that were lent"
