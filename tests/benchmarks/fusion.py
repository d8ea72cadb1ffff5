"""What fusion is worth on real data: recipes over folds and seeds, one process, resumable; results/*.csv is its output.

    python -m tests.benchmarks.fusion --store STORE --out tests/benchmarks/results/utd_inner.csv --folds inner \
        --common "epochs=40 model.width=64 lr=2e-3" --seeds 1,2 "clcr" "clcr model.exchange=none" "concat"

A recipe is a model's name and options, as recipes.py says. --choose lr=1e-3,4e-3 tries these values of an option with
every recipe, on the first fold and with the first seed, and goes on with the best by `val`.
--folds: `inner` leaves out one group (subject) of the training split at a time and never opens the others: recipes are
chosen there; `parts` does so with four random parts of it, where clips have no group. `outer` leaves out one fold of
the corpus, chooses the epoch on the next and tests it; a corpus without folds is divided into five at random, by its
groups where it has any. `official` takes the corpus's splits.
--summary prints means, tests paired over folds, and the interval of a bootstrap over clips.

A row is a run: `val` is the
validation score of the best epoch, `last` that of the last one, which nothing was chosen by; `test` that of the best
epoch; `alone` the test score (inner: the validation score) where one modality is left, whole clips keep all theirs;
`right`, of tasks with classes alone, how many clips (x tasks) that score is of, and which answers were right, as
hexadecimal bits.
"""

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from features.store import Store
from tests.benchmarks.answers import unpacked
from tests.benchmarks.recipes import Runs

KEY = ["corpus", "folds", "recipe", "fold", "seed"]
COLUMNS = ["commit", "command", *KEY, "epochs", "val", "last", "test", "alone", "participation", "seconds", "right"]
DRAWS = 2000


def summary(path: Path, against: str | None) -> None:
    """Mean and spread of each recipe over folds (of means over seeds), and paired t-tests; of one fold, over seeds.

    Recipes are compared by the runs of the same corpus, fold and seed.
    """
    parts: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in rows_of(path):
        parts[f"{run['corpus']}, {run['folds']}"].append(run)
    for part, runs in parts.items():
        if len(parts) > 1:
            print(f"{part}:")
        summary_of(runs, against)


def summary_of(runs: list[dict[str, str]], against: str | None) -> None:
    """The summary of one corpus and one kind of its folds."""
    unit = 0 if len({run["fold"] for run in runs}) > 1 else 1
    column = column_of(runs)
    scores: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for run in runs:
        scores[run["recipe"]][run["fold"], run["seed"]] = float(run[column])
    shown = {recipe: values for recipe, values in scores.items() if len(values) > 1} or scores
    name = against or next(iter(shown))
    if name not in scores:  # the first words of one, of which several rates were tried: the one that went on
        name = max((r for r in scores if r.startswith(name)), key=lambda r: len(scores[r]), default=name)
    base = scores.get(name, {})
    means = {recipe: _by_unit(values, unit) for recipe, values in shown.items()}
    for recipe, values in sorted(shown.items(), key=lambda item: -means[item[0]].mean()):
        mean = means[recipe]
        print(f"{mean.mean():.3f} ({('fold', 'seed')[unit]}s sd {mean.std():.3f}, {len(values)} runs)", end="  ")
        if difference := {run: score - base[run] for run, score in values.items() if run in base}:
            paired = _by_unit(difference, unit)
            p = stats.ttest_1samp(paired, 0).pvalue if paired.any() and len(paired) > 1 else float("nan")
            low, high = bootstrap(runs, recipe, name)
            print(f"{paired.mean():+.3f} sd {paired.std(ddof=min(1, len(paired) - 1)):.3f} p {p:.3f}", end="  ")
            print(f"clips {low:+.3f} to {high:+.3f}" if np.isfinite(low) else "", end="  ")
        print(recipe)
    if tried := len(scores) - len(shown):
        print(f"{tried} recipes of one run are not shown")


def column_of(runs: list[dict[str, str]]) -> str:
    """The score that runs are compared by: `test`, where there is a test part, else `last`."""
    return "test" if any(run["test"] for run in runs) else "last"


