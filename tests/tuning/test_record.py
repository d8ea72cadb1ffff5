"""What a sweep's driver writes down: all of it is there after a kill, and nothing twice."""

import time
from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution

from clcr.training import OptimConfig
from pipelines.common.errors import JobError
from pipelines.tracking import outbox
from pipelines.tracking.run import Run, start_run
from pipelines.training.learner import Recipe
from tuning.objectives import BY_SCORE, SCORE
from tuning.record import Record
from tuning.space import Space
from tuning.study import ENDED, StudyFile, StudySearch, rows

pytestmark = pytest.mark.slow
EPOCHS = 4
SPACE = Space({"lr": FloatDistribution(1e-4, 1e-2)})


def driver(folder, parent):
    """A driver's record as it starts, and the one trial that it then runs, None once that has ended."""
    file = StudyFile(str(folder))
    search = StudySearch(file.open([BY_SCORE]), SPACE, trials=1, hours=0)
    recipe = Recipe(optim=OptimConfig(epochs=EPOCHS))
    record = Record(Run(parent.uri, parent.run_id), "x", recipe, search, file, trials=1)
    if search.over:
        return record, None
    trial = SimpleNamespace(trial_id="a", config=search.suggest("a"), last_result={})
    record.on_trial_start(0, [], trial)
    return record, trial


def show(record, trial, epochs):
    for epoch in epochs:
        result = {"epoch": epoch, SCORE: epoch / 10, "val/accuracy": epoch / 10, ENDED: epoch == EPOCHS}
        record.on_trial_result(0, [], trial, result)


def history(parent, record):
    (asked,) = record.search.study.trials
    return [p.step for p in parent.client.get_metric_history(asked.user_attrs["run_id"], "val/accuracy")]


def killed_before_it_sends(monkeypatch):
    """Points wait in the outbox from now on, and go down with the driver."""
    monkeypatch.setattr(outbox, "retry_until_up", lambda *_, **__: time.sleep(600))


def test_points_that_a_killed_driver_had_not_sent_are_sent_by_the_next(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, [1])
    record.runs["a"].flush()
    with monkeypatch.context() as patch:
        killed_before_it_sends(patch)
        show(record, trial, [2, 3])
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, EPOCHS + 1))  # a trial begins anew
    record.on_trial_complete(0, [], trial)
    assert history(parent, record) == list(range(EPOCHS))


@pytest.mark.parametrize("last", [{"epoch": EPOCHS}, {"epoch": 3, ENDED: True}], ids=["all epochs", "patience"])
def test_the_last_epoch_of_a_trial_outlives_a_driver_killed_before_mlflow_had_it(last, tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, last["epoch"] - 1))
    record.runs["a"].flush()
    with monkeypatch.context() as patch:
        killed_before_it_sends(patch)
        show(record, trial, [last["epoch"] - 1])
        record.on_trial_result(0, [], trial, {SCORE: 0.1, "val/accuracy": 0.1, **last})
    record, trial = driver(tmp_path, parent)
    assert trial is None and [row["status"] for row in rows(record.search.study)] == ["FINISHED"]
    assert history(parent, record) == list(range(last["epoch"]))


def test_a_trial_that_failed_has_failed_for_the_next_driver_too(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    with monkeypatch.context() as patch:
        killed_before_it_sends(patch)
        show(record, trial, [1])
        record.on_trial_result(0, [], trial, {"error": "no memory", "traceback": "at line 1"})
    record, trial = driver(tmp_path, parent)
    assert trial is None and [(row["status"], row["error"]) for row in rows(record.search.study)] == [
        ("FAILED", "no memory")
    ]
    assert history(parent, record) == [0]


@pytest.mark.parametrize(("epochs", "status"), [(EPOCHS, "FINISHED"), (2, "STOPPED")])
def test_an_end_that_mlflow_does_not_take_ends_the_sweep_and_not_the_trial(epochs, status, tmp_path, monkeypatch):
    """Tune takes what this callback raises for an error of the trial, and trains it again."""
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, epochs + 1))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "flush", lambda *_: refuse())
        record.on_trial_complete(0, [], trial)
        with pytest.raises(JobError, match="no answer"):
            record.on_step_end(0, [])
    record, trial = driver(tmp_path, parent)
    assert trial is None and [row["status"] for row in rows(record.search.study)] == [status]
    assert history(parent, record) == list(range(epochs))


@pytest.mark.parametrize("epochs", [2, EPOCHS], ids=["interrupted", "at its end"])
def test_a_trial_whose_run_was_deleted_meanwhile_gets_a_new_one(epochs, tmp_path, capsys):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, epochs + 1))
    record.runs["a"].flush()
    parent.client.delete_run(record.runs["a"].run_id)
    record, trial = driver(tmp_path, parent)
    assert "was deleted: it has a new one from here on" in capsys.readouterr().out
    if trial is not None:
        show(record, trial, range(1, EPOCHS + 1))
        record.on_trial_complete(0, [], trial)
        assert history(parent, record) == list(range(EPOCHS))
    (row,) = rows(record.search.study)
    found = parent.client.get_run(row["run_id"])
    assert row["status"] == found.info.status == "FINISHED" and found.info.lifecycle_stage == "active"
    assert float(found.data.params["lr"]) == row["lr"]


def test_epochs_of_a_trial_that_never_had_a_score_arrive_before_it_counts_as_failed(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    record.on_trial_result(0, [], trial, {"epoch": 1, SCORE: float("nan"), "val/accuracy": 0.1})
    monkeypatch.setattr(Run, "set_tag", lambda *_: refuse())
    record.on_trial_complete(0, [], trial)
    assert record.problem and history(parent, record) == [0]


def refuse():
    raise JobError("no answer")


def test_when_the_study_hears_of_an_end_mlflow_has_every_point(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, EPOCHS + 1))
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):  # no Exception, as a signal is none
        record.on_trial_complete(0, [], trial)
    assert [row["status"] for row in rows(record.search.study)] == ["FINISHED"]
    assert history(parent, record) == list(range(EPOCHS))


def test_a_trial_whose_process_died_shows_each_epoch_once(tmp_path):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, [1, 2])
    record.on_trial_start(0, [], trial)
    show(record, trial, range(1, EPOCHS + 1))
    record.on_trial_complete(0, [], trial)
    assert history(parent, record) == list(range(EPOCHS))
