"""A job that is told to end: one line, the signal's exit code, MLflow's run KILLED, and nothing of Ray's on stderr."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_is_told_to_end_says_so_in_one_line(store, tmp_path, number, code):
    out = tmp_path / "a run? 100%"
    options = "--model.width 16 --model.heads 2 --batch-size 4 --epochs 2000 --log-every 1 --cpus-per-worker 1"
    command = [sys.executable, "pipelines/train.py", "--store", store.uri, "--out", str(out), *options.split()]
    with open(tmp_path / "said", "w") as said, open(tmp_path / "log", "w") as log:
        job = subprocess.Popen([*command, "--checkpoint-seconds", "1"], cwd=ROOT, stdout=log, stderr=said)
        deadline = time.monotonic() + 500
        while "steps" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            assert job.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        job.send_signal(number)
        assert job.wait(120) == code
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines == [f"error: stopped by {number.name}; run the same command again to resume"]
    run = json.loads((out / "run.json").read_text())
    assert MlflowClient(run["tracking_uri"]).get_run(run["run_id"]).info.status == "KILLED"
    assert not (out / "_owner.json").exists()
