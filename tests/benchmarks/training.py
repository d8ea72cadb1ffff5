"""What the train job costs compared with the same steps by plain torchrun, and reading with plain webdataset.

    python -m tests.benchmarks.training [--workers 2] [--clips 800] [--epochs 6]

The store holds random frames and sound of clips of three seconds. Both sides run the same loop with the same threads;
the first epoch of each, which starts everything up, does not count. They take turns; the median of the others counts.
`waiting` is the share of a worker's time in which the next batch was not ready. Reading is of uncached samples by one
process: ours by offset and in shuffled order, as training reads, compared with webdataset's own loop over the same
shards; both from the page cache.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import tyro
import webdataset as wds
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "helpers")]

import storefiles  # noqa: E402

from clcr.config import CLCRConfig, ModelConfig  # noqa: E402
from clcr.training import OptimConfig  # noqa: E402
from features.store import Feature, Store  # noqa: E402
from features.store.samples import Sample  # noqa: E402
from pipelines.training.learner import Learner, Recipe  # noqa: E402
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs  # noqa: E402

FEATURES = {
    "video": Feature((32, 32, 3), "uint8", 12.5, {"name": "frames", "size": 32}),
    "audio": Feature((64,), "float16", 50.0, {"name": "log_mel", "mels": 64}),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    workers: int = 2
    """data-parallel workers, on both sides"""
    threads: int = 1
    """of each worker"""
    clips: int = 800
    """in the training split"""
    batch: int = 32
    """clips per step, over all workers"""
    width: int = 64
    """features per token"""
    epochs: int = 6
    """of each training"""
    rounds: int = 3
    """trainings of each side, in turns"""
    device: str = "cpu"
    """of all workers, where torchrun starts them"""
    bare: str = ""
    """the store, where torchrun calls this; leave it empty"""

    def recipe(self) -> Recipe:
        """What both sides train."""
        optim = OptimConfig(epochs=self.epochs, batch_size=self.batch)
        return Recipe(optim=optim, network=CLCRConfig(model=ModelConfig(width=self.width)))


def random_clip(number: int) -> Sample:
    """Three seconds."""
    rng = np.random.default_rng(number)
    video = rng.integers(0, 256, (37, 32, 32, 3), dtype=np.uint8)
    return Sample({"video": video, "audio": rng.normal(size=(150, 64)).astype(np.float16)}, 3.0)


def write_store(folder: str, clips: int) -> Store:
    """A store of random clips, 64 to a shard."""
    before = storefiles.make_sample, storefiles.FEATURES
    storefiles.make_sample, storefiles.FEATURES = random_clip, FEATURES
    try:
        return storefiles.write_store(f"{folder}/store", storefiles.make_clips(clips, 8, 8), shard_rows=64)
    finally:  # tests that call this share the process with others
        storefiles.make_sample, storefiles.FEATURES = before


def bare_loop(options: Options) -> None:
    """What torchrun starts: the loop without Ray, MLflow or checkpoints. Rank 0 prints its epochs' metrics."""
    dist.init_process_group("gloo")  # NCCL refuses two workers on one device
    torch.set_num_threads(options.threads)
    learner = Learner(options.bare, options.recipe(), dist.get_rank(), dist.get_world_size(), options.device)
    epochs = [epoch.metrics for epoch in learner.fit()]
    if dist.get_rank() == 0:
        print("EPOCHS " + json.dumps([{k: v for k, v in m.items() if k.startswith("perf/")} for m in epochs]))
    dist.destroy_process_group()


def by_torchrun(options: Options, store: Store) -> list[dict[str, float]]:
    """perf/ metrics of every epoch."""
    given = replace(options, bare=store.uri).__dict__.items()
    arguments = [text for name, value in given for text in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.workers}", "--standalone"]
    command = [*launcher, "-m", "tests.benchmarks.training", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(next(line for line in done.stdout.splitlines() if "EPOCHS" in line).partition("EPOCHS ")[2])


def by_the_job(options: Options, store: Store, folder: str) -> list[dict[str, float]]:
    """The same of pipelines/train.py, from its MLflow run."""
    from mlflow.tracking import MlflowClient

    command = [sys.executable, "pipelines/train.py", "--store", store.uri, "--out", f"{folder}/run"]
    given = {
        "workers": options.workers,
        "cpus-per-worker": options.threads,
        "epochs": options.epochs,
        "batch-size": options.batch,
        "model.width": options.width,
    }
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)
    run = json.loads(Path(folder, "run", "run.json").read_text())
    client = MlflowClient(run["tracking_uri"])
    names = [name for name in client.get_run(run["run_id"]).data.metrics if name.startswith("perf/")]
    histories = {name: client.get_metric_history(run["run_id"], name) for name in names}
    return [{n: points[epoch].value for n, points in histories.items()} for epoch in range(options.epochs)]


def reading(store: Store) -> tuple[float, float]:
    """Samples per second: ours, and webdataset's."""
    features, config = feature_specs(store), LoaderConfig(cache_gb=0.0, processes=0)
    loader = SplitLoader(store, "train", features, task_specs(store), config, batch_size=32)
    shards = sorted(map(str, Path(store.uri, "shards").glob("train-*.tar")))

    def ours() -> int:
        return sum(len(batch) for batch in loader.batches(0))

    def plain() -> int:
        dataset = wds.WebDataset(shards, shardshuffle=False).decode().batched(32, collation_fn=None)
        return sum(map(len, dataset))

    speeds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(3):
        for name, read in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            count = read()
            speeds[name].append(count / (time.perf_counter() - started))
    return max(speeds["ours"]), max(speeds["plain"])


def main(options: Options) -> None:
    """Measure everything; one table."""
    if options.bare:
        return bare_loop(options)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(folder, options.clips)
        sides: dict[str, list[dict[str, float]]] = {"torchrun": [], "the job": []}
        for number in range(options.rounds):
            sides["torchrun"] += by_torchrun(options, store)[1:]
            sides["the job"] += by_the_job(options, store, f"{folder}/{number}")[1:]
        ours, plain = reading(store)
    steps = -(-options.clips // options.batch)
    table = Table("", "steps/s", "waiting for data", title=f"{options.workers} workers, {options.clips} clips")
    speeds = {side: steps / median(m["perf/epoch_s"] for m in epochs) for side, epochs in sides.items()}
    for side, epochs in sides.items():
        waiting = median(m["perf/waiting_for_data"] for m in epochs)
        table.add_row(side, f"{speeds[side]:.2f}", f"{waiting:.1%}")
    Console(width=100).print(table)
    print(f"the job against torchrun: {speeds['the job'] / speeds['torchrun']:.3f}")
    print(f"reading, samples/s: ours {ours:.0f}, webdataset {plain:.0f}: {ours / plain:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
