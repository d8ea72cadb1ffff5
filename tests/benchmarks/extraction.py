"""The extract job against what a user would write instead, on the same clips.

    python -m tests.benchmarks.extraction --corpus corpus.csv [--options="--video.size 32"]

Whole processes by the clock, in turns, best of `--repeats`; the job joins a cluster that runs already. Compared with
it: a multiprocessing.Pool over the same decode, encode and tar code, one process per core, without isolation, index or
Ray; with `--ffmpeg`, one ffmpeg process per clip that scales frames and resamples sound, as video2dataset does it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from unittest import mock

import psutil
import pyarrow as pa
import tyro
from pyarrow import csv
from rich.console import Console
from rich.table import Table

from infra.head import ROOT, Head, local_head

POOL = """
import sys
from multiprocessing import Pool
import torch, webdataset
from features.corpus.manifest import Clip, read_corpus
from features.corpus.validation import validate
from features.decode.clip import encode_clip
from features.store.samples import pack

def shard(job):
    torch.set_num_threads(1)
    name, rows = job
    with open(f"{sys.argv[3]}/{name}.tar", "wb") as tar:
        for row in rows:
            clip = Clip.from_row(row, corpus.labels)
            tar.write(pack(clip, encode_clip(clip, clip.media(corpus.folder), encoder)).payload)

corpus = read_corpus(sys.argv[1])
from tests.benchmarks.extraction import encoder_of, planned
encoder = encoder_of(sys.argv[2], corpus)
with Pool(int(sys.argv[4])) as pool:
    for _ in pool.imap_unordered(shard, planned(corpus, sys.argv[2])):
        pass
"""


@dataclass(frozen=True)
class ExtractionConfig:
    """What is measured."""

    corpus: str = str(ROOT.parent / "shared" / "data" / "grid" / "corpus.csv")
    """manifest of the clips"""
    options: str = "--video.size 32"
    """options of pipelines/extract.py"""
    repeats: int = 3
    """runs of each; the fastest counts"""
    times: int = 4
    """a longer corpus, of each clip so often, tells the rate from the time to start"""
    ffmpeg: str = ""
    """an ffmpeg program, for the comparison with one process per clip"""


def main() -> int:
    """Measure, print one table."""
    config = tyro.cli(ExtractionConfig, description=__doc__)
    rows, cores = count_rows(config.corpus), os.cpu_count()
    table = Table("", "s", "clips/s", "job's speed / its speed", title=f"{rows} clips, {cores} cores, {config.options}")
    with tempfile.TemporaryDirectory() as folder, local_head() as head:

        def job(corpus: str, *more: str) -> list[str]:
            return job_command(corpus, folder, config.options, *more)

        quarter = first_rows(config.corpus, rows // 4, Path(folder))
        commands = {
            "ours": job(config.corpus),
            "pool": pool_command(config, folder, cores),
            "one": job(config.corpus, "--concurrency", "1"),
            "quarter": job(quarter),
        }
        found = best(config.repeats, {name: partial(timed, given, folder, head) for name, given in commands.items()})
        (ours, memory), (pool, _), (one, _), (_, small) = found.values()
        longer = repeated(config.corpus, config.times, Path(folder))
        ours_longer, memory_longer = timed(job(longer), folder, head)
        pool_longer, _ = timed(pool_command(replace(config, corpus=longer), folder, cores), folder, head)
        lines = [("the job", ours), (f"multiprocessing.Pool({cores})", pool), ("the job on one core", one)]
        if config.ffmpeg:
            per_clip = ffmpeg_seconds(config, folder, cores)
            lines.append(("one ffmpeg process per clip", per_clip))
    for name, seconds in lines:
        table.add_row(name, f"{seconds:.1f}", f"{rows / seconds:.1f}", f"{seconds / ours:.2f}")
    Console(width=120).print(table)
    ours_rate, pool_rate = (rows * (config.times - 1) / s for s in (ours_longer - ours, pool_longer - pool))
    print(f"{rows * config.times} clips: {ours_longer:.1f} s, the pool {pool_longer:.1f} s, "
          f"{pool_longer / ours_longer:.2f}; each further clip: {ours_rate:.1f} compared with {pool_rate:.1f} clips/s, "
          f"{ours_rate / pool_rate:.2f}")  # fmt: skip
    print(f"peak memory of the decoding processes: {small:.2f} GB at {rows // 4} clips, {memory:.2f} GB at {rows}, "
          f"{memory_longer:.2f} GB at {rows * config.times}")  # fmt: skip
    print_stages(config)
    return 0


def job_command(corpus: str, folder: str, options: str, *more: str) -> list[str]:
    """The extract job as a user runs it."""
    return [sys.executable, "pipelines/extract.py", "--corpus", corpus, "--store", f"{folder}/out/store",
            *shlex.split(options), *more]  # fmt: skip


def pool_command(config: ExtractionConfig, folder: str, cores: int) -> list[str]:
    """The same without isolation, index and Ray."""
    return [sys.executable, "-c", POOL, config.corpus, config.options, f"{folder}/out", str(cores)]


def timed(command: list[str], folder: str, head: Head) -> tuple[float, float]:
    """Seconds of a command that writes to FOLDER/out, and the peak memory (GB) of the processes that decode."""
    shutil.rmtree(f"{folder}/out", ignore_errors=True)
    os.makedirs(f"{folder}/out")
    env = {**head.env, "RAY_ADDRESS": head.address, "PYTHONPATH": "."}
    peak, stop = [0.0], threading.Event()
    watch = threading.Thread(target=watch_memory, args=(peak, stop))
    watch.start()
    begun = time.monotonic()
    try:
        subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, check=True)
    finally:  # a thread that still watches would keep this process alive
        seconds = time.monotonic() - begun
        stop.set()
        watch.join()
    return seconds, peak[0]


def watch_memory(peak: list[float], stop: threading.Event) -> None:
    """Largest sum of resident memory over the job's driver, tasks and decoding children."""
    words = ("pipelines/extract.py", "extract_shard", "features.decode.isolation")
    while not stop.wait(0.5):
        total = 0
        for process in psutil.process_iter(["cmdline", "memory_info"]):
            if any(word in " ".join(process.info["cmdline"] or ()) for word in words):
                total += process.info["memory_info"].rss
        peak[0] = max(peak[0], total / 1e9)


