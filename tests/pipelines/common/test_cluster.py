"""Ray starts on a slow machine too, and a cluster that is not there is named."""

import json

import pytest
import ray

from infra.doctor import SHORT_FOLDER
from pipelines.common.cluster import forwarded_variables, start_ray
from pipelines.common.errors import JobError

pytestmark = pytest.mark.usefixtures("no_shared_ray")


def test_a_node_whose_agent_is_slow_to_start_is_started_again(monkeypatch):
    answers = [Exception("The current node timed out during startup. This could happen because"), "started"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: raise_or_return(answers.pop(0)))
    start_ray(num_cpus=1)
    assert not answers
    answers += [ConnectionError("no cluster there"), "not asked"]
    with pytest.raises(JobError, match="cannot be joined: no cluster there"):
        start_ray(address="auto")
    assert answers == ["not asked"]


@pytest.mark.parametrize(
    ("address", "culprit"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 .*unset RAY_ADDRESS"),
        ("head:port", "RAY_ADDRESS=head:port: give the head's host:port, such as head:6379"),
        ("head", "RAY_ADDRESS=head: give the head's host:port, such as head:6379"),
        ("ray://head:10001", "jobs do not run through Ray Client; give the head's host:port"),
        ("http://127.0.0.1:8265", "RAY_ADDRESS=http://127.0.0.1:8265 takes `ray job submit`s"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch, address, culprit):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError, match=culprit):
        start_ray()


def test_workers_of_a_joined_cluster_get_what_lets_them_in(monkeypatch):
    given = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_S3_ENDPOINT_URL": "http://s3", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNRELATED", "1")
    found = forwarded_variables("head:6379")
    assert found.items() >= (given | {"RAY_ADDRESS": "head:6379"}).items() and "UNRELATED" not in found
    came = {"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}}}  # with the job: Ray refuses it twice
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(came))
    assert "AWS_SECRET_ACCESS_KEY" not in forwarded_variables("auto") and "RAY_ADDRESS" not in forwarded_variables(
        "auto"
    )


def test_ray_starts_where_the_temporary_folder_is_too_long_for_its_sockets(monkeypatch, tmp_path, capsys):
    """A real one; in a folder of that length it would end in a traceback (AF_UNIX path length)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / ("t" * 60)
    folder.mkdir()
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, str(folder))
    try:
        start_ray(num_cpus=1, log_to_driver=False)
        assert ray._private.worker._global_node.get_session_dir_path().startswith(f"{SHORT_FOLDER}/session_")
        assert ray.get(ray.remote(lambda: 1).remote()) == 1
    finally:
        ray.shutdown()
    said = capsys.readouterr().out
    assert f"note: RAY_TMPDIR={folder} is too long" in said and f"Ray's files go to {SHORT_FOLDER}" in said


def raise_or_return(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer
