"""The train job on a real two-node Ray cluster and a real MLflow store."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from inprocess import run_here
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from storefiles import make_clips, write_store

import clcr
from clcr.batches import collate
from clcr.config import CLCRConfig, ModelConfig
from clcr.training import OptimConfig
from features.store import open_store
from pipelines.common.cli import run_job, to_yaml
from pipelines.common.cluster import count_slots, cpus_for, retry_start
from pipelines.common.errors import JobError
from pipelines.evaluation.exchange import exchange_use
from pipelines.explain import ExplainConfig, explain, held_out_batches, load_model, mean_weights
from pipelines.tracking.registry import load_model as load_registered
from pipelines.train import CHANGEABLE, TrainConfig, constant_accuracy, train
from pipelines.training.inputs import check
from pipelines.training.learner import Learner, Recipe
from pipelines.training.run_folder import claim
from pipelines.training.trained import open_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_nodes(no_shared_ray):
    cluster = retry_start(Cluster, initialize_head=True, head_node_args={"num_cpus": 1})
    retry_start(cluster.add_node, num_cpus=1)
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def job(store, out, **options):
    recipe = Recipe(
        optim=OptimConfig(epochs=3, batch_size=8),
        network=CLCRConfig(model=ModelConfig(width=16, heads=2, dropout=0.0)),
        **options,
    )
    return TrainConfig(store=store.uri, out=str(out), recipe=recipe, experiment="tests", checkpoint_seconds=0)


@pytest.fixture(scope="module")
def trained(two_nodes, store, tmp_path_factory):
    config = replace(job(store, tmp_path_factory.mktemp("train") / "run"), workers=2)
    train(config)
    return config


def client(config):
    return MlflowClient(f"sqlite:///{Path(config.out).parent}/mlflow.db")


def run_of(config):
    return client(config).get_run(json.loads((Path(config.out) / "run.json").read_text())["run_id"])


def test_two_workers_on_two_nodes_train_and_test_every_clip_once(trained, two_nodes):
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    metrics = json.loads((Path(trained.out) / "metrics.json").read_text())
    assert metrics["label"]["n"] == metrics["mood"]["n"] == 4  # of five: one clip has neither
    assert 0 <= metrics["label"]["accuracy"] <= 1


def test_mlflow_holds_parameters_every_epoch_diagnostics_pictures_and_the_model(trained):
    run, history = run_of(trained), client(trained).get_metric_history
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "16" and run.data.params["budget.gamma"] == "1.0"
    assert run.data.params["model"] == run.data.tags["model"] == "clcr"
    assert [m.step for m in history(run.info.run_id, "val/accuracy")] == [0, 1, 2]
    assert {"train/loss_intra", "diag/participation/0/video", "test/label/accuracy", "perf/samples_per_s"} <= set(
        run.data.metrics
    )
    files = {
        f.path for folder in ("model", "confusion") for f in client(trained).list_artifacts(run.info.run_id, folder)
    }
    assert {"model/weights.safetensors", "model/config.json", "model/store.json", "confusion/label.png"} == files


def test_the_model_folder_gives_the_model_back(trained, store):
    model = clcr.load(Path(trained.out) / "model")
    assert json.loads((Path(trained.out) / "model" / "store.json").read_text())["fingerprint"] == store.spec.fingerprint
    row = store.index("test").to_pylist()[0]
    stored = store.read(row["shard"], row["offset"], row["nbytes"])
    features = {m: stored[m] for m in ("video", "audio") if m in stored}
    batch = collate([{"clip_id": "x", "features": features, "targets": {}}], model.features, model.tasks)
    with torch.no_grad():
        assert torch.isfinite(model(batch).logits["label"]).all()


def test_explain_draws_what_the_model_attends_to_into_the_run(trained, store, capsys):
    explain(ExplainConfig(run=trained.out, store=store.uri, clips=2))
    names = {"levels.png", "exchange.png", "participation.png", "clips.png"}
    said = capsys.readouterr().out.split()
    assert {Path(line).name for line in said} == names and all(Path(line).stat().st_size > 10_000 for line in said)
    logged = client(trained).list_artifacts(
        json.loads((Path(trained.out) / "run.json").read_text())["run_id"], "explained"
    )
    assert {Path(file.path).name for file in logged} == names


def test_explained_weights_sum_to_one_over_every_test_clip(trained, store):
    omega, weights = mean_weights(load_model(trained.out).model, store)
    clips = len(store.index("test"))
    assert all(o.shape == (clips, 3) and abs(o.sum(axis=1) - 1).max() < 1e-5 for o in omega.values())
    assert set(weights) == {"beta video", "beta audio", "eta video", "eta audio"}


def test_what_the_exchange_is_used_for_is_measured_with_it_and_without(trained, store):
    model = load_model(trained.out).model
    use = exchange_use(model, held_out_batches(model, store))
    assert set(use.size) == {f"{level} {m}" for level in range(3) for m in ("video", "audio")}
    assert all(size > 0 for size in use.size.values()) and all(0 < share <= 1 for share in use.heard.values())
    assert all(0 <= seconds < 3 for seconds in use.distance.values())
    assert use.scores.keys() == model.tasks.keys() == use.changed.keys()
    assert all(abs(row[:3].sum() - 1) < 1e-4 and abs(row[3:].sum() - 1) < 1e-4 for row in use.weights.values())


def test_explain_needs_a_finished_run_and_a_store_that_its_model_can_read(trained, store, tmp_path):
    with pytest.raises(JobError, match="holds no finished training"):
        explain(ExplainConfig(run=str(tmp_path), store=store.uri))
    other = write_store(tmp_path / "other", make_clips(12, 3, 3))
    spec = json.loads((tmp_path / "other" / "store.json").read_text())
    faster = spec["features"] | {"video": spec["features"]["video"] | {"rate": 7.0}}
    fewer = [task for task in spec["tasks"] if task["name"] == "mood"]
    for changed, message in (({"tasks": fewer}, "has no task label"), ({"features": faster}, r"other .*video\.rate")):
        (tmp_path / "other" / "store.json").write_text(json.dumps(spec | changed))
        with pytest.raises(JobError, match=message):
            explain(ExplainConfig(run=trained.out, store=other.uri))


def test_a_run_that_has_outlived_its_mlflow_is_drawn_all_the_same(trained, store, tmp_path, capsys):
    shutil.copytree(trained.out, tmp_path / "run")
    started = {"run_id": "0" * 32, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(started))
    explain(ExplainConfig(run=str(tmp_path / "run"), store=store.uri, clips=1))
    first, *drawn = capsys.readouterr().out.splitlines()
    assert "without participation.png and MLflow" in first
    assert [Path(line).name for line in drawn] == ["levels.png", "exchange.png", "clips.png"]


def test_running_it_again_trains_nothing_and_says_so(trained, capsys):
    before = len(client(trained).search_runs(["1"]))
    run_id = json.loads(Path(trained.out, "run.json").read_text())["run_id"]
    client(trained).update_run(run_id, "RUNNING")  # a driver that was killed before it could say so
    train(trained)
    said = capsys.readouterr().out
    assert "finished" in said and "one class" in said
    labels = Counter(open_store(trained.store).index("test")["label_label"].drop_null().to_pylist())
    constant = max(labels.values()) / labels.total()
    assert constant_accuracy(open_store(trained.store), ("label", "mood"), None) == {"label": constant}
    assert f"│ {constant:.3f}" in next(line for line in said.splitlines() if "│ label" in line)
    assert len(client(trained).search_runs(["1"])) == before
    assert client(trained).get_run(run_id).info.status == "FINISHED"


def test_what_a_run_runs_on_may_change_and_is_written_down(trained, tmp_path):
    shutil.copytree(trained.out, tmp_path / "run")
    copy = replace(trained, out=str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(copy))
    moved = replace(copy, workers=7)
    claim(moved, CHANGEABLE)
    assert (tmp_path / "run" / "config.yaml").read_text() == to_yaml(moved)


def test_another_run_in_the_same_folder_is_refused(trained):
    with pytest.raises(JobError, match=r"holds another run .*seed"):
        train(replace(trained, recipe=replace(trained.recipe, seed=7)))


def test_a_store_that_was_extracted_anew_is_refused_by_a_run_on_the_old_one(trained, store, tmp_path):
    shutil.copytree(trained.out, tmp_path / "run")
    copy = replace(trained, out=str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(copy))
    claim(copy, CHANGEABLE)
    started = json.loads((tmp_path / "run" / "run.json").read_text())
    assert started["store"] == store.spec.fingerprint
    (tmp_path / "run" / "run.json").write_text(json.dumps(started | {"store": "0" * 64}))
    with pytest.raises(JobError, match=r"holds a run on what .* was before"):
        claim(copy, CHANGEABLE)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_nothing_can_be_scored_by_is_refused_before_anything_is_trained(tmp_path, split):
    clips = make_clips(24, 3, 3)
    clips = [replace(clip, labels=dict.fromkeys(clip.labels)) if clip.split == split else clip for clip in clips]
    unlabelled = write_store(tmp_path / "store", clips)
    with pytest.raises(JobError, match=f"no clip in split {split} has a label of label, mood"):
        check(unlabelled.uri, Recipe())


def test_a_worker_gets_no_more_cpus_than_a_node_has_and_what_has_no_room_is_refused(two_nodes, store, tmp_path):
    assert [cpus_for(workers, {}) for workers in (1, 2, 3)] == [1, 1, 1]  # one CPU a node, two in the cluster
    assert [count_slots({"CPU": cpus}) for cpus in (0.5, 1, 2)] == [4, 2, 0]
    with pytest.raises(JobError, match=r"--workers 3 with 1 CPUs each: .* room for 2 such workers"):
        train(replace(job(store, tmp_path / "run"), workers=3))
    with pytest.raises(JobError, match=r"--workers 1 with 2 CPUs each: .* room for 0 such workers"):
        train(replace(job(store, tmp_path / "run"), cpus_per_worker=2))


def test_a_loss_that_is_not_finite_ends_the_job_at_once_with_one_line(two_nodes, store, tmp_path):
    config = replace(job(store, tmp_path / "run"), workers=2, checkpoint_seconds=1.0, log_every=1)
    optim = OptimConfig(epochs=3, batch_size=8, lr=1e30, warmup=0)
    config = replace(config, recipe=replace(config.recipe, optim=optim))
    with pytest.raises(JobError, match=r"step \d+: the .* on clips clip/.*: check those clips' features and labels"):
        train(config)
    assert run_of(config).info.status == "FAILED"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "colour"], "--tasks colour"),
        (["--model", "resnet"], "--architecture resnet"),
        (["--model.width", "7", "--model.heads", "2"], "heads"),
        (["--epochs", "0"], "--epochs 0"),
        (["--grad-clip", "-1"], "--grad-clip -1.0: must be 0 or more"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--loader.fold", "9"], "has no cross-validation"),
        (["--workers", "0"], "--workers 0: must be 1 or more"),
        (["--store", "nowhere"], "no feature store"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(store, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["train.py", "--store", store.uri, "--out", str(tmp_path / "run"), *options])
    assert run_job(train, TrainConfig, "") in (1, 2)
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_bad_input_of_the_command_is_one_line(store, tmp_path):
    command = [sys.executable, "pipelines/train.py", "--store", store.uri, "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--tasks", "colour"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--tasks colour" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_killed_driver_goes_on_in_mid_epoch_and_no_loss_of_any_step_differs(two_nodes, store, tmp_path, monkeypatch):
    """By plain python, which starts a Ray of its own, then on a cluster; with dropout. KILLS=3 kills it more often."""
    out, epochs = tmp_path / "run", 20
    options = f"--model.width 16 --model.heads 2 --model.levels 2 --batch-size 4 --epochs {epochs} --log-every 1"
    command = [sys.executable, "pipelines/train.py", "--store", store.uri, "--out", str(out), *options.split()]
    command += ["--cpus-per-worker", "1"]
    snapshot, moment = out / "checkpoints" / "checkpoint_manager_snapshot.json", random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "1"))):
        before = snapshot.read_text() if snapshot.exists() else ""
        job = subprocess.Popen([*command, "--checkpoint-seconds", "0.3"], cwd=ROOT, start_new_session=True)
        deadline = time.monotonic() + 400
        while (not snapshot.exists() or snapshot.read_text() == before) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 0.5))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert not (out / "metrics.json").exists(), "it was finished before it could be killed"
        snapshot.write_text("")  # as a kill leaves it that comes while Ray writes it
    again = run_here(train, TrainConfig, *command[2:], "--register", "toy")
    assert again.returncode == 0, again.stderr

    torch.set_num_threads(1)
    recipe = Recipe(
        optim=OptimConfig(epochs=epochs, batch_size=4),
        network=CLCRConfig(model=ModelConfig(width=16, heads=2, levels=2)),
    )
    learner, steps = Learner(store.uri, recipe), []
    means = [epoch.metrics["train/loss"] for epoch in learner.fit(steps.append)]
    metrics, *_ = learner.test()
    run = json.loads((out / "run.json").read_text())
    history = MlflowClient(run["tracking_uri"]).get_metric_history
    best = max(history(run["run_id"], "best/score"), key=lambda point: point.value).value
    assert f"\ntrained {epochs} of {epochs} epochs, best val score {best:.3f}, of epoch " in again.stdout
    for name in ("loss", "loss_label", "loss_mood", "loss_intra"):
        points = [(point.step, point.value) for point in history(run["run_id"], f"step/{name}")]
        assert points == [(number + 1, losses[f"train/{name}"]) for number, losses in enumerate(steps)]
    assert [point.value for point in history(run["run_id"], "train/loss")] == means
    assert json.loads((out / "metrics.json").read_text()) == metrics
    registered = load_registered("models:/toy/1", run["tracking_uri"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run["tracking_uri"])
    assert open_model("--model", "models:/toy/1").digest == open_model("--model", str(out)).digest
    assert all(map(torch.equal, registered.parameters(), learner.trainer.model.eval().parameters()))
