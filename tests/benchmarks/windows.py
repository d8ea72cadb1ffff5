"""How far the order by windows is from a full shuffle: validation curves of --loader.window, over seeds.

    python -m tests.benchmarks.windows --store STORE --out windows.csv --windows 1 2 4 8 --recipe "concat epochs=16"

A window is so many shards. What counts is how many of the split's shards that is, and how the
manifest is sorted: a store of a manifest sorted by class, which has one or two classes in a shard, is the hardest case.
A row of --out is an epoch; runs that it holds are not run again. The table has the mean over seeds, their spread, and
the difference to the full shuffle in the last epoch with a paired t-test.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from pipelines.training.learner import Learner
from tests.benchmarks.fusion import commit_of_code, rows_of
from tests.benchmarks.recipes import parse

COLUMNS = ("commit", "store", "recipe", "window", "seed", "epoch", "val")
Curves = dict[int, dict[int, list[float]]]  # of a window, of a seed


@dataclass(frozen=True)
class Options:
    """What is measured."""

    store: str
    """feature store"""
    out: Path
    """csv of results"""
    windows: tuple[int, ...] = (1, 2, 4, 8)
    """shards of a window; a full shuffle is always among them"""
    seeds: int = 5
    """trainings of each, with the seeds 1, 2, ..."""
    recipe: str = "concat"
    """model and options by dotted name"""


def main(options: Options) -> None:
    """Train what is missing; one table."""
    torch.set_num_threads(1)
    commit = commit_of_code()
    store = Path(options.store).name
    done = {(row["store"], row["recipe"], row["window"], row["seed"]) for row in rows_of(options.out)}
    new = not options.out.exists()
    with open(options.out, "a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if new:
            table.writeheader()
        for seed in range(1, options.seeds + 1):
            for window in dict.fromkeys((0, *options.windows)):
                if (store, options.recipe, str(window), str(seed)) not in done:
                    key = {"commit": commit, "store": store, "recipe": options.recipe, "window": window, "seed": seed}
                    table.writerows({**key, "epoch": n, "val": f"{v:.4f}"} for n, v in curve(options, window, seed))
                    file.flush()
    show(curves(options))


def curve(options: Options, window: int, seed: int) -> list[tuple[int, float]]:
    """val/score of every epoch, counted from 1."""
    recipe = parse(options.recipe, seed)
    recipe = replace(recipe, loader=replace(recipe.loader, window=window, cache_gb=0.0 if window else 4.0, processes=0))
    learner = Learner(options.store, recipe, splits=("train", "val"))
    return [(epoch.number + 1, epoch.metrics["val/score"]) for epoch in learner.fit()]


def curves(options: Options) -> Curves:
    """What --out holds of this store and recipe, windows in order and the full shuffle (0) last."""
    wanted = (Path(options.store).name, options.recipe)
    rows = [row for row in rows_of(options.out) if (row["store"], row["recipe"]) == wanted]
    found: Curves = {}
    for window in sorted({int(row["window"]) for row in rows}, key=lambda shards: (not shards, shards)):
        found[window] = defaultdict(list)
        for row in rows:
            if int(row["window"]) == window:
                found[window][int(row["seed"])].append(float(row["val"]))
    return found


def show(found: Curves) -> None:
    """One row for each window."""
    whole = found[0]
    epochs = len(next(iter(whole.values())))
    shown = sorted({max(1, epochs // 8), epochs // 4, epochs // 2, epochs} - {0})
    table = Table("window, shards", *(f"epoch {epoch}" for epoch in shown), "last, minus full shuffle")
    for window, seeds in found.items():
        scores = np.array(list(seeds.values()))
        cells = [
            f"{scores[:, n - 1].mean():.3f} ({scores[:, n - 1].std(ddof=min(1, len(scores) - 1)):.3f})" for n in shown
        ]
        difference = np.array([seeds[seed][-1] - whole[seed][-1] for seed in seeds if seed in whole])
        p = stats.ttest_1samp(difference, 0).pvalue if difference.any() and len(difference) > 1 else float("nan")
        table.add_row(str(window or "full"), *cells, f"{difference.mean():+.3f}, p {p:.2f}" if window else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
