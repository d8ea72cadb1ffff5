"""Whoever is killed, wherever: the same command again ends in the same bytes as a run that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from mediafiles import write_manifest
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from storefiles import files_of

from features.store import Store
from features.store.verify import verify
from pipelines.common.cluster import retry_start

ROOT = Path(__file__).parents[2]
ROWS = 24
OPTIONS = ["--shard-rows", "3", "--video.size", "16", "--max-failed", "0.5"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manifest(media):
    """24 clips: 12 train, 6 val, 6 test; one file is missing."""
    rows = [
        {
            "clip_id": f"clip-{n}",
            "video": "missing.mp4" if n == 7 else "good.mp4",
            "split": ("train", "train", "val", "test")[n % 4],
            "label": "odd" if n % 2 else "even",
        }
        for n in range(ROWS)
    ]
    return write_manifest(media / "faults.csv", rows)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU; the drivers that the tests start join it."""
    cluster = retry_start(Cluster, initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(cluster, manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert extract(cluster, folder, manifest, []).returncode == 0
    assert len(list((folder / "store" / "index").glob("*.parquet"))) == 8
    problems = []
    assert verify(Store(str(folder / "store")), problems.append).problems == 0, problems
    return files_of(folder / "store")


def extract(cluster, folder, manifest, faults, *options):
    """One run of the job in the cluster; faults as in tests/helpers/faults.py."""
    (folder / "faults").mkdir(exist_ok=True)
    plan = folder / "faults" / "faults.json"
    plan.write_text(json.dumps(faults))
    command = [
        sys.executable,
        ROOT / "tests/helpers/faults.py",
        plan,
        "--corpus",
        manifest,
        "--store",
        folder / "store",
    ]
    env = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *OPTIONS, *options], env=env, capture_output=True, text=True, timeout=300)


def struck(folder):
    """The faults that struck, in order, with the shards committed by then."""
    return [json.loads(line) for line in (folder / "faults" / "struck").read_text().splitlines()]


def test_a_driver_killed_at_every_point_in_turn(cluster, manifest, undisturbed, tmp_path):
    faults = [
        {"point": point, "victim": "driver", "nth": nth}
        for point, nth in [("mid-tar", 2), ("tar", 5), ("failures", 7), ("index", 6), ("lock", 1)]
    ]
    runs = 0
    while extract(cluster, tmp_path, manifest, faults).returncode:
        runs += 1
        assert runs <= len(faults)
    points = [fault["point"] for fault in struck(tmp_path)]  # two tasks may reach two of them in one run
    assert sorted(points) == sorted(fault["point"] for fault in faults) and points[-1] == "lock"
    assert 2 <= runs <= len(faults)
    assert files_of(tmp_path / "store") == undisturbed


def test_workers_killed_at_every_point_cost_no_run(cluster, manifest, undisturbed, tmp_path):
    faults = [
        {"point": point, "victim": "worker", "nth": nth}
        for point, nth in [("mid-tar", 2), ("tar", 4), ("failures", 5), ("index", 6)]
    ]
    done = extract(cluster, tmp_path, manifest, faults)
    assert done.returncode == 0, done.stderr
    assert {fault["point"] for fault in struck(tmp_path)} == {"mid-tar", "tar", "failures", "index"}
    assert "24 rows = 23 indexed + 1 failed" in done.stdout
    assert files_of(tmp_path / "store") == undisturbed


def test_a_node_killed_in_the_middle_costs_no_run(cluster, manifest, undisturbed, tmp_path):
    node = retry_start(cluster.add_node, num_cpus=1)
    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    done = extract(cluster, tmp_path, manifest, [{"point": "tar", "victim": raylet, "nth": 3}])
    assert done.returncode == 0, done.stderr
    assert len(struck(tmp_path)) == 1 and "24 rows = 23 indexed + 1 failed" in done.stdout
    assert files_of(tmp_path / "store") == undisturbed