def best(repeats: int, measures: Mapping[str, Callable]) -> dict[str, tuple[float, float]]:
    """Of each the fastest of some runs, all in turns, and the largest memory of them."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            runs[name].append(measure())
    return {name: (min(s for s, _ in found), max(memory for _, memory in found)) for name, found in runs.items()}


def print_stages(config: ExtractionConfig, clips: int = 100) -> None:
    """Share of one process's time by stage, over some clips, without isolation."""
    import features.decode.clip
    import features.store.shards as shards
    from features.corpus.manifest import Clip, read_corpus
    from features.corpus.validation import validate
    from features.store import StoreSpec
    from features.store.samples import pack
    from features.store.shards import ShardWriter

    corpus = read_corpus(config.corpus)
    encoder = encoder_of(config.options, corpus)
    seconds: Counter[str] = Counter()

    def clocked(stage: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: object, **options: object) -> object:
            begun = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[stage] += time.perf_counter() - begun

        return call

    report = validate(corpus)
    spec = StoreSpec(encoder.features(), report.tasks, report.splits, 64, report.digest)
    types = pa.schema([corpus.schema.field(label) for label in corpus.labels])
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(features.decode.clip, "decode_frames", clocked("frames", features.decode.clip.decode_frames)),
        mock.patch.object(features.decode.clip, "encode_audio", clocked("sound", features.decode.clip.encode_audio)),
        ShardWriter(folder, "train-000000", spec, types) as writer,
    ):
        for sub in shards.FOLDERS:
            os.makedirs(f"{folder}/{sub}")
        for row in next(corpus.batches(clips)).to_pylist():
            clip = Clip.from_row(row, corpus.labels)
            sample = features.decode.clip.encode_clip(clip, clip.media(corpus.folder), encoder)
            writer.add(clip, clocked("write", pack)(clip, sample))
        clocked("write", writer.commit)()
    total = sum(seconds.values())
    print("one process's time: " + ", ".join(f"{stage} {s / total:.0%}" for stage, s in seconds.most_common()))


def ffmpeg_seconds(config: ExtractionConfig, folder: str, cores: int) -> float:
    """One ffmpeg process per clip, `cores` at a time: frames to raw RGB, sound to 16 kHz."""
    from concurrent.futures import ThreadPoolExecutor

    from features.corpus.manifest import read_corpus

    corpus = read_corpus(config.corpus)
    video = encoder_of(config.options, corpus).video
    files = [clip.media(corpus.folder)["video"] for clip in corpus.clips()]

    def one(number: int) -> None:
        out = f"{folder}/out/{number}"
        command = [config.ffmpeg, "-nostdin", "-loglevel", "error", "-threads", "1", "-y", "-i", files[number]]
        command += ["-vf", f"fps={video.fps},scale={video.size}:{video.size}", "-pix_fmt", "rgb24", "-f", "rawvideo"]
        command += [f"{out}.rgb", "-ar", "16000", "-ac", "1", f"{out}.wav"]
        subprocess.run(command, check=True)

    begun = time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(one, range(len(files))))
    return time.monotonic() - begun


def encoder_of(options: str, corpus: object) -> object:
    """The encoder that the job's options mean."""
    from features.corpus.validation import validate
    from pipelines.common.cli import parse
    from pipelines.extract import ExtractConfig, plan_encoders

    config = parse(ExtractConfig, ["--corpus", "x", "--store", "y", *shlex.split(options)])
    return plan_encoders(config, corpus, validate(corpus).sources)


def planned(corpus: object, options: str, shard_rows: int = 64) -> list[tuple[str, list[dict]]]:
    """Rows in lots of a shard."""
    rows = [row for batch in corpus.batches() for row in batch.to_pylist()]
    return [(f"{first:06d}", rows[first : first + shard_rows]) for first in range(0, len(rows), shard_rows)]


def count_rows(corpus: str) -> int:
    """Clips of a csv manifest."""
    return csv.read_csv(corpus).num_rows


def first_rows(corpus: str, rows: int, folder: Path) -> str:
    """A manifest of some clips spread over the whole one."""
    table = with_absolute_media(corpus)
    table = table.take(list(range(0, len(table), len(table) // rows))[:rows])
    csv.write_csv(table, folder / "part.csv")
    return str(folder / "part.csv")


def repeated(corpus: str, times: int, folder: Path) -> str:
    """A manifest with every clip `times` times, under ids of its own."""
    parts = []
    for number in range(times):
        table = with_absolute_media(corpus)
        ids = pa.array([f"{clip}-{number}" for clip in table["clip_id"].to_pylist()])
        parts.append(table.set_column(table.column_names.index("clip_id"), "clip_id", ids))
    csv.write_csv(pa.concat_tables(parts), folder / "repeated.csv")
    return str(folder / "repeated.csv")


def with_absolute_media(corpus: str) -> pa.Table:
    """A csv manifest that can lie anywhere."""
    table = csv.read_csv(corpus)
    base = os.path.dirname(os.path.abspath(corpus))
    media = pa.array([os.path.join(base, path) for path in table["video"].to_pylist()])
    return table.set_column(table.column_names.index("video"), "video", media)


if __name__ == "__main__":
    sys.exit(main())
