"""Runs over seeds: one that ended but was not tracked is sent to MLflow by the next start, and not trained again."""

import json

import pytest
from learners import recipe
from mlflow.tracking import MlflowClient
from mlflowserver import Refusing

from pipelines.common.errors import JobError
from pipelines.tracking.run import abandon_children, start_run
from pipelines.training.learner import Learner
from pipelines.training.run_folder import finish
from tuning.runs import VALIDATION, SeedRuns, run_all, train_and_test

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["killed", "its node lost"])
def test_what_mlflow_lacks_of_a_finished_run_is_sent_by_the_next_start(how, store, tmp_path, shared_ray):
    uri, once = f"sqlite:///{tmp_path}/mlflow.db", recipe(epochs=1)
    parent = start_run(uri, "x", "comparison", {}, {})
    runs = SeedRuns(store.uri, str(tmp_path / "runs"), {"given": once}, (0,), "x", parent, 1, 0)
    folder = tmp_path / "runs" / "given-seed0"
    folder.mkdir(parents=True)
    run = start_run(uri, "x", "run", {}, {}, parent.run_id)
    run._client = Refusing(run.client)
    learner = Learner(store.uri, once)
    for epoch in learner.fit():
        run.log_metrics(epoch.metrics, epoch.number)
    about = {"run_id": run.run_id, "tracking_uri": uri, VALIDATION: learner.trainer.best_score}
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(JobError, match="are saved"):
        finish(learner, str(folder), run, *learner.test())
    abandon_children(parent)

    if "lost" in how:  # a task that Ray starts again on another node
        train_and_test._function(runs, "given", 0, "cpu")
    else:
        results = run_all(runs)

    saved = json.loads((folder / "metrics.json").read_text())
    assert "lost" in how or results == {"given": {0: saved}}
    (found,) = MlflowClient(uri).search_runs([parent.experiment_id()], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert found.info.run_id == run.run_id and found.info.status == "FINISHED"
    assert found.data.metrics["test/label/accuracy"] == saved["label"]["accuracy"]
    assert found.data.metrics["val/score"] == learner.trainer.best_score


def test_a_result_that_mlflow_refuses_is_named_with_the_runs_that_failed(store, tmp_path, shared_ray, monkeypatch):
    parent = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "comparison", {}, {})
    runs = SeedRuns(store.uri, str(tmp_path), {"given": recipe()}, (0, 1), "x", parent, 1, 0)
    for seed in runs.seeds:
        (tmp_path / f"given-seed{seed}").mkdir()
        for name in ("metrics.json", "run.json"):
            (tmp_path / f"given-seed{seed}" / name).write_text("{}")
    asked = []

    def refuse(folder, *_):
        asked.append(folder)
        raise JobError("read only")

    monkeypatch.setattr("tuning.runs.track_finished", refuse)
    with pytest.raises(JobError, match="2 of 2 runs failed, the first is given seed 0: read only"):
        run_all(runs)
    assert len(asked) == 2
