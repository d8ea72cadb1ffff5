"""MLflow through our one door."""

import json
import multiprocessing
import threading
import time
from contextlib import suppress

import mlflow.data
import pytest
from mlflow.tracking import MlflowClient

from pipelines.common.errors import JobError
from pipelines.tracking.run import Run, abandon_children, children_metrics, start_run
from pipelines.tracking.system_metrics import log_system_metrics

pytestmark = pytest.mark.slow


def open_at_once(barrier, uri, number):
    barrier.wait(60)
    start_run(uri, "new", f"run-{number}", {"seed": number}, {})


def test_jobs_that_start_at_once_share_a_new_sqlite_file(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    jobs = [context.Process(target=open_at_once, args=(barrier, uri, number)) for number in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * 4
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'new'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1", "2", "3"]


def test_children_that_a_killed_job_left_running_are_marked_and_others_left_alone(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent, other = (start_run(uri, "x", name, {}, {}) for name in ("parent", "other"))
    left, ended = (start_run(uri, "x", name, {}, {}, parent.run_id) for name in ("left", "ended"))
    stranger = start_run(uri, "x", "stranger", {}, {}, other.run_id)
    ended.finish()
    abandon_children(parent)
    status = {run.run_id: parent.client.get_run(run.run_id).info.status for run in (parent, left, ended, stranger)}
    assert list(status.values()) == ["RUNNING", "KILLED", "FINISHED", "RUNNING"]


def test_with_a_run_end_the_children_that_nothing_else_ended(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for error, status in ((None, "FINISHED"), (JobError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        parent = start_run(uri, "x", "parent", {}, {})
        dead = start_run(uri, "x", "dead attempt", {}, {"variant": "a"}, parent.run_id)
        dead.log_metrics({"pace": 1.0})
        dead.flush()
        with suppress(JobError, KeyboardInterrupt), parent.ending():
            child = start_run(uri, "x", "child", {}, {"variant": "a"}, parent.run_id)
            with child.ending():
                child.log_metrics({"pace": 2.0})
            assert children_metrics(parent, "variant", "a") == [{"pace": 2.0}]
            if error:
                raise error
        ended = [parent.client.get_run(run.run_id).info.status for run in (parent, dead, child)]
        assert ended == [status, "KILLED", "FINISHED"]


def test_a_run_ends_though_mlflow_refused_its_points(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    with pytest.raises(JobError, match="has not taken the last 1 points"), run.ending():
        run.log_again([("x" * 300, 1.0, 0, 0)])  # as it is: `log_metrics` would spell it so that it is taken
    assert run.client.get_run(run.run_id).info.status == "FAILED"


def test_a_finished_run_whose_driver_was_killed_before_it_said_so_is_ended(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    run.mark_finished()
    ended = run.client.get_run(run.run_id).info
    assert ended.status == "FINISHED"
    run.mark_finished()
    assert run.client.get_run(run.run_id).info.end_time == ended.end_time
    Run(run.uri, "0" * 32).mark_finished()  # of a server that knows it no more


def test_names_that_mlflow_does_not_take_are_spelled_so_that_it_does(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    run.log_metrics({"val/valence (1-9)/mae": 0.5, "val/happy?/accuracy": 0.7, "val/été/accuracy": 0.9})
    run.finish()
    metrics = run.client.get_run(run.run_id).data.metrics
    spelled = {"val/valence _1-9_-6d89ef/mae": 0.5, "val/happy_-7f1002/accuracy": 0.7, "val/été/accuracy": 0.9}
    assert metrics == spelled


def test_a_machine_without_git_tracks_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    assert "git.commit" not in run.client.get_run(run.run_id).data.tags


def test_a_run_names_the_store_that_it_learns_from(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    run.log_input("grid", str(tmp_path), "f" * 64, {"train": 3, "test": 2})
    (given,) = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("grid", "f" * 36)
    assert json.loads(given.dataset.profile) == {"num_rows": 5, "train": 3, "test": 2}
    assert mlflow.data.get_source(given.dataset).uri == str(tmp_path)
    for uri in ("abfs://box@account/grid", "gcs://bucket/grid"):  # of no scheme that MLflow knows
        run.log_input("grid", uri, uri, {"train": 3})
    inputs = run.client.get_run(run.run_id).inputs.dataset_inputs
    sources = {each.dataset.source_type: json.loads(each.dataset.source)["uri"] for each in inputs}
    assert sources == {"local": str(tmp_path), "abfs": "abfs://box@account/grid", "gcs": "gcs://bucket/grid"}


def cpu_points(run):
    return run.client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")


def test_the_machine_is_watched_while_a_block_runs(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {}, {})
    with log_system_metrics(run, interval=0.2):
        while len(cpu_points(run)) < 2:  # the test's timeout ends a watch that says nothing
            time.sleep(0.1)
    assert "machine" not in {thread.name for thread in threading.enumerate()}
    run.finish()
    assert all(0 <= point.value <= 100 for point in cpu_points(run))
    assert "system/system_memory_usage_percentage" in run.client.get_run(run.run_id).data.metrics
