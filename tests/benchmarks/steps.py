"""What a training step costs: every model at equal width, against each other and against arithmetic alone.

    python -m tests.benchmarks.steps [--models clcr mult] [--widths 128 256] [--tokens 75 300] [--modalities 2 3]

A step is forward and backward of one batch, dropout on. Inputs are vectors, so that stems do not dominate; every
modality has the same number of tokens at the shallow level. The models of one size take turns, and the fastest of all
rounds counts: other work on the machine only ever adds. On a CPU the clock is the processor's time (of all threads),
which does not count waiting for a core; `wall ms` is the next column. `floor` is the model's FLOPs (matrix products,
convolutions, attention) at the rate of one large matrix product of the same dtype, timed between the models' rounds.
`memory` is the peak of what a step allocates above the weights.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import clcr
from clcr.batches import Batch, Features
from clcr.config import ModelConfig, MulTConfig
from clcr.registry import MODELS
from clcr.tasks import task_loss

RATE, DIM = 25.0, 64  # tokens per second, features per token
TASKS = {"word": clcr.TaskSpec("word", "classification", tuple("abcdef"))}
SQUARE = {"cpu": 1024, "cuda": 8192}  # side of the matrices whose product sets the floor


@dataclass(frozen=True)
class StepsConfig:
    """What is timed."""

    models: tuple[str, ...] = tuple(MODELS)
    """models by name; ratios are to the last"""
    widths: tuple[int, ...] = (128, 256)
    """features per token"""
    tokens: tuple[int, ...] = (75, 300)
    """tokens per modality at the shallow level"""
    modalities: tuple[int, ...] = (2, 3)
    """numbers of modalities"""
    batch: int = 64
    """clips per step"""
    depth: int = 4
    """layers of mult's transformers"""
    rounds: int = 5
    """timed steps of each model"""
    eager: bool = True
    """time the models as they are"""
    compiled: bool = False
    """time them through torch.compile too (minutes per size on a CPU)"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast"""
    threads: int = 1
    """threads of the CPU's kernels"""


@dataclass
class Cost:
    """One model's step at one size. seconds, wall: of the fastest rounds; bytes: peak above the weights."""

    parameters: int
    flops: int
    bytes: int
    seconds: float = float("inf")
    wall: float = float("inf")


def main() -> int:
    """Measure on the CPU, and on the GPU where there is one; print a table for each."""
    config = tyro.cli(StepsConfig, description=__doc__)
    torch.set_num_threads(config.threads)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        title = f"{device}, {config.precision}, batch {config.batch}, mult of depth {config.depth}"
        columns = [
            "width",
            "tokens",
            "modalities",
            "model",
            "parameters k",
            "ms",
            "wall ms",
            "GFLOP",
            "memory MB",
            "step / floor",
        ]
        table = Table(*columns, f"step / {config.models[-1]}'s", title=title)
        for width, tokens, modalities in product(config.widths, config.tokens, config.modalities):
            rows(table, config, device, width, tokens, modalities)
        Console(width=150).print(table)
    return 0


def rows(table: Table, config: StepsConfig, device: str, width: int, tokens: int, modalities: int) -> None:
    """Measure all models at one size; a section of the table."""
    torch._dynamo.reset()
    batch = make_batch(config.batch, tokens, modalities).to(device)
    steps, costs = {}, {}
    for name, mode in product(config.models, ["eager"] * config.eager + ["compiled"] * config.compiled):
        model = make_model(name, config, batch, width)
        steps[name, mode] = make_step(model, mode == "compiled", config, batch)
        parameters = sum(p.numel() for p in model.parameters())
        costs[name, mode] = Cost(parameters, *count(make_step(model, False, config, batch), device))
    rate = take_turns(steps, costs, config, device)
    for (name, mode), cost in costs.items():
        floor, other = cost.flops / rate, costs[config.models[-1], mode]
        figures = [cost.parameters / 1e3, cost.seconds * 1e3, cost.wall * 1e3, cost.flops / 1e9, cost.bytes / 1e6]
        ratios = [cost.seconds / floor, cost.seconds / other.seconds]
        cells = [f"{x:.1f}" for x in figures] + [f"{x:.2f}" for x in ratios]
        table.add_row(str(width), str(tokens), str(modalities), f"{name}, {mode}", *cells)
        print(width, tokens, modalities, name, mode, *cells, file=sys.stderr, flush=True)
    table.add_section()


def take_turns(steps: dict, costs: dict[tuple, Cost], config: StepsConfig, device: str) -> float:
    """Time every step `rounds` times in turn, fill in its cost; -> FLOP per second of a matrix product."""
    side = SQUARE[device]
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if config.precision == "bf16" else None)
    rate = 0.0
    for step in steps.values():  # compiles, and fills caches
        step(), step()
    for _ in range(config.rounds):
        for key, step in steps.items():
            costs[key].seconds, costs[key].wall = map(min, (costs[key].seconds, costs[key].wall), timed(step, device))
            rate = max(rate, 2 * side**3 / timed(lambda: square @ square, device)[0])
    return rate


def timed(step: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds that count (see above), and of the wall clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return (cpu if device == "cpu" else wall), wall


def make_model(name: str, config: StepsConfig, batch: Batch, width: int) -> nn.Module:
    """A new model in training mode."""
    features = {m: clcr.FeatureSpec((DIM,), RATE, "float32") for m in batch.features}
    torch.manual_seed(0)
    model = clcr.build(name, clcr.CLCRConfig(ModelConfig(width=width), mult=MulTConfig(config.depth)), features, TASKS)
    return model.to(batch.targets["word"].device).train()


def make_step(model: nn.Module, compiled: bool, config: StepsConfig, batch: Batch) -> Callable[[], Tensor]:
    """Forward and backward of a model."""
    device = batch.targets["word"].device
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = forward(batch)
        total, known = task_loss(TASKS["word"], out.logits["word"], batch.targets["word"])
        loss = total / known + sum(out.losses.values())
        loss.backward()
        return loss

    return step


def make_batch(clips: int, tokens: int, modalities: int) -> Batch:
    """Random vectors; every clip but the first is up to a third shorter than the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens * 2 // 3, tokens + 1, (clips,), generator=generator)
    lengths[0] = tokens
    valid = torch.arange(tokens) < lengths[:, None]
    names = [f"modality{i}" for i in range(modalities)]
    return Batch(
        features={m: Features(torch.randn(clips, tokens, DIM, generator=generator), valid) for m in names},
        present={m: torch.ones(clips, dtype=torch.bool) for m in names},
        targets={"word": torch.randint(6, (clips,), generator=generator)},
        clip_ids=[str(clip) for clip in range(clips)],
    )


def count(step: Callable[[], object], device: str) -> tuple[int, int]:
    """FLOPs of an eager step, and the peak of its allocations in bytes."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels: not all are counted
        step()
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return counter.get_total_flops(), torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    # The public event list leaves out what an operator keeps.
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return counter.get_total_flops(), peak


if __name__ == "__main__":
    sys.exit(main())
