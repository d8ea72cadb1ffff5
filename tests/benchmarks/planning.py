"""Millions of clips before the first one is decoded, or learned from: seconds and peak memory of each step.

    python -m tests.benchmarks.planning [--rows 10000000] [--shard-rows 64] [--folder KEPT]

The extract job's dry run without a store, writing the plan, the dry run with 99 % of the rows in the index, what the
train job checks, and one worker's start up to its first batch. The index has parts as the extract job writes them;
features are left out (the worker is given the same one for every clip). On a machine with other work the seconds of the
processor, of all threads, say more than those of the clock.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from features.corpus.manifest import SPLITS
from features.store import Store
from features.store.plan import planned_rows
from features.store.shards import FAILURE_SCHEMA, index_schema
from infra.head import ROOT

STEPS = {
    "extract --dry-run, no store": """
from pipelines.extract import ExtractConfig, extract
extract(ExtractConfig(f"{folder}/corpus.parquet", f"{folder}/new", dry_run=True))""",
    "extract: write the plan": """
from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import StoreSpec
from features.store.plan import write_plan
from features.store.shards import create_store
from features.store.spec import default_shard_rows
from features.decode.specs import DECODING
corpus = read_corpus(f"{folder}/corpus.parquet")
report = validate(corpus)
features = EncoderSpec(VideoSpec(), AudioSpec()).features()
rows = shard_rows or default_shard_rows(sum(report.splits.values()))
spec = StoreSpec(features, report.tasks, report.splits, rows, report.digest, decoding=DECODING)
store, begun = create_store(f"{folder}/store", spec), time.monotonic()
write_plan(store, corpus)""",
    "extract --dry-run, 99 % indexed": """
from pipelines.extract import ExtractConfig, extract
extract(ExtractConfig(f"{folder}/corpus.parquet", f"{folder}/store", dry_run=True))""",
    "train: check the store (reads the index)": """
from pipelines.training.learner import Recipe
from pipelines.training.inputs import check
check(f"{folder}/store", Recipe())""",
    "train: check it again": """
from pipelines.training.learner import Recipe
from pipelines.training.inputs import check
check(f"{folder}/store", Recipe())""",
    "train: one worker's start": """
import numpy as np
from features.store import Store
from pipelines.training.learner import Learner, Recipe

class Hollow(Store):
    def read(self, shard, offset, nbytes):
        found = {name: np.zeros((4, *f.shape), f.dtype) for name, f in self.spec.features.items()}
        return found | {"json": {"clip_id": f"clip-{offset:08d}"}}

learner = Learner(Hollow(f"{folder}/store"), Recipe())
print(next(learner.train.batches(0)).clip_ids[:2])""",
}
# In a process of its own: the peak of a process is at least what its parent had when it was forked.
TIMED = """
import json, resource, sys, time
begun, folder, shard_rows = time.monotonic(), sys.argv[1], int(sys.argv[2])
sys.argv[1:] = []
{}
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([time.monotonic() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6]))
"""


@dataclass(frozen=True)
class PlanningConfig:
    """How many."""

    rows: int = 1_000_000
    """clips of the manifest"""
    folder: str = ""
    """where the manifest and the store are kept, and taken from if they are there; none = a temporary folder"""
    shard_rows: int = 0
    """clips per shard; 0 = what the extract job takes where nobody says"""
    only: str = ""
    """measure the steps whose names begin so"""


def main() -> int:
    """Measure each step, print a table."""
    config = tyro.cli(PlanningConfig, description=__doc__)
    table = Table("step", "s", "CPU s", "peak GB", title=f"{config.rows:,} clips")
    with contextlib.ExitStack() as kept:
        folder = Path(config.folder or kept.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "corpus.parquet").exists():
            write_manifest(folder, config.rows)
        for step, code in STEPS.items():
            if not step.startswith(config.only):
                continue
            if step.startswith("extract --dry-run, 99"):
                write_parts(folder / "store", leave=100)
            elif step.startswith("train: check the"):
                write_parts(folder / "store", leave=0)
            seconds, processor, memory = measure(code, folder, config.shard_rows)
            table.add_row(step, f"{seconds:.1f}", f"{processor:.1f}", f"{memory:.2f}")
            print(f"{step}: {seconds:.1f} s, CPU {processor:.1f} s, {memory:.2f} GB", file=sys.stderr, flush=True)
    Console(width=80).print(table)
    return 0


def measure(code: str, folder: Path, shard_rows: int) -> tuple[float, float, float]:
    """Seconds from the start of a process or from where it says so; its processor's seconds, and its peak GB."""
    shell = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    command = [sys.executable, "-c", shell, "-c", TIMED.format(code), str(folder), str(shard_rows)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds, processor, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor, memory


def write_manifest(folder: Path, rows: int, at_once: int = 500_000) -> None:
    """A manifest whose first file exists."""
    (folder / "clips" / "000").mkdir(parents=True)
    (folder / "clips" / "000" / "00000000.mp4").touch()
    names = ["clip_id", "video", "split", "group", "label"]
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(folder / "corpus.parquet", schema) as file:
        for first in range(0, rows, at_once):
            rng = np.random.default_rng(first)
            numbers = np.arange(first, min(first + at_once, rows))
            eight = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
            last = pc.utf8_slice_codeunits(eight, 5)
            columns = [
                pc.binary_join_element_wise("clip", eight, "-"),
                pc.binary_join_element_wise("clips/", last, "/", eight, ".mp4", ""),
                pa.array(rng.choice(SPLITS, len(numbers), p=[0.8, 0.1, 0.1])),
                pc.binary_join_element_wise("g", eight, ""),
                pa.array(rng.choice(list("abcdef"), len(numbers))),
            ]
            file.write_table(pa.table(columns, schema=schema))


def write_parts(folder: Path, leave: int) -> None:
    """Index and failures parts of a planned store, as if its shards were extracted.

    leave: of so many shards each one is left out, 0 = none. A clip's number is its offset.
    """
    store = Store(str(folder))
    labels = pa.schema([(task.name, pa.string()) for task in store.spec.tasks])
    schema, none = index_schema(store.spec, labels), pa.BufferOutputStream()
    pq.write_table(FAILURE_SCHEMA.empty_table(), none)
    committed = store.committed()
    for number, name in enumerate(store.spec.shards()):
        if name in committed or (leave and number % leave == 0):
            continue
        table = pa.Table.from_batches([planned_rows(store, name)])
        pq.write_table(indexed(table, name, schema), folder / "index" / f"{name}.parquet")
        (folder / "failures" / f"{name}.parquet").write_bytes(none.getvalue())


def indexed(rows: pa.Table, shard: str, schema: pa.Schema) -> pa.Table:
    """The index part of a shard's planned rows."""
    count = len(rows)
    known = {
        "label_label": rows["label"],
        "uri_video": rows["video"],
        "shard": pa.array([shard] * count),
        "offset": pc.utf8_slice_codeunits(rows["clip_id"], 5).cast(pa.int64()),
        "nbytes": pa.array([1] * count),
        "duration": pa.array([3.0] * count),
    } | {name: pa.array([4] * count, pa.int32()) for name in schema.names if name.startswith("tokens_")}
    columns = [
        known[f.name] if f.name in known
        else rows[f.name] if f.name in rows.column_names
        else pa.nulls(count, f.type)
        for f in schema
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


if __name__ == "__main__":
    sys.exit(main())
