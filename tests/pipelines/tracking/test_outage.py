"""A tracking server that goes away: training does not stand still, and at the end everything is there."""

import threading
import time

import mlflowserver
import pytest
import torch
from learners import recipe
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from s3 import FORWARD, REFUSE, UNAVAILABLE, Proxy

import clcr
from pipelines.common.errors import JobError
from pipelines.tracking import outbox
from pipelines.tracking.registry import load_model, register
from pipelines.tracking.run import abandon_children, children_metrics, delete_children, resume_run, start_run
from pipelines.training.learner import Learner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    with mlflowserver.server(tmp_path_factory.mktemp("mlflow")) as port:
        yield port


@pytest.fixture
def away(direct):
    """A proxy before the server; `away.set(REFUSE)` cuts it off."""
    with Proxy(direct) as proxy:
        yield proxy


def history(direct, run, name):
    points = MlflowClient(f"http://127.0.0.1:{direct}").get_metric_history(run.run_id, name)
    return [(point.step, point.value) for point in points]


@pytest.mark.parametrize("how", [REFUSE, UNAVAILABLE])
def test_training_goes_on_while_the_server_is_away_and_no_point_is_lost(direct, away, store, how):
    run = start_run(away.endpoint, "outage", "x", {"lr": 1}, {})
    learner, losses = Learner(store.uri, recipe(epochs=3)), []

    def after_step(measured):
        if learner.trainer.step == 2:
            away.set(how)
        losses.append((learner.trainer.step, measured["train/loss"]))
        run.log_metrics({"step/loss": measured["train/loss"]}, learner.trainer.step)

    for epoch in learner.fit(after_step):
        run.log_metrics(epoch.metrics, epoch.number)
    assert len(losses) == 12 and len(history(direct, run, "step/loss")) < 12  # it ended with the server still away
    assert [step for name, _, _, step in run.unsent() if name == "val/score"] == [0, 1, 2]
    away.set(FORWARD)
    run.finish()
    assert history(direct, run, "step/loss") == losses
    assert [step for step, _ in history(direct, run, "val/score")] == [0, 1, 2]
    assert MlflowClient(f"http://127.0.0.1:{direct}").get_run(run.run_id).info.status == "FINISHED"


def test_what_a_killed_process_had_not_sent_is_sent_by_the_next_and_nothing_twice(direct, away):
    run = start_run(away.endpoint, "outage", "x", {}, {})
    run.log_metrics({"loss": 0.0}, 0)
    run.flush()
    away.set(REFUSE)
    for step in (1, 2):
        run.log_metrics({"loss": float(step)}, step)
    unsent = run.unsent()  # as a checkpoint keeps them
    assert [step for *_, step in unsent] == [1, 2]
    away.set(FORWARD)
    run.flush()  # the server got them after all, before the process died
    again = resume_run(away.endpoint, run.run_id)
    again.log_again(unsent)
    for step in (2, 3):  # step 2 was computed again
        again.log_metrics({"loss": float(step)}, step)
    again.finish()
    assert history(direct, run, "loss") == [(step, float(step)) for step in range(4)]


def test_runs_their_tags_and_texts_wait_for_the_server(direct, away):
    """What a sweep does whenever a trial begins or ends: an outage must not end it, nor train the trial again."""

    def through(call):
        away.set(REFUSE)
        threading.Timer(1, away.set, [FORWARD]).start()
        return call()

    run = through(lambda: start_run(away.endpoint, "outage", "x", {"lr": 1}, {}))
    through(lambda: run.set_tag("ended", "finished"))
    through(lambda: run.log_text("why", "error.txt"))
    through(lambda: resume_run(away.endpoint, run.run_id))
    child = start_run(away.endpoint, "outage", "child", {}, {"variant": "a"}, run.run_id)
    assert through(lambda: run.experiment_id()) == through(lambda: child.experiment_id())
    through(lambda: abandon_children(run))
    assert through(lambda: children_metrics(run, "variant", "a")) == []
    through(lambda: delete_children(run, "variant", keep=()))
    client = MlflowClient(f"http://127.0.0.1:{direct}")
    found = client.get_run(run.run_id)
    assert found.data.tags["ended"] == "finished" and found.data.params == {"lr": "1"}
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["error.txt"]


def test_pictures_and_folders_wait_for_the_server(direct, away, tmp_path):
    run = start_run(away.endpoint, "outage", "x", {}, {})
    (tmp_path / "notes.txt").write_text("kept")
    away.set(REFUSE)
    threading.Timer(1, away.set, [FORWARD]).start()
    run.log_folder(tmp_path, "notes")
    away.set(UNAVAILABLE)
    threading.Timer(1, away.set, [FORWARD]).start()
    run.log_figure(Figure(), "picture.png")
    run.finish()
    client = MlflowClient(f"http://127.0.0.1:{direct}")
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"notes", "picture.png"}


def test_a_server_that_stays_away_ends_the_job_with_one_line_and_a_refusal_at_once(direct, away):
    run = start_run(away.endpoint, "outage", "x", {}, {})
    away.set(REFUSE)
    run.log_metrics({"loss": 1.0, "accuracy": 0.5})
    with pytest.raises(JobError, match=r"has not taken the last 2 points .*run the same command again"):
        run._outbox.flush(patience=0.5)
    with pytest.raises(JobError, match=r"^MLflow at http://.*is MLFLOW_TRACKING_URI right\?$"):
        run.ask(lambda client: client.get_run(run.run_id), patience=0.5)
    away.set(FORWARD)
    run.flush()
    run.client.delete_run(run.run_id)
    run.log_metrics({"loss": 1.0}, 1)
    started = time.monotonic()
    with pytest.raises(JobError, match="has not taken the last 1 points"):
        run.flush()
    assert time.monotonic() - started < outbox.PATIENCE / 10


def test_a_registered_model_comes_back_by_name_and_version(direct, store, tmp_path):
    uri = f"http://127.0.0.1:{direct}"
    model = Learner(store.uri, recipe()).trainer.model.eval()
    clcr.save(model, tmp_path / "model", store.spec.to_dict())
    runs = [start_run(uri, "registry", name, {}, {}) for name in "ab"]
    for run in runs:
        run.log_folder(tmp_path / "model", "model")
    assert [register(run, "toy") for run in (*runs, runs[0])] == [[f"models:/toy/{n}"] for n in (1, 2, 1)]
    for name in ("models:/toy/1", "models:/toy/latest"):
        loaded = load_model(name, uri)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert register(runs[0], "toy@best") == ["models:/toy/1", "models:/toy@best"]
    assert register(runs[1], "toy@best") == ["models:/toy/2", "models:/toy@best"]  # an alias moves
    assert register(runs[0], "toy@best") == ["models:/toy/1"]  # and not back, where an old command is repeated
    assert load_model("models:/toy@best", uri).recipe == model.recipe
    assert MlflowClient(uri).get_model_version_by_alias("toy", "best").version == "2"
    for name in ("models:/toy/9", "models:/toy@worst"):
        with pytest.raises(JobError, match="has no such model"):
            load_model(name, uri)
    with pytest.raises(JobError, match="write models:/NAME/VERSION"):
        load_model("toy", uri)
