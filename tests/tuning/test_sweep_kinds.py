"""Sweeps of other kinds on real clusters: several workers per trial, two objectives, S3, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from inprocess import run_here
from mlflow.tracking import MlflowClient
from pyarrow.fs import FileSelector, S3FileSystem
from s3 import CREDENTIALS, server

import tuning.sweep
from clcr.config import CLCRConfig, ModelConfig, StemConfig
from clcr.training import OptimConfig
from pipelines.common.cluster import retry_start
from pipelines.common.errors import JobError
from pipelines.training.learner import Learner, Recipe
from tuning.sweep import SEARCHED, SweepConfig, allocate

ROOT = Path(__file__).parents[2]
SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "8", "--grace-epochs", "1"]
pytestmark = pytest.mark.slow


def arguments(store, out, task="label"):
    return ["--store", store.uri, "--out", str(out), "--tasks", task, *SMALL]


def sweep(store, out, *options, task="label", script=("tuning/sweep.py",), **env):
    job = [sys.executable, *script, *arguments(store, out, task), *options]
    return subprocess.run(job, cwd=ROOT, capture_output=True, text=True, env=os.environ | env)


def test_the_test_split_cannot_be_reached_from_a_trial(store):
    learner = Learner(store.uri, Recipe(), splits=SEARCHED)
    for reach in (learner.test, lambda: learner.loader("test")):
        with pytest.raises(JobError, match="the test split is kept from this run: it may read train, val"):
            learner.trainer.load_best = lambda: None
            reach()


@pytest.fixture(scope="module")
def bucket():
    """An S3 server that knows the bucket `sweeps`; this process and all that it starts reach it."""
    with server() as port, pytest.MonkeyPatch.context() as patch:
        env = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
        for name, value in env.items():
            patch.setenv(name, value)
        address = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "allow_bucket_creation": True}
        s3 = S3FileSystem(**address, access_key="test", secret_key="test")
        s3.create_dir("sweeps")
        yield s3


@pytest.fixture(scope="module")
def without_dashboard(no_shared_ray, bucket):
    retry_start(ray.init, address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


def test_trials_of_several_workers_are_refused_where_ray_would_never_return_them(without_dashboard):
    assert allocate(SweepConfig(store="s", out="o")) == (4, {"CPU": 1})
    with pytest.raises(JobError, match="runs without its dashboard"):
        allocate(SweepConfig(store="s", out="o", workers_per_trial=2))


@pytest.mark.parametrize(
    ("options", "fitting"),
    [({"cpus_per_trial": 5}, 0), ({"concurrency": 3, "cpus_per_trial": 2}, 2), ({"workers_per_trial": 5}, 4)],
)
def test_what_does_not_fit_into_the_cluster_is_refused_instead_of_waited_for(without_dashboard, options, fitting):
    with pytest.raises(JobError, match=f"room for {fitting} such workers"):
        allocate(SweepConfig(store="s", out="o", **options))


def test_as_many_trials_at_a_time_as_fit_and_no_more_than_there_are(without_dashboard):
    assert allocate(SweepConfig(store="s", out="o", cpus_per_trial=2))[0] == 2
    assert allocate(SweepConfig(store="s", out="o", trials=3))[0] == 3


def test_a_stopped_trial_of_two_workers_gives_them_back_and_metrics_are_over_both(store, tmp_path):
    """Each trial takes both of the cluster's CPUs: what follows the second, which is stopped, needs what it had.

    The first one's process dies once, after an epoch: what is started in its place needs them too.
    """
    (tmp_path / "slow.yaml").write_text("lr: 0.0005\n")
    options = ["--workers-per-trial", "2", "--trials", "2", "--epochs", "2", "--reduction", "2", "--final-seeds", "1"]
    options += ["--search", "lr", "--start-from", str(tmp_path / "slow.yaml")]
    recipe = ["--lr", "0.002", "--warmup", "0.3", "--batch-size", "2", "--model.dropout", "0", "--stem.shift", "0"]
    setting = {"task": "mood", "script": ("-m", "tests.helpers.crashing_trials", "workers")}
    done = sweep(store, tmp_path / "sweep", *options, *recipe, **setting, RAY_OVERRIDE_RESOURCES='{"CPU": 2}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweep" / "died").exists()
    fast, slow = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert fast["status"] == "FINISHED" and (slow["status"], slow["epochs"]) == ("STOPPED", 1)
    assert "given" in (tmp_path / "sweep" / "final.md").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(fast["run_id"], "val/score")
    assert [m.step for m in history] == [0, 1]
    alone = Recipe(
        tasks=("mood",),
        optim=OptimConfig(epochs=2, batch_size=2, lr=0.002, warmup=0.3),
        network=CLCRConfig(model=ModelConfig(width=16, heads=2, dropout=0.0), stem=StemConfig(shift=0.0)),
    )
    expected = [epoch.metrics["val/score"] for epoch in Learner(store.uri, alone).fit()]
    assert [m.value for m in history] == pytest.approx(expected, rel=1e-2)


def test_two_objectives_on_s3_leave_a_front_of_recipes_and_a_study_there(
    store, bucket, without_dashboard, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    options = ["--objectives", "score,participation", "--trials", "4", "--epochs", "2", "--final-seeds", "1"]
    options += ["--concurrency", "1"]  # one process for all trials
    done = sweep(store, "s3://sweeps/a", *options)
    assert done.returncode == 0, done.stderr
    with bucket.open_input_file("sweeps/a/trials.parquet") as file:
        trials = pq.read_table(file).to_pylist()
    assert [t["status"] for t in trials] == ["FINISHED"] * 4, "with two objectives no trial is stopped"
    values = [(t["best/score"], t["best/tokens_exchanged"]) for t in trials]
    front = {
        f"trial-{t['trial']:03d}.yaml"
        for t, (score, cost) in zip(trials, values, strict=True)
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in values)
    }
    assert set(names(bucket, "sweeps/a/front")) == front
    with bucket.open_input_file("sweeps/a/best.yaml") as file:
        best = max(trials, key=lambda t: (t["best/score"], -t["best/tokens_exchanged"]))
        assert yaml.safe_load(file.read())["lr"] == best["lr"]
    assert {"study.journal", "final.md", "final.png", "best.yaml"} <= set(names(bucket, "sweeps/a"))
    # Another driver, on another Ray, continues the study that lies there.
    more = [*arguments(store, "s3://sweeps/a"), *options, "--trials", "5", "--final-seeds", "0"]
    again = run_here(tuning.sweep.sweep, SweepConfig, *more)
    assert again.returncode == 0 and "sweep of 5 trials, 4 done" in again.stdout, again.stderr


def names(fs, folder):
    return [info.base_name for info in fs.get_file_info(FileSelector(folder))]
