"""What further hosts and further clips cost the extract job: the same corpus on 1, 2 and 4 hosts, in turn.

    python -m tests.benchmarks.hosts [--clips 200 800 3200] [--hosts 1 2 4]

The hosts are namespaces of this machine (infra/local_cluster.py) that share four slots for decoding, so more hosts are
no more hardware: what grows with them is overhead; no scaling is measured. Corpus and store lie on the cluster's S3
server. Each is run once. Seconds are from `ray job submit` to its end; the processor's seconds are those of all
processes on the hosts, without the S3 server. Every store of a corpus must be the same to the byte; the exit code is 1
where one is not.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import tyro
from pyarrow import csv
from rich.console import Console
from rich.table import Table

from features.files import open_fs
from infra.head import ROOT
from infra.hosts import require_init
from infra.local_cluster import LocalCluster, down, put, up

SLOTS = 4
DISTINCT = 200  # clips that are made; a longer corpus has each of them more than once


@dataclass(frozen=True)
class Options:
    """What is measured."""

    clips: tuple[int, ...] = (200, 800, 3200)
    """clips of each corpus"""
    hosts: tuple[int, ...] = (1, 2, 4)
    """hosts of each cluster: 1, 2 or 4, which share four slots"""

    def __post_init__(self) -> None:
        if wrong := [hosts for hosts in self.hosts if hosts < 1 or SLOTS % hosts]:
            raise SystemExit(f"--hosts {wrong[0]}: must divide {SLOTS}")


def main(options: Options) -> int:
    """Every corpus on every number of hosts; one table."""
    table = Table("hosts", "clips", "s", "CPU s", "clips per CPU s", "same bytes")
    digests: dict[int, str] = {}
    same = True
    with tempfile.TemporaryDirectory() as folder:
        write_corpora(Path(folder, "corpus"), options.clips)
        for hosts in options.hosts:
            cluster = up(f"{folder}/{hosts}", hosts, SLOTS // hosts, dead_after=60)
            try:
                os.environ |= cluster.client_environment()
                put(cluster, f"{folder}/corpus", "s3://data/corpus")
                extract(cluster, min(options.clips), "first")  # what the first job of a cluster takes is not counted
                for clips in options.clips:
                    seconds, cpu = extract(cluster, clips, "store")
                    found = digest(f"s3://data/store-{clips}")
                    equal = digests.setdefault(clips, found) == found
                    same &= equal
                    row = (hosts, clips, f"{seconds:.1f}", f"{cpu:.1f}", f"{clips / cpu:.1f}", "yes" if equal else "NO")
                    table.add_row(*map(str, row))
                    print(*row, file=sys.stderr, flush=True)
            finally:
                down(cluster.folder)
    Console(width=100).print(table)
    return 0 if same else 1


def write_corpora(folder: Path, sizes: tuple[int, ...]) -> None:
    """Clips, and a manifest of each size over them."""
    made = [sys.executable, "-m", "features.synthetic", "--out", str(folder), "--clips", str(DISTINCT)]
    subprocess.run(made, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = csv.read_csv(folder / "corpus.csv")
    for size in sizes:
        chosen = rows.take([number % len(rows) for number in range(size)])
        ids = pa.array([f"{clip}-{number}" for number, clip in enumerate(chosen["clip_id"].to_pylist())])
        csv.write_csv(chosen.set_column(chosen.column_names.index("clip_id"), "clip_id", ids), folder / f"{size}.csv")


def extract(cluster: LocalCluster, clips: int, name: str) -> tuple[float, float]:
    """Extract a corpus as a user would; seconds of the clock, and of the hosts' processors."""
    store = f"s3://data/{name}-{clips}"
    job = ["python", "pipelines/extract.py", "--corpus", f"s3://data/corpus/{clips}.csv", "--store", store]
    command = cluster.submit_command(*job, "--video.size", "32")
    before, begun = used(cluster), time.monotonic()
    subprocess.run(command, env=cluster.environment(), stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - begun, used(cluster) - before


def used(cluster: LocalCluster) -> float:
    """Seconds of the processor that the hosts' processes have used, with those of their children that ended."""
    total = 0.0
    for host in cluster.hosts:
        init = psutil.Process(require_init(cluster.folder, host))
        for process in (init, *init.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
    return total


def digest(store: str) -> str:
    """One hash over the names and bytes of a store's files."""
    fs, path = open_fs(store)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    found = hashlib.sha256()
    for info in sorted((info for info in infos if info.is_file), key=lambda info: info.path):
        with fs.open_input_stream(info.path) as stream:
            found.update(info.path.removeprefix(path).encode() + hashlib.sha256(stream.read()).digest())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
