"""Names and addresses that MLflow takes, and which of its errors are worth waiting for."""

import time

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from pipelines.common.errors import JobError
from pipelines.tracking.names import file_name, metric_key
from pipelines.tracking.outbox import is_outage
from pipelines.tracking.places import artifacts_beside, experiment_name, sqlite_path, sqlite_uri, tracking_uri
from pipelines.tracking.run import RunGoneError, resume_run, start_run

TASKS = ["map@1", "map#1", "map_1", "a/../b", "a//b", "..", ".", "", "x" * 260, "x" * 261, "été", "Ñ?", "/", "a b:c"]


@pytest.mark.parametrize("shape", ["val/{}/accuracy", "train/loss_{}", "test/{}/acc2_non0"])
def test_every_label_has_a_name_that_mlflow_takes_and_no_two_have_one(shape):
    names = [metric_key(shape.format(task)) for task in TASKS]
    for name in names:
        _validate_metric_name(name)
        assert len(name) <= 250
    assert len(set(names)) == len(TASKS)
    assert metric_key("val/mood/accuracy") == "val/mood/accuracy"


def test_every_label_has_a_file_of_its_own():
    names = [file_name(task) for task in TASKS]
    assert len(set(names)) == len(TASKS) and all("/" not in name and 0 < len(name) < 120 for name in names)


def test_mlflow_keeps_two_labels_apart(tmp_path):
    run = start_run(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", {"tasks": "t" * 9000}, {})
    run.log_metrics({f"val/{task}/accuracy": number for number, task in enumerate(TASKS)})
    run.flush()
    found = run.client.get_run(run.run_id).data
    assert sorted(found.metrics.values()) == list(range(len(TASKS))) and len(found.params["tasks"]) == 6000


def wrapped(inner):
    """As MLflow wraps what requests raised."""
    try:
        try:
            raise inner
        except Exception as error:
            raise MlflowException(f"API request failed with exception {error}")  # noqa: B904
    except MlflowException as error:
        return error


def answered(status):
    error = requests.HTTPError("no")
    error.response = requests.Response()
    error.response.status_code = status
    return error


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (wrapped(requests.ConnectionError("refused")), True),
        (wrapped(requests.Timeout("slow")), True),
        (wrapped(requests.exceptions.RetryError("too many 503")), True),
        (ConnectionRefusedError("refused"), True),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}), True),
        (MlflowException("API request to endpoint /x failed with error code 502 != 200. Response body: ''"), True),
        (answered(503), True),
        (answered(401), False),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), False),
        (MlflowException("API request to endpoint /x failed with error code 404 != 200. Response body: ''"), False),
        (MlflowException("no credentials"), False),
        (OSError(36, "File name too long"), False),
        (ValueError("default auth: cannot configure default credentials"), False),
        (wrapped(RuntimeError("a bug")), False),
    ],
)
def test_only_a_server_that_is_away_is_waited_for(error, away):
    assert is_outage(error) == away


def test_databricks_without_credentials_is_said_at_once(monkeypatch, tmp_path):
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = time.monotonic()
    with pytest.raises(JobError, match="MLflow at databricks"):
        start_run("databricks", "x", "run", {}, {})
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("folder", ["100%", "a?b", "a#b", "a b", "%41%2F", "plain"])
def test_an_embedded_file_lies_beside_the_runs_whatever_their_folder_is_called(tmp_path, monkeypatch, folder):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / folder).mkdir()
    uri = tracking_uri(str(tmp_path / folder / "run"))
    assert sqlite_path(uri) == str(tmp_path / folder / "mlflow.db")
    run = start_run(uri, "x/y", "run", {}, {})
    run.log_text("hello", "a.txt")
    assert {path.name for path in (tmp_path / folder).iterdir()} >= {"mlflow.db", "mlartifacts"}
    assert {path.name for path in tmp_path.iterdir()} == {folder}
    assert [file.path for file in MlflowClient(uri).list_artifacts(run.run_id)] == ["a.txt"]


def test_a_relative_file_is_made_absolute_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert tracking_uri("s3://bucket/run") == sqlite_uri(f"{tmp_path}/mlflow.db")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(JobError, match=r"MLFLOW_TRACKING_URI mlflow\.db: a submitted job"):
        tracking_uri("s3://bucket/run")
    assert artifacts_beside("http://server", "x") is None


def test_the_experiment_of_the_environment_is_honoured_and_the_option_wins(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    assert experiment_name("clcr") == "ours" and experiment_name("mine") == "mine"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert experiment_name("clcr") == "clcr"


def test_an_experiment_that_cannot_be_made_says_why(tmp_path):
    with pytest.raises(JobError, match=r"MLflow at sqlite.*"):
        start_run(f"sqlite:///{tmp_path}/mlflow.db", "", "run", {}, {})


def test_a_run_that_was_deleted_or_whose_file_is_gone_is_told_from_a_refusal(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = start_run(uri, "x", "run", {}, {})
    assert resume_run(uri, run.run_id).run_id == run.run_id
    run.client.delete_run(run.run_id)
    with pytest.raises(RunGoneError, match="was deleted"):
        resume_run(uri, run.run_id)
    with pytest.raises(RunGoneError, match="does not know run"):
        resume_run(f"sqlite:///{tmp_path}/new.db", run.run_id)
