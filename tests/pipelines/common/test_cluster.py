"""Ray starts on a slow machine too, and a cluster that is not there is named."""

import pytest
import ray

from pipelines.common.cli import JobError
from pipelines.common.cluster import start_ray


def test_a_node_whose_agent_is_slow_to_start_is_started_again(monkeypatch):
    answers = [Exception("The current node timed out during startup. This could happen because"), "started"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: raise_or_return(answers.pop(0)))
    start_ray(num_cpus=1)
    assert not answers
    answers += [ConnectionError("no cluster there"), "not asked"]
    with pytest.raises(ConnectionError):
        start_ray(address="auto")
    assert answers == ["not asked"]


@pytest.mark.parametrize(
    ("address", "culprit"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 .*unset RAY_ADDRESS"),
        ("head:port", "no Ray cluster answers at RAY_ADDRESS=head:port"),
        ("http://127.0.0.1:8265", "RAY_ADDRESS=http://127.0.0.1:8265 takes `ray job submit`s"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch, address, culprit):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError, match=culprit):
        start_ray()


def raise_or_return(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer
