"""What broken clips and a misbehaving decoder cost a whole extract job: themselves, and no other clip.

    python -m tests.benchmarks.damage [--copies 300] [--corpus corpus.csv]

First the corpus's clips among damaged copies of them (cut short, bits flipped, header broken); then the clips alone,
undisturbed and with a decoder that aborts on one of them, never ends on a second and eats memory on a third.
"""

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import tyro
from pyarrow import csv

import features.extractor
from features.decode.isolation import IsolatedEncoder
from features.decode.specs import EncoderSpec
from features.store import Store
from pipelines.common.cluster import retry_start
from pipelines.extract import ExtractConfig, extract
from tests.benchmarks.chaos import write_corpus
from tests.benchmarks.extraction import first_rows
from tests.helpers.mediafiles import damage
from tests.helpers.misbehaving import Misbehaving


@dataclass(frozen=True)
class DamageConfig:
    """What is measured."""

    corpus: str = ""
    """manifest of whole clips; none given: synthetic ones"""
    clips: int = 100
    """how many of them"""
    copies: int = 300
    """damaged copies among them"""
    timeout: float = 10.0
    """seconds that one clip may take"""
    seed: int = 0
    """of the damage"""


def main() -> int:
    """Run the jobs, print what they cost; exit code 1 where another clip than the damaged was hurt."""
    config = tyro.cli(DamageConfig, description=__doc__)
    retry_start(ray.init, address="local", include_dashboard=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(first_rows(config.corpus or str(write_corpus(Path(folder))), config.clips, Path(folder)))
        damaged = add_damaged(whole, config.copies, config.seed)
        lost = run(config, damaged, f"{folder}/damaged")[0]
        among = sum(name.startswith("damaged-") for name in lost)
        print(
            f"-> {among} of {config.copies} damaged copies failed, {len(lost) - among} of {config.clips} whole clips\n"
        )
        none, undisturbed = run(config, whole, f"{folder}/undisturbed")
        victims = dict(
            zip(csv.read_csv(whole)["clip_id"].to_pylist()[10::30], ("aborts", "spins", "eats"), strict=False)
        )
        inject(victims)
        hurt, seconds = run(config, whole, f"{folder}/injected")
        print(f"-> failed: {', '.join(f'{victims.get(name)} {name}: {error}' for name, error in sorted(hurt.items()))}")
        print(f"-> {seconds - undisturbed:.1f} s lost; one timeout is {config.timeout:g} s")
    return int(bool(len(lost) - among or none or hurt.keys() != victims.keys()))


def run(config: DamageConfig, corpus: Path, store: str) -> tuple[dict[str, str], float]:
    """One job: its failed clips with their classes, and its seconds."""
    begun = time.monotonic()
    extract(ExtractConfig(str(corpus), store, timeout=config.timeout, memory_gb=1, max_failed=1, shard_rows=16))
    seconds = time.monotonic() - begun
    return {row["clip_id"]: row["error"] for row in Store(store).failures().to_pylist()}, seconds


def add_damaged(manifest: Path, copies: int, seed: int) -> Path:
    """The manifest with damaged copies of its clips added, which lie next to it."""
    table, generator = csv.read_csv(manifest), np.random.default_rng(seed)
    rows = []
    for number in range(copies):
        row = table.slice(number % len(table), 1).to_pylist()[0]
        broken = manifest.with_name(f"damaged-{number}{Path(row['video']).suffix}")
        broken.write_bytes(damage(Path(row["video"]).read_bytes(), generator))
        rows.append({**row, "clip_id": broken.stem, "video": str(broken)})
    path = manifest.with_name("damaged.csv")
    csv.write_csv(pa.concat_tables([table, pa.Table.from_pylist(rows, schema=table.schema)]), path)
    return path


def inject(victims: Mapping[str, str]) -> None:
    """Let the decoder of every later job do to the victims (clip_id: how) what broken media do."""
    features.extractor.isolated_encoder = InjectedEncoder(Misbehaving(victims))
    # Workers get this module's functions as they stand here, not as their files say.
    ray.cloudpickle.register_pickle_by_value(features.extractor)


@dataclass
class InjectedEncoder:
    """Stands for features.extractor.isolated_encoder: one child for each process."""

    encode_clip: Misbehaving
    encoder: IsolatedEncoder | None = None

    def __call__(self, spec: EncoderSpec, timeout: float, memory_gb: float) -> IsolatedEncoder:
        self.encoder = self.encoder or IsolatedEncoder(spec, timeout, memory_gb, self.encode_clip)
        return self.encoder


if __name__ == "__main__":
    sys.exit(main())
