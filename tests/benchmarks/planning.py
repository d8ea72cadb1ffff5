"""Planning and resuming a million clips: seconds and peak memory of `extract.py --dry-run`.

    python -m tests.benchmarks.planning [--rows 1000000]

Once without a store, once with 99 % of the rows in the index already (parts as the extract job writes them, without
the features themselves).
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import StoreSpec
from features.store.plan import planned_rows, write_plan
from features.store.shards import FAILURE_SCHEMA, FOLDERS, create_store, index_schema
from infra.head import ROOT


@dataclass(frozen=True)
class PlanningConfig:
    """How many."""

    rows: int = 1_000_000
    """clips of the manifest"""


def main() -> int:
    """Measure both, print a table."""
    config = tyro.cli(PlanningConfig, description=__doc__)
    table = Table("dry run", "s", "peak GB", title=f"{config.rows:,} clips")
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), config.rows)
        for name, store in (("fresh", "new"), ("99 % indexed", "old")):
            if store == "old":
                write_store(Path(folder, store), manifest)
            seconds, memory, said = dry_run(manifest, Path(folder, store))
            print(said.strip().splitlines()[2], flush=True)
            table.add_row(name, f"{seconds:.0f}", f"{memory:.2f}")
    Console(width=80).print(table)
    return 0


def write_manifest(folder: Path, rows: int) -> Path:
    """A manifest whose first file exists."""
    (folder / "clips" / "000").mkdir(parents=True)
    (folder / "clips" / "000" / "0000000.mp4").touch()
    splits = np.random.default_rng(0).choice(["train", "val", "test"], rows, p=[0.8, 0.1, 0.1])
    columns = {
        "clip_id": [f"clip-{n:07d}" for n in range(rows)],
        "video": [f"clips/{n % 1000:03d}/{n:07d}.mp4" for n in range(rows)],
        "split": splits,
        "group": [f"g{n}" for n in range(rows)],
        "label": np.random.default_rng(1).choice(list("abcdef"), rows),
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "corpus.parquet")
    return folder / "corpus.parquet"


def write_store(folder: Path, manifest: Path) -> None:
    """A store of which 99 % of the shards have their parts."""
    corpus = read_corpus(str(manifest))
    report = validate(corpus)
    spec = StoreSpec(EncoderSpec(VideoSpec(), AudioSpec()).features(), report.tasks, report.splits, 64, report.digest)
    store = create_store(str(folder), spec)
    write_plan(store, corpus)
    schema = index_schema(spec, pa.schema([corpus.schema.field(label) for label in corpus.labels]))
    names = list(spec.shards())
    for name in names[: int(len(names) * 0.99)]:
        rows = pa.Table.from_batches([planned_rows(store, name)])
        known = {"label_label": rows["label"], "uri_video": rows["video"], "shard": pa.array([name] * len(rows))}
        columns = [
            known[f.name] if f.name in known
            else rows[f.name] if f.name in rows.column_names
            else pa.nulls(len(rows), f.type)
            for f in schema
        ]  # fmt: skip
        pq.write_table(pa.table(columns, schema=schema), folder / "index" / f"{name}.parquet")
        pq.write_table(FAILURE_SCHEMA.empty_table(), folder / "failures" / f"{name}.parquet")
        (folder / "shards" / f"{name}.tar").touch()
    assert all((folder / sub).is_dir() for sub in FOLDERS)


def dry_run(manifest: Path, store: Path) -> tuple[float, float, str]:
    """Seconds, peak memory in GB, and what it said."""
    command = [sys.executable, "pipelines/extract.py", "--corpus", str(manifest), "--store", str(store), "--dry-run"]
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(r)"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - begun, int(done.stderr.split()[-1]) / 1e6, done.stdout


if __name__ == "__main__":
    sys.exit(main())
