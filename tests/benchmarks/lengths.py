"""What batches of clips of like length save: steps per second with --loader.buckets and without.

    python -m tests.benchmarks.lengths [--models clcr concat] [--longest 3000] [--buckets 50]

Clips of two modalities of vectors have 1 to --longest tokens, each length as likely, or each order of magnitude. The
same clips are learned from in the order of a plain shuffle and in buckets, in turn; a step is collating,
forward, backward and update, and the clock is the process's time on the processor, which does not count waiting for a
core. `padding` is the share of a batch's tokens that are none.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import clcr
from clcr.batches import collate
from clcr.config import ModelConfig
from clcr.training import OptimConfig, Trainer
from pipelines.training.order import bucketed

DIM = 64  # of a token
RATE = 25.0  # tokens per second
TASKS = {"word": clcr.TaskSpec("word", "classification", tuple("abcdef"))}
FEATURES = {m: clcr.FeatureSpec((DIM,), RATE, "float32") for m in ("one", "two")}


@dataclass(frozen=True)
class LengthsConfig:
    """What is timed."""

    models: tuple[str, ...] = ("clcr", "concat")
    """models by name"""
    spread: tuple[Literal["uniform", "log"], ...] = ("uniform", "log")
    """how lengths are spread: each as likely, or each order of magnitude"""
    longest: int = 3000
    """tokens of the longest clip"""
    clips: int = 320
    """clips of an epoch"""
    batch: int = 16
    """clips per step"""
    buckets: int = 50
    """batches that are sorted together"""
    width: int = 32
    """features per token within the model"""


def main() -> int:
    """Measure and print one table."""
    config = tyro.cli(LengthsConfig, description=__doc__)
    torch.set_num_threads(1)
    columns = ("lengths", "model", "padding, shuffled", "padding, buckets", "steps/s, shuffled", "steps/s, buckets")
    table = Table(*columns, "ratio", title=f"1 to {config.longest} tokens, batches of {config.batch}")
    for spread in config.spread:
        rng = np.random.default_rng(0)
        drawn = rng.uniform(0, 1, config.clips)
        lengths = np.ceil(drawn * config.longest if spread == "uniform" else config.longest**drawn).astype(int)
        shuffled = rng.permutation(config.clips)
        orders = [shuffled, bucketed(shuffled, lengths, config.batch, config.buckets, 0, 0)]
        padding = [f"{padded(order, lengths, config.batch):.0%}" for order in orders]
        for model in config.models:
            plain, buckets = speeds(config, model, lengths, orders)
            table.add_row(spread, model, *padding, f"{plain:.2f}", f"{buckets:.2f}", f"{buckets / plain:.2f}")
    Console(width=120).print(table)
    return 0


def padded(order: np.ndarray, lengths: np.ndarray, size: int) -> float:
    """The share of padding in an order's batches."""
    batches = [lengths[order[first : first + size]] for first in range(0, len(order), size)]
    return 1 - lengths.sum() / sum(batch.max() * len(batch) for batch in batches)


def speeds(config: LengthsConfig, name: str, lengths: np.ndarray, orders: list[np.ndarray]) -> list[float]:
    """Steps per second of an epoch in each order, which take turns, batch by batch."""
    torch.manual_seed(0)
    model = clcr.build(name, clcr.CLCRConfig(ModelConfig(width=config.width)), FEATURES, TASKS)
    steps = -(-len(lengths) // config.batch)
    trainer = Trainer(model, TASKS, OptimConfig(epochs=3), steps)
    trainer.forward.train()
    seconds = [0.0] * len(orders)
    for step in range(-1, steps):  # the first one is not counted
        for number, order in enumerate(orders):
            rows = order[max(step, 0) * config.batch :][: config.batch]
            started = time.process_time()
            trainer.train_step(collate([clip(row, lengths[row]) for row in rows], FEATURES, TASKS))
            seconds[number] += (time.process_time() - started) * (step >= 0)
    return [steps / each for each in seconds]


def clip(row: int, tokens: int) -> dict:
    """A clip of random vectors."""
    rng = np.random.default_rng(row)
    features = {m: rng.standard_normal((tokens, DIM), dtype=np.float32) for m in FEATURES}
    return {"clip_id": str(row), "features": features, "targets": {"word": row % 6}}


if __name__ == "__main__":
    sys.exit(main())
