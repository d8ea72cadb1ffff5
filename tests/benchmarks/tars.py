"""Clips inside tars on S3, and the same corpus once more after it has grown: does the extract job read it all?

    python -m tests.benchmarks.tars [--clips 10000] [--tars 20] [--more 500]

The clips are small real ones, and lie in the tars at random as to split. The S3 server is moto's, on this machine.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pyarrow.fs import FileSystem

from features.files import open_fs
from features.store import Store
from pipelines.extract import ExtractConfig, extract
from tests.helpers.mediafiles import numbered, sine, write_media, write_tar
from tests.helpers.s3 import CREDENTIALS, Proxy, server
from tests.helpers.storefiles import files_of

KINDS = 20  # different clips; the others are their copies


@dataclass(frozen=True)
class TarsConfig:
    """What is measured."""

    clips: int = 10_000
    """in the corpus that is extracted first"""
    tars: int = 20
    """that they lie in, on S3"""
    more: int = 500
    """clips by which the corpus grows, in one more tar"""


def main() -> int:
    """Extract, grow, extract again; exit code 1 where a clip is lost, or an old shard is not the same to the byte."""
    config = tyro.cli(TarsConfig, description=__doc__)
    os.environ |= CREDENTIALS
    with tempfile.TemporaryDirectory() as folder, server() as port, Proxy(port) as proxy:
        fs, _ = open_fs(proxy.uri("s3://bucket", allow_bucket_creation="true"))
        fs.create_dir("bucket")
        kinds = [write_kind(Path(folder, f"{number}.mp4"), number) for number in range(KINDS)]
        rows = upload(fs, Path(folder), kinds, range(config.clips), config.tars, 0)
        first = run(proxy, fs, folder, rows, extend=False)
        before = files_of(Path(folder, "store"))
        rows += upload(fs, Path(folder), kinds, range(config.clips, config.clips + config.more), 1, config.tars)
        second = run(proxy, fs, folder, rows, extend=True)
        after, store = files_of(Path(folder, "store")), Store(f"{folder}/store")
        same = all(after[name] == data for name, data in before.items() if name.startswith(("shards/", "index/")))
        right = sum(kind_of(store, row) == int(row["clip_id"]) % KINDS for row in store.index().to_pylist())
    print(f"{config.clips} clips in {config.tars} tars: {first:.0f} s; {config.more} more: {second:.0f} s")
    print(f"{right} of {len(rows)} clips are the ones that they should be; old shards {'' if same else 'NOT '}the same")
    return int(not (same and right == len(rows)))


def write_kind(path: Path, number: int) -> bytes:
    """A clip of half a second that begins with the frame of its number."""
    return Path(write_media(path, numbered(KINDS + 15)[number : number + 12], sound=sine(440, 0.48))).read_bytes()


def kind_of(store: Store, row: dict[str, object]) -> int:
    """The number of the clip that a row of the store's index holds."""
    frames = store.read(row["shard"], row["offset"], row["nbytes"])["video"]
    return round((float(frames[0].mean()) - 10) / 6) - 1  # of 12 frames a second, the first is shown at .04 s


def upload(
    fs: FileSystem, folder: Path, kinds: Sequence[bytes], clips: Sequence[int], tars: int, number: int
) -> list[dict[str, object]]:
    """Tars of the clips, the first of them of this number, in the bucket; the rows of their manifest."""
    rows = []
    for tar in range(number, number + tars):
        names = {f"clips/{clip}.mp4": kinds[clip % KINDS] for clip in clips[tar - number :: tars]}
        with fs.open_output_stream(f"bucket/shard-{tar:03d}.tar") as stream:
            stream.write(Path(write_tar(folder / "shard.tar", names)).read_bytes())
        rows += [{"clip_id": name[6:-4], "video": f"shard-{tar:03d}.tar#{name}"} for name in names]
    lot = np.random.default_rng(0).permutation(len(rows))
    splits = np.random.default_rng(1).choice(["train", "train", "train", "val", "test"], len(rows))
    return [{**rows[n], "split": str(splits[n]), "label": "ab"[n % 2]} for n in lot]


def run(proxy: Proxy, fs: FileSystem, folder: str, rows: Sequence[dict[str, object]], extend: bool) -> float:
    """One job over a manifest of these rows; its seconds."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    with fs.open_output_stream("bucket/corpus.parquet") as stream:
        stream.write(buffer.getvalue())
    begun = time.monotonic()
    options = {"extend": extend, "max_failed": 0.0}
    config = ExtractConfig(proxy.uri("s3://bucket/corpus.parquet"), f"{folder}/store", **options)
    extract(replace(config, video=replace(config.video, size=16, fps=12)))
    return time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
