"""The Python interface as people meet it: its pages can be made, and the tour runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "v1"


def test_the_pages_of_the_interface_are_made(tmp_path):
    command = [sys.executable, "-m", "pdoc", "--output-directory", str(tmp_path), "--docformat", "google"]
    done = subprocess.run([*command, "clcr", "features.store"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for page, name in {"clcr.html": "MultimodalModel", "features/store.html": "Store"}.items():
        assert name in (tmp_path / page).read_text()


def test_the_tour_runs_on_a_store_and_a_run(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store").symlink_to(GOLDEN / "store")
    (tmp_path / "out" / "clcr").symlink_to(GOLDEN / "run")
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(ROOT / "pipelines" / "tour.py")]
    environment = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "label reads the levels" in done.stdout
    assert all((tmp_path / "out" / f"tour-{name}.png").stat().st_size > 5000 for name in ("clips", "exchange"))
