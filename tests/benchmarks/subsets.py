"""What is left of trained models when a modality is missing, with and without modality dropout in training.

    python -m tests.benchmarks.subsets --store STORE --out subsets.csv --seeds 1 --common "epochs=12 model.width=32" \
        "concat lr=4e-3" "concat lr=4e-3 loader.drop=[skeleton=.2,inertial=.2]"

Recipes are those of `fusion`. Each is trained on the store's own splits, in this process, and then evaluated by
pipelines/evaluate.py: a row holds the test accuracy, the mean of all tasks with classes, with every subset of the
modalities, as metrics.json has it. Runs that --out holds are not run again: give each store an --out of its own.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import clcr
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.training.learner import Learner
from tests.benchmarks.fusion import commit_of_code, rows_of
from tests.benchmarks.recipes import parse


def main() -> None:
    """Train and evaluate each recipe, and write a row of it at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="feature store")
    parser.add_argument("--out", type=Path, required=True, help="csv of results")
    parser.add_argument("--common", default="", help="options of every recipe")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("recipes", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = commit_of_code()
    for seed in args.seeds.split(","):
        for recipe in args.recipes:
            run = {"common": args.common, "recipe": recipe, "seed": seed}
            if any(run.items() <= row.items() for row in rows_of(args.out)):
                continue
            write(args.out, {"commit": commit, **run, **measure(args.store, f"{recipe} {args.common}", int(seed))})


def measure(store: str, recipe: str, seed: int) -> dict[str, Any]:
    """Accuracy by subset of the modalities, after training a recipe."""
    started = time.perf_counter()
    learner = Learner(store, parse(recipe, seed))
    fold = learner.recipe.loader.fold
    for _ in learner.fit():
        pass
    learner.trainer.load_best()
    with tempfile.TemporaryDirectory() as folder:
        clcr.save(learner.trainer.model, f"{folder}/model", learner.store.spec.to_dict())
        options: dict[str, Any] = {"noise": (), "pictures": 0, "track": False, "fold": fold}
        evaluate(EvaluateConfig((f"{folder}/model",), store, f"{folder}/out", **options))
        (about,) = json.loads(Path(folder, "out", "metrics.json").read_text())["models"].values()
    subsets = {
        condition: f"{fmean(task['accuracy'] for task in tasks.values() if 'accuracy' in task):.4f}"
        for condition, tasks in about["subsets"].items()
    }
    return {"val": f"{learner.trainer.best_score:.4f}", **subsets, "seconds": round(time.perf_counter() - started)}


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and say it."""
    earlier = rows_of(path)
    if earlier and earlier[0].keys() != row.keys():
        raise SystemExit(f"{path} has other columns; models of other modalities need an --out of their own")
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(row))
        if not earlier:
            table.writeheader()
        table.writerow(row)
    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
