"""The demo's exit code is that of what failed."""

import pytest

from infra import demo


@pytest.mark.parametrize("failed", [1, -9])
def test_a_training_that_failed_or_was_killed_fails_the_demo(tmp_path, monkeypatch, failed):
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "submit", lambda head, script, *options, env: failed if "concat" in options else 0)
    assert demo.run_jobs(None) == failed


@pytest.mark.parametrize(
    "shown", ["http://host/#/x", "/bin/mlflow ui --backend-store-uri x\n  then open  http://host/#/x"]
)
def test_the_demo_ends_as_its_sweep_does(tmp_path, shown):
    log = tmp_path / "sweep.log"
    assert demo.comparison(log) == ""
    log.write_text(f"compare the trials: of an earlier start\nsweep 6/6\ncompare the trials: {shown}\nJob succeeded\n")
    assert demo.comparison(log) == f"compare the trials: {shown}"
