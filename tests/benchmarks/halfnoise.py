"""Does the budget admit less of a modality where it is noisy? Noise on a random half of every clip, and alpha there.

    python -m tests.benchmarks.halfnoise --store STORE --out half.csv --common "epochs=20 model.width=32" \\
        "clcr" "clcr budget.evidence=content"

Of STORE the official training and validation splits are taken. Gaussian noise of --sigma times each number's own spread
goes into the first or the second half of every clip of --modality, in training as in validation. A row is a run: the
validation score of the best epoch, and of each level, shallow to deep, the correlation of alpha with noise over that
modality's tokens of all validation clips, and the mean of alpha in noisy and in clean halves.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

import clcr
from features.store import Store
from pipelines.training.loading import task_specs
from tests.benchmarks.fusion import commit_of_code
from tests.benchmarks.recipes import Memory, Sample, divisions, fit, parse, read

COLUMNS = ["commit", "command", "recipe", "seed", "modality", "sigma", "val", "correlation", "noisy", "clean"]


def noisy(samples: list[Sample], modality: str, sigma: float) -> dict[str, bool]:
    """Put noise into half of every clip, in place; whether it is the second half, by clip."""
    values = np.concatenate([sample["features"][modality] for sample in samples])
    spread = values.std(axis=0, dtype=np.float64)  # of float16, whose squares overflow
    random, second = np.random.default_rng(0), {}
    for sample in samples:
        values = sample["features"][modality].astype(np.float32)
        later = second[sample["clip_id"]] = bool(random.integers(2))
        half = slice(len(values) // 2, None) if later else slice(len(values) // 2)
        values[half] += sigma * spread * random.standard_normal(values[half].shape).astype(np.float32)
        sample["features"][modality] = values
    return second


@torch.no_grad()
def alphas(model: clcr.CLCR, loader: Memory, modality: str, second: dict[str, bool]) -> list[np.ndarray]:
    """Of every level alpha of the modality's tokens and whether they lie in the noisy half: (2, tokens)."""
    model.eval()
    found: list[list[np.ndarray]] = [[] for _ in model.intra]
    for batch in loader.batches(0):
        out = model(batch)
        for level, (alpha, valid) in enumerate(zip(out.alpha, out.valid, strict=True)):
            for clip, weights, there in zip(batch.clip_ids, alpha[modality], valid[modality], strict=True):
                own = weights[there].numpy()
                later = np.arange(len(own)) + 0.5 > len(own) / 2
                found[level].append(np.stack([own, later == second[clip]]))
    return [np.concatenate(clips, axis=1) for clips in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="feature store")
    parser.add_argument("--out", type=Path, required=True, help="csv that rows are appended to")
    parser.add_argument("--modality", default="audio", help="the modality that gets the noise")
    parser.add_argument("--sigma", type=float, default=2.5, help="of the noise, times the spread of each number")
    parser.add_argument("--common", default="", help="options of every recipe")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("recipes", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.store)
    samples, rows = read(store, task_specs(store))
    second = noisy(samples, args.modality, args.sigma)
    (_, parts), *_ = divisions(rows, "official")
    commit = commit_of_code()
    for text in args.recipes:
        trainer, loaders, scores = fit(parse(f"{text} {args.common}", args.seed), store, samples, parts)
        levels = alphas(trainer.model, loaders["val"], args.modality, second)
        row = dict(zip(COLUMNS, [commit, args.common, text, args.seed, args.modality, args.sigma], strict=False))
        row["val"] = f"{max(scores):.4f}"
        row["correlation"] = " ".join(f"{np.corrcoef(level)[0, 1]:.3f}" for level in levels)
        for name, noise in (("noisy", 1), ("clean", 0)):
            row[name] = " ".join(f"{level[0, level[1] == noise].mean():.3f}" for level in levels)
        print(row, flush=True)
        new = not args.out.exists()
        with open(args.out, "a", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            if new:
                table.writeheader()
            table.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
