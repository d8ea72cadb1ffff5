"""Samples per second that reach a training loop, from local disk and from S3 some milliseconds away.

    python -m tests.benchmarks.reading [--clips 512] [--rounds 5] [--milliseconds 0 5 20 50]

By window, at random (each sample read by itself, as without --loader.window; a quarter of them), and webdataset's own
loop over the same shards, one after another, through curl. All three take turns, in one process each without helpers;
the median of all rounds counts. S3 is moto's server on this machine, behind a proxy that holds every request back for
so long: it is slow itself, so the figures say how the three compare, not how fast a store can be. The clips are three
seconds of random frames and sound, 64 to a shard. `waiting` is the share of the time in which a step of --step
milliseconds waits for its batch, read by window.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import boto3
import pyarrow.fs as pafs
import tyro
import webdataset as wds
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]

import s3  # noqa: E402

from features.files import open_fs  # noqa: E402
from features.store import Store  # noqa: E402
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs  # noqa: E402
from tests.benchmarks.training import write_store  # noqa: E402


@dataclass(frozen=True)
class Options:
    """What is measured."""

    clips: int = 1024
    """in the training split"""
    rounds: int = 5
    """of each way of reading, in turns"""
    milliseconds: tuple[float, ...] = (0, 5, 20, 50)
    """from a request to its arrival"""
    window: int = 4
    """shards"""
    batch: int = 32
    """clips per step"""
    step: float = 200
    """milliseconds of a training step, of which the share that waits for data is told"""


def reader(store: Store, options: Options, window: int) -> SplitLoader:
    """Ours, uncached and without reading processes."""
    config = LoaderConfig(cache_gb=0.0, processes=0, window=window)
    return SplitLoader(store, "train", feature_specs(store), task_specs(store), config, batch_size=options.batch)


def plain(urls: list[str], options: Options) -> int:
    """webdataset's loop."""
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    return sum(map(len, dataset.batched(options.batch, collation_fn=None)))


def waiting(loader: SplitLoader, seconds: float) -> float:
    """The share of an epoch's time in which steps of so many seconds wait for their batch; the first does not count."""
    waited, clock, batches = 0.0, time.perf_counter(), iter(loader.batches(0))
    next(batches)
    begun = time.perf_counter()
    while True:
        time.sleep(seconds)
        clock = time.perf_counter()
        if next(batches, None) is None:
            return waited / (clock - begun)
        waited += time.perf_counter() - clock


def measure(store: Store, urls: list[str], options: Options) -> dict[str, float]:
    """Samples per second of each way of reading, and the share of waiting."""
    by_window, at_random = reader(store, options, options.window), reader(store, options, 0)
    epochs = iter(range(10**6))

    def ours(loader: SplitLoader, share: int = 1) -> int:
        """Clips read, of a share of an epoch."""
        batches = islice(loader.batches(next(epochs)), loader.steps // share)
        return sum(sum(map(bool, batch.clip_ids)) for batch in batches)

    ways: dict[str, Callable[[], int]] = {
        "by window": lambda: ours(by_window),
        "at random": lambda: ours(at_random, 4),
        "webdataset": lambda: plain(urls, options),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, read in ways.items():
            started = time.perf_counter()
            count = read()
            speeds[way].append(count / (time.perf_counter() - started))
    return {way: median(found) for way, found in speeds.items()} | {"waiting": waiting(by_window, options.step / 1e3)}


@contextlib.contextmanager
def away(port: int, seconds: float) -> Iterator[tuple[str, str]]:
    """The S3 server so far away: its endpoint and the store's URI, by a proxy in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_proxy, args=(port, seconds, theirs))
    process.start()
    endpoint, uri = ours.recv()
    yield endpoint, uri
    ours.send(None)
    process.join()


def _proxy(port: int, seconds: float, pipe: Connection) -> None:
    with s3.Proxy(port, seconds) as proxy:
        pipe.send((proxy.endpoint, proxy.uri("s3://bucket/store")))
        pipe.recv()


def signed(endpoint: str, key: str) -> str:
    """An address that anybody may read."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    return client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": key}, ExpiresIn=3600)


def main(options: Options) -> None:
    """Measure all places; one table."""
    os.environ |= s3.CREDENTIALS
    names = ("by window", "at random", "webdataset")
    table = Table("store", *(f"{name}, samples/s" for name in names), "window / webdataset", "waiting")

    def add(place: str, found: dict[str, float]) -> None:
        ratio = found["by window"] / found["webdataset"]
        table.add_row(place, *(f"{found[name]:.0f}" for name in names), f"{ratio:.2f}", f"{found['waiting']:.1%}")
        print(place, found, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder, s3.server() as port:
        local = write_store(folder, options.clips)
        shards = sorted(path.name for path in Path(local.uri, "shards").glob("train-*.tar"))
        add("local disk", measure(local, [f"{local.uri}/shards/{name}" for name in shards], options))
        with s3.Proxy(port) as direct:
            fs, _ = open_fs(direct.uri("s3://bucket", allow_bucket_creation="true"))
            fs.create_dir("bucket")
            pafs.copy_files(local.uri, "bucket/store", destination_filesystem=fs)
        for milliseconds in options.milliseconds:
            with away(port, milliseconds / 1e3) as (endpoint, uri):
                urls = [f"pipe:curl -sf '{signed(endpoint, f'store/shards/{name}')}'" for name in shards]
                found = measure(Store(uri), urls, options)
                add(f"S3, {milliseconds:g} ms", found)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
