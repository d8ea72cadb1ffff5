"""A real sweep: Ray Tune, Optuna, MLflow; its best.yaml trains."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "8", "--epochs", "3", "--grace-epochs", "1"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    command = [sys.executable, "tuning/sweep.py", "--store", store.uri, "--out", str(folder / "sweep"), *SMALL]
    done = subprocess.run([*command, "--trials", "4", "--tasks", "label"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, command, done.stdout


def test_every_trial_is_a_row_and_a_child_run_of_one_parent(swept):
    folder, _, _ = swept
    trials = pq.read_table(folder / "sweep" / "trials.parquet").to_pylist()
    assert [t["trial"] for t in trials] == [0, 1, 2, 3]
    assert all(1 <= t["epochs"] <= 3 and 0 <= t["val/best_score"] <= 1 for t in trials)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1 and {c.data.tags["mlflow.parentRunId"] for c in children} == {parents[0].info.run_id}
    assert {c.info.run_id for c in children} == {t["run_id"] for t in trials}
    assert all(r.info.status == "FINISHED" for r in runs)
    for child in children:
        row = next(t for t in trials if t["run_id"] == child.info.run_id)
        assert float(child.data.params["budget.start.1"]) == pytest.approx(row["budget.start.1"])
        assert len(client.get_metric_history(child.info.run_id, "val/accuracy")) == row["epochs"]
        assert not any(name.startswith("test/") for name in child.data.metrics), "a trial saw the test split"


def test_the_first_trial_is_the_recipe_as_given_and_trials_differ(swept):
    trials = pq.read_table(swept[0] / "sweep" / "trials.parquet").to_pylist()
    first = next(t for t in trials if t["budget.start.0"] == 0.68)
    assert first["lr"] == 0.001 and first["loss.lambda_intra"] == 0.01
    assert len({t["lr"] for t in trials}) == 4


def test_the_last_lines_count_what_asha_stopped(swept):
    trials = pq.read_table(swept[0] / "sweep" / "trials.parquet").to_pylist()
    stopped = [t for t in trials if t["status"] == "STOPPED"]
    saved = sum(3 - t["epochs"] for t in stopped)
    assert f"ASHA stopped {len(stopped)} of 4 trials and saved {saved} epochs; 0 failed" in swept[2]


def test_best_yaml_is_what_train_takes_as_it_is(swept, store):
    folder, _, _ = swept
    command = [sys.executable, "pipelines/train.py", "--config", str(folder / "sweep" / "best.yaml")]
    command += ["--store", store.uri, "--out", str(folder / "best"), "--epochs", "1"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert set(json.loads((folder / "best" / "metrics.json").read_text())) == {"label"}


def test_a_finished_sweeps_folder_is_refused_in_one_line(swept):
    done = subprocess.run(swept[1], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "holds a finished sweep" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["trials", "cpus-per-trial", "grace-epochs"])
def test_a_number_that_makes_no_sweep_is_refused_in_one_line(option, tmp_path):
    command = [
        sys.executable,
        "tuning/sweep.py",
        "--store",
        "nowhere",
        "--out",
        str(tmp_path / "x"),
        f"--{option}",
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: --{option} 0: must be 1 or more\n"
