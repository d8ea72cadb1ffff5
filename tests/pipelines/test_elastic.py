"""Workers and hosts that die: the run goes on by itself, with those that are left, and learns the same."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from storefiles import write_mixture
from test_train import ROOT, job, run_of

from clcr.config import CLCRConfig, StemConfig
from clcr.training import OptimConfig
from features.store import open_store
from pipelines.common.cluster import retry_start
from pipelines.train import train
from pipelines.training.learner import Learner

pytestmark = pytest.mark.slow
EPOCHS = 32


@pytest.fixture
def cluster(no_shared_ray):
    cluster = retry_start(Cluster, initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = retry_start(cluster.add_node, num_cpus=1)
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def after_checkpoints(config, count, strike):
    """Run `strike` once, soon after the run has so many more checkpoints than now."""

    def checkpoints():
        return set(Path(config.out, "checkpoints").glob("checkpoint_2*"))

    def wait():
        deadline = time.monotonic() + 600
        while len(checkpoints() - before) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        strike()

    before = checkpoints()

    threading.Thread(target=wait, daemon=True).start()


def long_job(store, out, **options):
    config = replace(job(store, out), checkpoint_seconds=1.0, log_every=1, **options)
    return replace(config, recipe=replace(config.recipe, optim=OptimConfig(epochs=EPOCHS, batch_size=8)))


def logged_steps(config):
    """The loss of each step by its number."""
    run = run_of(config)
    client = MlflowClient(json.loads(Path(config.out, "run.json").read_text())["tracking_uri"])
    assert run.info.status == "FINISHED"
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, "step/loss")}


def test_a_worker_that_is_killed_and_then_a_host_that_dies_cost_no_step(cluster, tmp_path, monkeypatch, capsys):
    """Of two stores mixed, begun on two workers and ended on one, with the losses of one that nothing befell."""
    # How long Ray Train waits for the lost host to come back before it takes one worker; a minute by default.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    mixture = open_store(write_mixture(tmp_path))
    config = long_job(mixture, tmp_path / "run", workers=2, min_workers=1)
    small = replace(config.recipe.network.model, levels=2)
    network = CLCRConfig(model=small, stem=StemConfig(shift=0.0))  # a shift differs on other workers
    optim = replace(config.recipe.optim, lr=1e-4)  # at 1e-3 the last bit of a sum grows to .1 within 100 steps
    config = replace(config, recipe=replace(config.recipe, network=network, optim=optim))

    def kill_a_worker():
        workers = [
            p for p in psutil.process_iter() if "RayTrainWorker" in p.name() or _title(p) == "ray::RayTrainWorker"
        ]
        ours = [p for p in workers if psutil.Process().pid in [parent.pid for parent in p.parents()]]
        os.kill(ours[0].pid, signal.SIGKILL)
        after_checkpoints(config, 1, lambda: cluster.remove_node(cluster.second, allow_graceful=False))

    after_checkpoints(config, 2, kill_a_worker)
    train(config)
    said = capsys.readouterr().out
    assert said.count("resuming from the last checkpoint") >= 2
    assert len([node for node in ray.nodes() if node["Alive"]]) == 1
    steps = logged_steps(config)
    assert list(steps) == list(range(1, EPOCHS * 5 + 1))
    metrics = json.loads(Path(config.out, "metrics.json").read_text())
    assert metrics["label"]["n"] == 4 and metrics["mood"]["n"] == 6
    assert run_of(config).data.tags["store.mixture"] == mixture.contents()
    torch.set_num_threads(1)
    undisturbed: list = []
    list(Learner(mixture, config.recipe).fit(lambda losses: undisturbed.append(losses["train/loss"])))
    worst = max(abs(mine - one) for mine, one in zip(steps.values(), undisturbed, strict=True))
    assert worst < 1e-3


def _title(process):
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""
