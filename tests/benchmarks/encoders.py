"""The extract job with real networks against a plain loop of the same networks over the same clips, in one run.

    python -m tests.benchmarks.encoders --corpus grid/corpus.csv

The loop decodes a clip, and gives what it decoded to the network, with as many of torch's threads as there are cores:
one process, without isolation, store or Ray, its networks loaded before the clock starts. The job joins a cluster that
runs already. A rate is that of further clips: the longer corpus less the shorter one, so that starting counts for
neither. Apart from clips per second of the clock there are clips per second of processor time, which other work on the
machine changes less. Ray's dashboard and monitors, which run whether there is a job or not, do not count.
"""

import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import tyro

from infra.head import ROOT, Head, local_head
from tests.benchmarks.extraction import first_rows, job_command, timed

LOOP = """
import os, sys, time
import torch
from features.corpus.manifest import read_corpus
from features.decode.clip import encode_clip, prepare
from tests.benchmarks.extraction import encoder_of

torch.set_num_threads(os.cpu_count())
corpus = read_corpus(sys.argv[1])
encoder = encoder_of(sys.argv[2], corpus)
prepare(encoder)
for place, clip in enumerate(corpus.clips()):
    if place == 1:  # after the first one everything is there
        begun, cpu = time.perf_counter(), time.process_time()
    encode_clip(clip, clip.media(corpus.folder), encoder)
print(place / (time.perf_counter() - begun), place / (time.process_time() - cpu))
"""
IDLE = ("dashboard", "Agent", "monitor")  # in the command lines of what Ray runs anyway


@dataclass(frozen=True)
class EncodersConfig:
    """What is measured."""

    corpus: str = str(ROOT.parent / "shared" / "data" / "grid" / "corpus.csv")
    """manifest of the clips, csv"""
    options: tuple[str, ...] = (
        "--modalities video --video.encoder efficientnet_lite0 --video.size 64",
        "--modalities audio --audio.encoder speech_embedding",
    )
    """options of pipelines/extract.py, in one string for each comparison"""
    few: int = 200
    """clips of the shorter corpus"""
    many: int = 800
    """clips of the longer one"""


class Used(NamedTuple):
    """What a job took. seconds: of the clock; cpu: seconds of all processes; memory: GB at its peak."""

    seconds: float
    cpu: float
    memory: float


def main() -> int:
    """Measure, print a line for each comparison."""
    config = tyro.cli(EncodersConfig, description=__doc__)
    for options in config.options:
        with tempfile.TemporaryDirectory() as folder, local_head() as head:
            corpora = {clips: corpus_of(config.corpus, clips, Path(folder)) for clips in (config.few, config.many)}
            few = measured(corpora[config.few], folder, options, head)
            loop = loop_rates(corpora[config.few], options)
            many = measured(corpora[config.many], folder, options, head)
        further = config.many - config.few
        job = further / (many.seconds - few.seconds), further / (many.cpu - few.cpu)
        print(options)
        for unit, ours, theirs in zip(("s", "CPU s"), job, loop, strict=True):
            print(f"  clips/{unit}: job {ours:.2f}, loop {theirs:.2f}, ratio {ours / theirs:.2f}")
        memory = f"{few.memory:.2f} GB at {config.few} clips, {many.memory:.2f} GB at {config.many}"
        print(f"  peak memory of the job: {memory}", flush=True)
    return 0


def corpus_of(corpus: str, clips: int, folder: Path) -> str:
    """A manifest of so many of the clips, in a folder of its own."""
    place = folder / str(clips)
    place.mkdir()
    return first_rows(corpus, clips, place)


def loop_rates(corpus: str, options: str) -> list[float]:
    """Clips of the plain loop per second of the clock, and of its processor time."""
    command = [sys.executable, "-c", LOOP, corpus, options]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [float(rate) for rate in done.stdout.split()[-2:]]


def measured(corpus: str, folder: str, options: str, head: Head) -> Used:
    """What the job takes, with all processes of its cluster."""
    watch = Watch(head.env["RAY_AUTH_TOKEN"])
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        seconds, _ = timed(job_command(corpus, folder, options), folder, head)
    finally:
        watch.stop.set()
        thread.join()
    return Used(seconds, sum(watch.cpu.values()), watch.memory)


@dataclass
class Watch:
    """Looks once a second at the processes that were given a cluster's token."""

    token: str
    memory: float = 0.0
    cpu: dict[psutil.Process, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Look until told to stop."""
        others: set[psutil.Process] = set()
        before: dict[psutil.Process, float] = {}
        first = True
        while not self.stop.wait(1):
            total = 0
            for process in psutil.process_iter():
                if process in others:
                    continue
                try:
                    if process not in self.cpu and not self._is_ours(process):
                        others.add(process)
                        continue
                    used = sum(process.cpu_times()[:2])
                    begun = before.setdefault(process, used if first else 0.0)
                    self.cpu[process] = used - begun
                    total += process.memory_info().rss
                except psutil.Error:  # it ended meanwhile, or is another user's
                    others.add(process)
            first = False
            self.memory = max(self.memory, total / 1e9)

    def _is_ours(self, process: psutil.Process) -> bool:
        command = " ".join(process.cmdline())
        return process.environ().get("RAY_AUTH_TOKEN") == self.token and not any(word in command for word in IDLE)


if __name__ == "__main__":
    sys.exit(main())