def _by_unit(scores: dict[tuple[str, str], float], unit: int) -> np.ndarray:
    """Means over what is not the unit; scores: by fold (unit 0) and seed (unit 1)."""
    parts: dict[str, list[float]] = defaultdict(list)
    for run, score in scores.items():
        parts[run[unit]].append(score)
    return np.array([np.mean(part) for part in parts.values()])


def bootstrap(runs: list[dict[str, str]], recipe: str, base: str) -> tuple[float, float]:
    """95 % interval of a difference over clips drawn anew within each fold; folds, and seeds of both, as they are."""
    right: dict[str, dict[tuple[str, str], np.ndarray]] = defaultdict(dict)
    for run in runs:
        if len(answers := unpacked(run.get("right", ""))):
            right[run["recipe"]][run["fold"], run["seed"]] = answers
    differences: dict[str, list[np.ndarray]] = defaultdict(list)
    for (fold, seed), answers in right[recipe].items():
        if (fold, seed) in right[base]:
            differences[fold].append(answers - right[base][fold, seed])
    if not differences:
        return float("nan"), float("nan")
    random, drawn = np.random.default_rng(0), np.zeros(DRAWS)
    for of_fold in differences.values():
        difference = np.mean(of_fold, axis=0)
        clips = random.integers(len(difference), size=(DRAWS, len(difference)))
        drawn += difference[clips].mean(axis=1) / len(differences)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The runs that a file of results holds."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="feature store")
    parser.add_argument("--out", type=Path, required=True, help="csv of results; runs that it holds are not run again")
    parser.add_argument("--folds", choices=("inner", "parts", "outer", "official"), default="inner")
    parser.add_argument("--only", default="", help="these folds alone, separated by commas")
    parser.add_argument("--common", default="", help="options of every recipe")
    parser.add_argument("--choose", default="", help="an option and values, of which each recipe takes its best")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--summary", action="store_true", help="print what --out holds")
    parser.add_argument("--against", help="recipe, or how it begins, that the others are paired with; the first one")
    parser.add_argument("recipes", nargs="*")
    args = parser.parse_args()
    if args.summary:
        summary(args.out, args.against)
        return 0
    option, _, values = args.choose.partition("=")
    if args.choose and not (option and values):
        parser.error(f"--choose {args.choose}: write OPTION=VALUE,VALUE, such as lr=1e-3,4e-3")
    torch.set_num_threads(1)
    corpus, runs = Path(args.store).name, Runs(Store(args.store), args.folds, args.common)
    only = args.only.split(",") if args.only else list(runs.parts)
    if unknown := set(only) - runs.parts.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: the folds are {', '.join(runs.parts)}")
    done = {tuple(run[name] for name in KEY): run for run in rows_of(args.out)}
    commit = commit_of_code()

    def run(text: str, fold: str, seed: int) -> dict[str, Any]:
        """The row of a recipe, trained unless --out holds it."""
        key = (corpus, args.folds, text, fold, str(seed))
        if key not in done:
            row = dict(zip(KEY, key, strict=True)) | runs.run(text, fold, seed)
            done[key] = {"commit": commit, "command": args.common, **row}
            write(args.out, done[key])
        return done[key]

    seeds = [int(seed) for seed in args.seeds.split(",")]
    recipes = args.recipes
    if values:
        tried = [[f"{text} {option}={value}" for value in values.split(",")] for text in recipes]
        recipes = [max(texts, key=lambda text: float(run(text, only[0], seeds[0])["val"])) for texts in tried]
    for seed, text, fold in product(seeds, recipes, only):
        run(text, fold, seed)
    return 0


def commit_of_code() -> str:
    """The commit that is checked out, short."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and say it."""
    written = rows_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(written[0]) if written else COLUMNS, extrasaction="ignore")  # as it began
        if not written:
            table.writeheader()
        table.writerow({name: f"{x:.4f}" if isinstance(x := row[name], float) else x for name in COLUMNS})
    print(*(row[name] for name in ("recipe", "fold", "seed", "val", "last", "test", "alone", "seconds")), flush=True)


if __name__ == "__main__":
    sys.exit(main())
