"""A run's folder: one job at a time, results saved before they are tracked, old runs resumed as they were begun."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from learners import recipe
from mlflow.tracking import MlflowClient
from mlflowserver import Refusing

import clcr
from clcr.training import OptimConfig
from clcr.versions import VERSION, VERSION_1_NAMES
from features.files import open_fs, write_atomic
from pipelines.common.cli import flatten, parse, to_yaml
from pipelines.common.errors import JobError
from pipelines.tracking.run import start_run
from pipelines.train import TrainConfig, show_finished, train
from pipelines.training.learner import Learner, Recipe, build_model
from pipelines.training.loading import LoaderConfig
from pipelines.training.run_folder import as_begun, claim, finish, open_run, sole_owner, title, track_finished

ROOT = Path(__file__).parents[3]


@pytest.fixture
def trained(store):
    learner = Learner(store.uri, recipe(epochs=1))
    for _ in learner.fit():
        pass
    return learner


def test_a_folder_has_one_job_and_a_dead_ones_claim_is_taken_over(tmp_path, monkeypatch):
    out = tmp_path / "run"
    code = (
        "import sys, time\n"
        "from pipelines.training.run_folder import sole_owner\n"
        f"with sole_owner({str(out)!r}):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(600)\n"
    )
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(JobError) as refused, sole_owner(str(out)):
            pass
        said = str(refused.value)
        assert f"--out {out} is being written by job raysubmit_1, process {other.pid} on " in said
        assert "ray job logs -f raysubmit_1" in said and "ray job stop raysubmit_1" in said
    finally:
        other.kill()
        other.wait()
    with sole_owner(str(out)):
        assert json.loads((out / "_owner.json").read_text())["pid"] != other.pid
    assert not (out / "_owner.json").exists()


def test_a_job_whose_folder_was_taken_over_ends_as_if_killed(tmp_path):
    """Its host was cut off from the storage for so long that another start took it for dead."""
    out = tmp_path / "run"
    code = (
        "import sys, time, features.store.lock as lock\n"
        "from pipelines.common.quiet import quieten\n"
        "quieten()\n"
        "lock.HEARTBEAT = 0.05\n"
        "from pipelines.training.run_folder import sole_owner\n"
        f"with sole_owner({str(out)!r}):\n"
        "    print('mine', flush=True)\n"
        "    print('buffered')\n"
        "    time.sleep(600)\n"
    )
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONUNBUFFERED": ""}}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **piped) as job:
        assert job.stdout.readline() == "mine\n"
        owner = json.loads((out / "_owner.json").read_text())
        fs, path = open_fs(f"{out}/_owner.json")
        write_atomic(fs, path, json.dumps({**owner, "owner": "other", "pid": 7}).encode())
        buffered, said = job.communicate(timeout=60)
    assert job.returncode == 1 and "Traceback" not in said and buffered == "buffered\n"
    assert f"error: --out {out} was taken over by another job (process 7 on " in said
    assert json.loads((out / "_owner.json").read_text())["owner"] == "other"


def test_what_mlflow_refuses_is_saved_first_and_sent_by_the_next_start(trained, store, tmp_path):
    out, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(uri, "x", "run", {}, {})
    honest = run.client
    run._client = Refusing(honest)
    tested, config = trained.test(), TrainConfig(store.uri, str(out), recipe=trained.recipe)
    trained.recipe = replace(trained.recipe, loader=LoaderConfig(fold=2))
    claim(config)
    run.log_metrics({"val/score": 0.25}, 0)
    with pytest.raises(JobError, match=rf"are saved in {out}, but MLflow has not taken them \(.*read only"):
        finish(trained, str(out), run, *tested)
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads((out / "model" / "store.json").read_text())["fold"] == 2
    assert clcr.load(out / "model") and (out / "confusion" / "label.png").stat().st_size > 1000
    assert not (out / "tracked.json").exists() and not honest.get_run(run.run_id).data.metrics
    started = {"run_id": run.run_id, "tracking_uri": uri}
    assert (out / "unsent.json").exists()
    show_finished(config, started, metrics)
    assert not (out / "unsent.json").exists()
    found = MlflowClient(uri).get_run(run.run_id)
    assert found.info.status == "FINISHED" and found.data.metrics["test/label/accuracy"] == metrics["label"]["accuracy"]
    assert found.data.metrics["val/score"] == 0.25, "an epoch that was on its way when the training ended"
    assert any(name.startswith("test/diag/") for name in found.data.metrics)
    assert found.data.metrics["best/test_score"] == found.data.metrics["test/score"]
    sent = {f.path for folder in ("model", "confusion") for f in honest.list_artifacts(run.run_id, folder)}
    assert {"model/weights.safetensors", "confusion/label.png"} <= sent
    (out / "model" / "weights.safetensors").unlink()
    track_finished(str(out), started, metrics, OptimConfig(epochs=1))  # all was sent: nothing is read again


def test_the_result_of_a_run_that_was_deleted_stays_in_its_folder(trained, store, tmp_path, capsys):
    out, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(uri, "x", "run", {}, {})
    client, run._client = run.client, Refusing(run.client)
    claim(TrainConfig(store.uri, str(out), recipe=trained.recipe))
    with pytest.raises(JobError, match="are saved in"):
        finish(trained, str(out), run, *trained.test())
    client.delete_run(run.run_id)
    started, metrics = {"run_id": run.run_id, "tracking_uri": uri}, json.loads((out / "metrics.json").read_text())
    track_finished(str(out), started, metrics, OptimConfig(epochs=1))
    assert f"was deleted: the result is in {out} alone" in capsys.readouterr().out
    shutil.rmtree(out / "model")  # to save space
    track_finished(str(out), started, metrics, OptimConfig(epochs=1))


def test_a_run_on_a_store_whose_failed_clips_were_cured_since_is_not_resumed(store, tmp_path):
    config = TrainConfig(store.uri, str(tmp_path / "run"), recipe=recipe())
    open_run(config, claim(config), f"sqlite:///{tmp_path}/mlflow.db", "x", {})
    assert claim(config)["clips"] == store.counts()[0]
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**begun, "clips": begun["clips"] - 1}))
    with pytest.raises(JobError, match=rf"holds a run on what {store.uri} was before"):
        claim(config)
    (tmp_path / "run" / "metrics.json").write_text("{}")  # it had finished by then
    assert claim(config)["clips"] == begun["clips"] - 1
    (tmp_path / "run" / "metrics.json").unlink()
    begun.pop("clips")  # as an earlier version wrote it
    (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
    assert claim(config) == begun


def refuse_input(*arguments):
    raise JobError("no input")


def test_a_deleted_run_is_followed_by_a_new_one_that_is_said(store, tmp_path, capsys, monkeypatch):
    config = TrainConfig(store.uri, str(tmp_path / "run"), recipe=recipe())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = open_run(config, claim(config), uri, title(store.uri, config.recipe), {"seed": "0"}, "in words")
    tags = first.client.get_run(first.run_id)
    assert tags.info.run_name == "clcr on store, seed 0"
    assert tags.data.tags["store"] == "store" and tags.data.tags["mlflow.note.content"] == "in words"
    same = open_run(config, claim(config), uri, "x", {})
    assert same.run_id == first.run_id and not capsys.readouterr().out
    first.client.delete_run(first.run_id)
    with monkeypatch.context() as patch, pytest.raises(JobError, match="no input"):
        patch.setattr("pipelines.tracking.run.Run.log_input", refuse_input)
        open_run(config, claim(config), uri, "x", {})
    assert "was deleted: this start has a new run" in capsys.readouterr().out
    second = open_run(config, claim(config), uri, "x", {})  # the new run, though its start failed
    assert second.run_id != first.run_id and not capsys.readouterr().out
    assert json.loads((tmp_path / "run/run.json").read_text())["run_id"] == second.run_id


def test_a_run_that_version_1_began_is_resumed_with_its_meaning(store, tmp_path, capsys):
    config = TrainConfig(store.uri, str(tmp_path / "run"), recipe=recipe())
    options = yaml.safe_load(to_yaml(config))
    assert options.pop("version") == VERSION and options.keys() >= VERSION_1_NAMES
    for name in ("loss.standardise", "score"):
        del options[name]  # version 1 had neither
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(JobError, match=r"holds another run .*standardise False not True, score skill not bounded"):
        claim(config)
    begun = as_begun(config)
    assert begun.recipe.optim.score == "skill" and not begun.recipe.network.loss.standardise
    said = capsys.readouterr().out
    assert "begun by an earlier version" in said and "loss.standardise False, score skill" in said
    claim(begun)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["version"] == VERSION
    assert as_begun(begun) == begun
    assert as_begun(replace(config, out=str(tmp_path / "new"))).recipe.network.loss.standardise


def test_a_file_by_hand_means_todays_defaults_and_a_jobs_those_of_its_version(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.01\nmodel.width: 16\n")
    (tmp_path / "later.yaml").write_text(f"version: {VERSION + 1}\nlr: 0.01\n")
    assert parse(Recipe, ["--config", str(tmp_path / "mine.yaml")]).network.loss.standardise
    with pytest.raises(JobError, match=f"written by a later version .{VERSION + 1}"):
        parse(Recipe, ["--config", str(tmp_path / "later.yaml")])
    (tmp_path / "job.yaml").write_text(to_yaml(recipe()))
    assert flatten(parse(Recipe, ["--config", str(tmp_path / "job.yaml")])) == flatten(recipe())


def test_a_run_whose_file_lacks_an_option_that_came_later_is_resumed_with_its_default_alone(store, tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(store.uri, str(out))
    claim(config)
    written = yaml.safe_load((out / "config.yaml").read_text())
    del written["log_every"], written["patience"]
    (out / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(JobError, match=r"holds another run .*log_every None not 7"):
        claim(replace(config, log_every=7))
    claim(config)
    assert yaml.safe_load((out / "config.yaml").read_text())["patience"] == 0


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(store, tmp_path, capsys):
    out = tmp_path / "run"
    train(TrainConfig(store=store.uri, out=str(out), dry_run=True, recipe=recipe(epochs=4)))
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in build_model(store, recipe()).parameters())
    assert f"reading {store.uri}: 29 train, 3 val, 5 test clips" in said
    assert f"would train clcr of {parameters:,} parameters for 4 epochs of 4 steps of 8 clips" in said
    assert not out.exists()
    claim(TrainConfig(store=store.uri, out=str(out), recipe=recipe(epochs=5)))
    with pytest.raises(JobError, match=r"holds another run \(epochs 5 not 4\)"):
        train(TrainConfig(store=store.uri, out=str(out), dry_run=True, recipe=recipe(epochs=4)))
    (out / "metrics.json").write_text("{}")
    train(TrainConfig(store=store.uri, out=str(out), dry_run=True, recipe=recipe(epochs=5)))
    assert "holds this run, finished" in capsys.readouterr().out
    with pytest.raises(JobError, match="--tasks nosuch"):
        train(TrainConfig(store=store.uri, out=str(out), dry_run=True, recipe=Recipe(tasks=("nosuch",))))
