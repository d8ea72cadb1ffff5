"""The demo's exit code is that of what failed."""

import pytest

from infra import demo


@pytest.mark.parametrize("failed", [1, -9])
def test_a_training_that_failed_or_was_killed_fails_the_demo(tmp_path, monkeypatch, failed):
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "submit", lambda head, script, *options, env: failed if "concat" in options else 0)
    assert demo.run_jobs(None) == failed
