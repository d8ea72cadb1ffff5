"""What a sweep's driver writes down: all of it is there after a kill, and nothing twice."""

from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution

from clcr.training import OptimConfig
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
    """A driver's record as it starts, and the one trial that it then runs."""
    file = StudyFile(str(folder))
    search = StudySearch(file.open([BY_SCORE]), SPACE, trials=1, hours=0)
    recipe = Recipe(optim=OptimConfig(epochs=EPOCHS))
    record = Record(Run(parent.uri, parent.run_id), "x", recipe, search, file, trials=1)
    trial = SimpleNamespace(trial_id="a", config=search.suggest("a"), last_result={})
    record.on_trial_start(0, [], trial)
    return record, trial


def show(record, trial, epochs):
    for epoch in epochs:
        result = {"epoch": epoch, SCORE: epoch / 10, "val/accuracy": epoch / 10, ENDED: epoch == EPOCHS}
        record.on_trial_result(0, [], trial, result)


def history(parent, record):
    client = parent.client
    return [point.step for point in client.get_metric_history(record.runs["a"].run_id, "val/accuracy")]


def test_points_that_a_killed_driver_had_not_sent_are_sent_by_the_next(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, [1])
    record.runs["a"].flush()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_metrics", lambda *_: None)  # they wait in the outbox when it is killed
        show(record, trial, [2, 3])
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, EPOCHS + 1))  # a trial begins anew
    record.on_trial_complete(0, [], trial)
    assert history(parent, record) == list(range(EPOCHS))


def test_when_the_study_hears_of_an_end_mlflow_has_every_point(tmp_path, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "sweep", {}, {})
    record, trial = driver(tmp_path, parent)
    show(record, trial, range(1, EPOCHS + 1))
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
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
