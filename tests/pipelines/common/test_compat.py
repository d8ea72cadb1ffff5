"""Private parts of Ray, tyro and Python that we use: each test fails when the library changes what it tests."""

import atexit
import inspect
import logging
import os
from dataclasses import dataclass

import pytest
import tyro
from ray.train.torch import TorchTrainer

from pipelines.common import compat

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def test_python_runs_what_was_registered_for_its_exit():
    said = []
    atexit.register(said.append, "end")
    try:
        assert callable(atexit._run_exitfuncs)
    finally:
        atexit.unregister(said.append)


def test_ray_train_logs_reports_where_it_is_silenced():
    import ray.train.v2._internal.execution.context as context

    assert "logging.getLogger(__file__)" in inspect.getsource(context)
    compat.silence_train_reports()
    assert logging.getLogger(context.__file__).level == logging.WARNING


def test_ray_train_takes_no_signal_and_starts_no_process_of_no_use_while_the_block_runs(monkeypatch):
    trainer = TorchTrainer(print)
    register, create = TorchTrainer._register_sigint_handler, TorchTrainer._create_default_callbacks
    assert "signal.signal(signal.SIGINT" in inspect.getsource(register)
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert {"DatasetsCallback", "PlacementGroupCleanerCallback"} <= names
    monkeypatch.delenv(WATCHER, raising=False)
    with compat.plain_train_driver(own_cluster=False):
        assert WATCHER not in os.environ
    with compat.plain_train_driver(own_cluster=True):
        assert os.environ[WATCHER] == "0"
        assert trainer._register_sigint_handler(None) is None
        inside = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
        assert inside == names - {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    with compat.plain_train_driver(own_cluster=False):
        inside = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
        assert inside == names - {"DatasetsCallback"}
    assert TorchTrainer._register_sigint_handler is register and TorchTrainer._create_default_callbacks is create


@pytest.mark.slow
def test_a_cluster_says_why_it_refuses():
    from infra.head import local_head

    with local_head(cpus=1) as head, pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        assert "it wants a token and there is none here" in compat.cluster_refuses(head.address)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        assert "its token is not the one here" in compat.cluster_refuses(head.address)
        patch.setenv("RAY_AUTH_TOKEN", head.env["RAY_AUTH_TOKEN"])
        assert compat.cluster_refuses(head.address) == ""
        dashboard = head.dashboard.removeprefix("http://")
        assert "is no Ray head" in compat.cluster_refuses(dashboard)


def help_of_two_lines(capsys):
    @dataclass
    class Options:
        """Options."""

        length: int = 1
        """of a list that is described in
        two lines"""

    with pytest.raises(SystemExit):
        tyro.cli(Options, args=["--help"])
    return capsys.readouterr().out


def test_help_joins_the_lines_of_a_docstring(capsys):
    assert "described in two lines" not in help_of_two_lines(capsys), "tyro does it by itself: remove joined_docstrings"
    with compat.joined_docstrings():
        assert "described in two lines" in help_of_two_lines(capsys)
