"""What this project does on a GPU, in ten minutes and one csv.

    python -m tests.benchmarks.gpu [--out gpu.csv]
    python -m tests.benchmarks.gpu --device cpu        # every line of it, at a size that measures nothing

steps: forward and backward of every model, as tests/benchmarks/steps.py times them; `bound` is the share of the rate of
one large matrix product that the model's FLOPs reach. training: whole steps of the training loop on one batch that lies
on the device, whose loss must fall. loading: epochs from a store, by the samples' places and by windows. workers: the
same epochs by one process and by two that share the device. extraction: the extract job with a network, on the device
and on the CPUs. Exit code 1 where there is no such device, where a part breaks off or where a loss does not fall.
"""

import csv
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from clcr import CLCRConfig, FeatureSpec, TaskSpec, build
from clcr.batches import Batch, collate
from clcr.config import ModelConfig
from clcr.registry import MODELS
from clcr.training import OptimConfig, Trainer
from features.decode.specs import VideoSpec
from features.store import Store
from infra.head import ROOT
from pipelines.extract import ExtractConfig, extract
from pipelines.training.learner import Learner, Recipe
from pipelines.training.loading import LoaderConfig
from tests.benchmarks import steps, training

Row = tuple[str, str, str, float]  # part, what, figure, value


@dataclass(frozen=True)
class Options:
    """Where to measure."""

    out: Path = Path("gpu.csv")
    """csv of all figures"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu = a dry run"""
    only: tuple[str, ...] = ("steps", "training", "loading", "workers", "extraction")
    """parts to measure"""


@dataclass(frozen=True)
class Size:
    """How much of everything; `side`: of a frame, in pixels; `clips`: of the store; `corpus`: media files."""

    width: int
    tokens: int
    batch: int
    side: int
    steps: int
    clips: int
    corpus: int
    epochs: int
    compile: bool


SIZES = {
    "cuda": Size(256, 300, 64, 64, 20, 4096, 256, 4, compile=True),
    "cpu": Size(16, 12, 4, 8, 12, 64, 10, 2, compile=False),
}


def of_steps(device: str, size: Size) -> Iterator[Row]:
    """Every model's step at one size."""
    config = steps.StepsConfig(rounds=5 if device == "cuda" else 1, precision="bf16", depth=2)
    batch = steps.make_batch(size.batch, size.tokens, 2).to(device)
    for name in MODELS:
        torch._dynamo.reset()
        model = steps.make_model(name, config, batch, size.width)
        step = steps.make_step(model, size.compile, config, batch)
        cost = steps.Cost(0, *steps.count(steps.make_step(model, False, config, batch), device))
        rate = steps.take_turns({name: step}, {name: cost}, config, device)
        yield "steps", name, "ms", cost.seconds * 1e3
        yield "steps", name, "bound", cost.flops / rate / cost.seconds
        yield "steps", name, "samples/s", size.batch / cost.wall
        yield "steps", name, "memory MB", cost.bytes / 1e6


def of_training(device: str, size: Size) -> Iterator[Row]:
    """Every model's loss and seconds in the training loop, optimizer and all."""
    config = CLCRConfig(ModelConfig(width=size.width))
    batch = make_batch(size).to(device)
    for name in (*MODELS, *batch.features):
        torch._dynamo.reset()
        torch.manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optim = OptimConfig(epochs=1, batch_size=size.batch, precision="bf16", compile=size.compile, warmup=0.0)
        model = build(name, config, features_of(size), TASKS)
        trainer = Trainer(model, TASKS, optim, size.steps + 3, device=device)
        trainer.forward.train()
        first = float(trainer.train_step(batch)["train/loss"])
        trainer.train_step(batch), trainer.train_step(batch)
        wait(device)
        begun = time.perf_counter()
        losses = [trainer.train_step(batch) for _ in range(size.steps)]
        wait(device)
        seconds = (time.perf_counter() - begun) / size.steps
        last = float(losses[-1]["train/loss"])
        yield "training", name, "ms", seconds * 1e3
        yield "training", name, "samples/s", size.batch / seconds
        yield "training", name, "memory MB", torch.cuda.max_memory_allocated() / 1e6  # 0 on a CPU
        yield "training", name, "first loss", first
        yield "training", name, "last loss", last
        if not last < first:
            raise ValueError(f"{name}: the loss does not fall: {first:.3f}, then {last:.3f}")


