"""A tracking server behind a path prefix and a password, on a cluster that knows neither; and one that refuses writes.

The server is MLflow's, the cluster a Ray head that was started without any MLFLOW_ variable.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflowserver
import pytest
from gateway import Gateway
from inprocess import run_here
from mlflow.tracking import MlflowClient

import clcr
from infra.head import local_head
from pipelines.train import TrainConfig
from pipelines.train import train as job_train

ROOT = Path(__file__).parents[3]
OPTIONS = "--model.width 16 --model.heads 2 --batch-size 4 --epochs 3 --log-every 1 --cpus-per-worker 1"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_shared_ray")]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflowserver.server(folder) as port, Gateway(port, "/team/mlflow", "me", "s3cret:%") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def head():
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - bare.keys():
            patch.delenv(name)
        with local_head(cpus=2, env={"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}) as head:
            yield head


def known(gateway):
    """What a driver knows of the tracking server."""
    return {
        "MLFLOW_TRACKING_URI": gateway.uri,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "s3cret:%",
    }


def options(store, out):
    return ["--store", store.uri, "--out", str(out), *OPTIONS.split()]


def train(head, gateway, store, out):
    environment = {**head.env, "RAY_ADDRESS": head.address, **known(gateway)}
    command = [sys.executable, "pipelines/train.py", *options(store, out)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def require_result(out):
    """The model and its metrics are there and read."""
    assert json.loads((out / "metrics.json").read_text())["label"]["n"] > 0
    assert clcr.load(out / "model").tasks.keys() == {"label", "mood"}


def run_of(out, gateway, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret:%")
    client, about = MlflowClient(gateway.uri), json.loads((out / "run.json").read_text())
    return client.get_run(about["run_id"]), {file.path for file in client.list_artifacts(about["run_id"])}


def test_a_cluster_that_knows_neither_prefix_nor_password_trains_and_a_refusal_in_mid_epoch_costs_no_result(
    head, gateway, store, tmp_path, monkeypatch
):
    out = tmp_path / "refused"
    gateway.refuse(403, after=1)  # the first steps; later ones may all come in one call
    job = train(head, gateway, store, out)
    said, error = job.communicate(timeout=400)
    assert job.returncode == 1 and gateway.unauthorized == 0 and gateway.writes > 1, said + error
    assert error.startswith(f"error: the model and its test metrics are saved in {out}, but MLflow has not taken them")
    assert error.count("\n") == 1 and "403" in error
    require_result(out)
    gateway.refuse(None)
    for name, value in known(gateway).items():
        monkeypatch.setenv(name, value)
    again = run_here(job_train, TrainConfig, *options(store, out))  # the advice of that line; needs no cluster
    assert again.returncode == 0, again.stdout + again.stderr
    run, artifacts = run_of(out, gateway, monkeypatch)
    assert run.info.status == "FINISHED" and "test/score" in run.data.metrics
    assert artifacts >= {"model", "config.yaml"}


def test_a_server_that_answers_500_in_mid_epoch_is_waited_for_with_the_result_saved(
    head, gateway, store, tmp_path, monkeypatch
):
    out = tmp_path / "away"
    gateway.refuse(500, after=1)
    job = train(head, gateway, store, out)
    deadline = time.monotonic() + 400
    while not (out / "metrics.json").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    require_result(out)
    assert job.poll() is None, job.communicate()
    gateway.refuse(None)
    said, error = job.communicate(timeout=200)
    assert job.returncode == 0 and not error, said + error
    run, artifacts = run_of(out, gateway, monkeypatch)
    assert run.info.status == "FINISHED" and {"best/score", "test/score"} <= run.data.metrics.keys()
    assert artifacts >= {"model", "config.yaml"}
