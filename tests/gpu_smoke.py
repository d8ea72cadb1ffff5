"""One training step per model on a GPU: bf16 autocast, torch.compile. No store, no Ray: `python tests/gpu_smoke.py`.

Prints one line per model: loss before and after a few steps, milliseconds per step. Exit code 1 where there is no GPU
or a loss is not finite or does not fall.
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # this folder has a folder `clcr` of its own

import numpy as np
import torch

from clcr import CLCRConfig, FeatureSpec, TaskSpec, build
from clcr.batches import collate
from clcr.registry import MODELS
from clcr.training import OptimConfig, Trainer

FEATURES = {"video": FeatureSpec((64, 64, 3), 12.5, "uint8"), "audio": FeatureSpec((64,), 50.0, "float16")}
TASKS = {"word": TaskSpec("word", "classification", ("a", "b", "c", "d")), "mood": TaskSpec("mood", "regression")}
STEPS = 20


def make_batch(clips=64, seconds=3.0):
    rng = np.random.default_rng(0)
    samples = []
    for number in range(clips):
        arrays = {
            "video": rng.integers(0, 256, (int(seconds * 12.5), 64, 64, 3), dtype=np.uint8),
            "audio": rng.normal(size=(int(seconds * 50), 64)).astype(np.float16),
        }
        samples.append(
            {"clip_id": str(number), "features": arrays, "targets": {"word": number % 4, "mood": number / 64}}
        )
    return collate(samples, FEATURES, TASKS)


def main():
    if not torch.cuda.is_available():
        print("no GPU here: nothing was checked")
        return 1
    batch, failed = make_batch(), False
    for name in (*MODELS, "video", "audio"):
        torch.manual_seed(0)
        config = OptimConfig(epochs=1, batch_size=64, precision="bf16", compile=True, warmup=0.0)
        trainer = Trainer(build(name, CLCRConfig(), FEATURES, TASKS), TASKS, config, STEPS + 3, device="cuda")
        trainer.forward.train()
        first = trainer.train_step(batch.to("cuda"))["train/loss"]
        for _ in range(2):
            trainer.train_step(batch.to("cuda"))
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            last = trainer.train_step(batch.to("cuda"))["train/loss"]
        torch.cuda.synchronize()
        milliseconds = 1000 * (time.perf_counter() - started) / STEPS
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: loss {first:.3f} -> {last:.3f}, {milliseconds:.1f} ms per step, {memory:.1f} GiB", flush=True)
        failed |= not (np.isfinite(last) and last < first)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