def of_loading(device: str, size: Size) -> Iterator[Row]:
    """Epochs of CLCR from a store that is not kept in memory, but for the first, which starts everything up."""
    with tempfile.TemporaryDirectory() as folder:
        store = training.write_store(folder, size.clips)
        for what, window in (("each by its place", 0), ("by windows", 8)):
            loader = LoaderConfig(cache_gb=0.0, processes=2 if device == "cuda" else 0, window=window)
            optim = OptimConfig(epochs=size.epochs, batch_size=size.batch, precision="bf16")
            network = CLCRConfig(ModelConfig(width=size.width))
            learner = Learner(store, Recipe(network=network, optim=optim, loader=loader), device=device)
            epochs = [epoch.metrics for epoch in learner.fit()][1:]
            yield "loading", what, "samples/s", median(metrics["perf/samples_per_s"] for metrics in epochs)
            yield "loading", what, "waiting", median(metrics["perf/waiting_for_data"] for metrics in epochs)


def of_workers(device: str, size: Size) -> Iterator[Row]:
    """The same batches by one process and by two on one device: what sharing it costs."""
    with tempfile.TemporaryDirectory() as folder:
        store = training.write_store(folder, size.clips)
        for workers in (1, 2):
            options = training.Options(
                workers, clips=size.clips, batch=size.batch, width=size.width, epochs=size.epochs, device=device
            )
            seconds = median(metrics["perf/epoch_s"] for metrics in training.by_torchrun(options, store)[1:])
            yield "workers", str(workers), "samples/s", size.clips / seconds


def of_extraction(device: str, size: Size) -> Iterator[Row]:
    """The extract job, on a Ray that runs already after the first one."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, "-m", "features.synthetic", "--out", f"{folder}/corpus", "--clips", str(size.corpus)]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for what, gpus in [("first, starts Ray", -1)] + [(device, -1)] + [("cpu", 0)] * (device == "cuda"):
            uri = f"{folder}/{what}"
            video = VideoSpec(encoder="efficientnet_lite0")
            corpus = f"{folder}/corpus/corpus.csv"
            begun = time.perf_counter()
            extract(ExtractConfig(corpus, uri, modalities=("video",), video=video, gpus=gpus))
            yield "extraction", what, "clips/s", Store(uri).counts()[0] / (time.perf_counter() - begun)


TASKS = {"word": TaskSpec("word", "classification", tuple("abcd")), "mood": TaskSpec("mood", "regression")}
PARTS: dict[str, Callable[[str, Size], Iterator[Row]]] = {
    "steps": of_steps,
    "training": of_training,
    "loading": of_loading,
    "workers": of_workers,
    "extraction": of_extraction,
}


def features_of(size: Size) -> dict[str, FeatureSpec]:
    """Frames and the bands of sound."""
    shape = (size.side, size.side, 3)
    return {"video": FeatureSpec(shape, 12.5, "uint8"), "audio": FeatureSpec((64,), 50.0, "float16")}


def make_batch(size: Size) -> Batch:
    """Clips of three seconds, whose labels are their numbers."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(size.batch):
        arrays = {
            "video": rng.integers(0, 256, (37, size.side, size.side, 3), dtype=np.uint8),
            "audio": rng.normal(size=(150, 64)).astype(np.float16),
        }
        targets = {"word": number % 4, "mood": number / size.batch}
        samples.append({"clip_id": str(number), "features": arrays, "targets": targets})
    return collate(samples, features_of(size), TASKS)


def wait(device: str) -> None:
    """Until the device has done what it was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(options: Options) -> tuple[list[Row], bool]:
    """All figures, each printed as it is found, and whether every part went to its end."""
    found: list[Row] = []
    whole = True
    for name in options.only:
        try:
            for row in PARTS[name](options.device, SIZES[options.device]):
                found.append(row)
                print(*row[:3], f"{row[3]:.4g}", file=sys.stderr, flush=True)
        except Exception:  # the other parts are worth their time
            traceback.print_exc()
            whole = False
    return found, whole


def main(options: Options) -> int:
    """Measure, write the csv, print a table of each part."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--device cpu tries every line)")
        return 1
    found, whole = measure(options)
    with options.out.open("w", newline="") as file:
        csv.writer(file).writerows([("part", "what", "figure", "value"), *found])
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, a dry run"
    for part in dict.fromkeys(row[0] for row in found):
        rows = [row for row in found if row[0] == part]
        figures = list(dict.fromkeys(row[2] for row in rows))
        table = Table("", *figures, title=f"{part} ({name})")
        for what in dict.fromkeys(row[1] for row in rows):
            values = {row[2]: row[3] for row in rows if row[1] == what}
            table.add_row(what, *(f"{values[figure]:.4g}" if figure in values else "" for figure in figures))
        Console(width=100).print(table)
    print(f"written to {options.out}")
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
