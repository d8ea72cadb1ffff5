"""Random kills of the extract job until it is done, again and again: is the store always the undisturbed one?

    python -m tests.benchmarks.chaos [--kills 20] [--seed 0]

Each round extracts a corpus of real clips into a new store on a cluster of two nodes, kills the driver, a worker or a
node, in turn, at a random pass of each point in turn (tests/helpers/faults.py), gives the same command again until it
ends well, and compares every file with an undisturbed store's.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import tyro
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from pipelines.common.cluster import retry_start
from tests.helpers.storefiles import files_of

ROOT = Path(__file__).parents[2]
POINTS = ("mid-tar", "tar", "failures", "index")
VICTIMS = ("driver", "worker", "node")
CLIPS, SHARD_ROWS = 120, 4


@dataclass(frozen=True)
class ChaosConfig:
    """How often."""

    kills: int = 20
    """rounds, each with one kill"""
    seed: int = 0
    """of the points, the victims and the moments"""


def main() -> int:
    """Every point and victim in turn, moments at random; prints a table; exit code 1 where a store differs."""
    config = tyro.cli(ChaosConfig, description=__doc__)
    rng = random.Random(config.seed)
    table = Table("kill", "point", "victim", "rows committed", "runs", "same bytes")
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder))
        cluster = retry_start(Cluster, initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            extract(cluster, Path(folder, "undisturbed"), corpus, [])
            wanted = files_of(Path(folder, "undisturbed", "store"))
            shards = sum(name.startswith("index/") for name in wanted)
            for number in range(config.kills):
                point, victim = POINTS[number % 4], VICTIMS[number // 4 % 3]
                home = Path(folder, f"{number}")
                runs = disturbed(cluster, home, corpus, point, victim, rng.randint(2, shards - 1))
                struck = json.loads((home / "faults" / "struck").read_text().splitlines()[0])
                equal = files_of(home / "store") == wanted
                same += equal
                share = f"{struck['committed'] / shards:.0%}"
                table.add_row(str(number), point, victim, share, str(runs), "yes" if equal else "NO")
                print(f"kill {number}: {point}, {victim}, {share} committed, {runs} runs", flush=True)
        finally:
            ray.shutdown()
            cluster.shutdown()
    Console(width=100).print(table)
    print(f"{same} of {config.kills} stores equal the undisturbed one")
    return 0 if same == config.kills else 1


def disturbed(cluster: Cluster, home: Path, corpus: Path, point: str, victim: str, nth: int) -> int:
    """Kill once, give the command until it ends well; returns how many runs that took."""
    fault = {"point": point, "victim": victim, "nth": nth}
    node = retry_start(cluster.add_node, num_cpus=1)
    if victim == "node":
        fault["victim"] = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    runs = 1
    while extract(cluster, home, corpus, [fault]):
        runs += 1
        if runs > 3:
            raise RuntimeError(f"{home}: the job does not end")
    if victim != "node":
        cluster.remove_node(node)
    return runs


def extract(cluster: Cluster, home: Path, corpus: Path, faults: Sequence[Mapping[str, object]]) -> int:
    """One run with its faults; its exit code."""
    (home / "faults").mkdir(parents=True, exist_ok=True)
    (home / "faults" / "faults.json").write_text(json.dumps(list(faults)))
    command = [sys.executable, ROOT / "tests/helpers/faults.py", home / "faults" / "faults.json", "--corpus", corpus]
    command += ["--store", home / "store", "--shard-rows", str(SHARD_ROWS), "--video.size", "32"]
    env = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
    return subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def write_corpus(folder: Path) -> Path:
    """Real mp4 files."""
    command = [sys.executable, "-m", "features.synthetic", "--out", str(folder / "corpus"), "--clips", str(CLIPS)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "corpus" / "corpus.csv"


if __name__ == "__main__":
    sys.exit(main())
