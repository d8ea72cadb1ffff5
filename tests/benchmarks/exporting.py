"""Which models can be exported, how far the files' answers are from the model's, and what a clip costs in each.

    python -m tests.benchmarks.exporting --out exporting.csv

Models have random weights, the default width and the statistics of random clips. They read clips of 3 seconds: 38
frames of 32 x 32 pixels and 300 tokens of log-mel. Largest error: of network.pt2 and network.onnx, over sizes that the
export did not see and clips that lack a modality, relative to the size of the answers where those exceed 1.
Milliseconds: median of one clip on one thread, torch and onnxruntime in turns; CPU time, so that other work on the
machine does not count.
"""

import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import clcr
from clcr.registry import MODELS
from pipelines.answering.network import Exported, Network, export_network, open_onnx
from pipelines.common.errors import JobError

FEATURES = {"video": clcr.FeatureSpec((32, 32, 3), 12.5, "uint8"), "audio": clcr.FeatureSpec((64,), 100.0, "float16")}
TASKS = {
    "label": clcr.TaskSpec("label", "classification", ("a", "b", "c")),
    "mood": clcr.TaskSpec("mood", "regression"),
}
COLUMNS = ("architecture", "largest error", "torch ms", "onnxruntime ms", "why not")


@dataclass(frozen=True)
class Options:
    """What to export."""

    out: Path
    """csv to write"""
    models: tuple[str, ...] = (*MODELS, "video")
    """architectures, or a modality's name"""
    width: int = 128
    """width of the models"""
    rounds: int = 20
    """clips that are timed"""


def main() -> None:
    """Export each model, and write a row of it at once."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    with open(options.out, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for name in options.models:
            row = measure(name, options)
            table.writerow(row)
            file.flush()
            print(row, flush=True)


def measure(name: str, options: Options) -> dict[str, Any]:
    """A row of the table."""
    torch.manual_seed(0)
    config = clcr.CLCRConfig(clcr.config.ModelConfig(width=options.width))
    model = clcr.build(name, config, FEATURES, TASKS).eval()
    network = Network(model)
    seen = replace(network.batch(*network.example(32, 38)), clip_ids=list(map(str, range(32))))
    model.fit_statistics([seen], labels={"mood": np.arange(32.0)})
    model.prepare_evaluation(lambda clips: [seen])
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = export_network(model, Path(folder), ("torch", "onnx"))
        except JobError as error:
            return {"architecture": name, "why not": str(error)}
        network = Network(model)
        inputs = network.example(1, 38)
        wanted = {key: value.numpy() for key, value in zip(network.inputs, inputs, strict=True)}
        if "audio.values" in wanted:
            longer = network.example(1, 300)
            wanted |= {k: v.numpy() for k, v in zip(network.inputs, longer, strict=True) if k.startswith("audio")}
        tensors = tuple(torch.from_numpy(wanted[key]) for key in network.inputs)
        session = open_onnx(files["onnx"].path)
        costs = timed([lambda: network(*tensors), lambda: session.run(None, wanted)], options.rounds)
    return {
        "architecture": name,
        "largest error": f"{max(worst(files)):.1e}",
        "torch ms": f"{costs[0]:.1f}",
        "onnxruntime ms": f"{costs[1]:.1f}",
    }


def worst(files: dict[str, Exported]) -> list[float]:
    """The largest error of each file."""
    return [file.error for file in files.values()]


@torch.no_grad()
def timed(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median milliseconds of CPU of each call, in turns."""
    costs: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 3):
        for spent, call in zip(costs, calls, strict=True):
            started = time.process_time()  # of this process alone: others use the machine too
            call()
            spent.append(1e3 * (time.process_time() - started))
    return [statistics.median(spent[3:]) for spent in costs]


if __name__ == "__main__":
    main()
