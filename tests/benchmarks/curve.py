"""Draw what one option is worth: the score over its values, and the share of tokens that took part.

    python -m tests.benchmarks.curve --results utd_budget.csv --option budget.gamma --default 1 --out clcr/budget.png

Reads rows of `fusion`; recipes that differ in the option alone make a curve, those that do not name it have --default.
Compared are the folds and seeds that every value has.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from features.store.sheet import write_figure
from tests.benchmarks.fusion import rows_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="csv of fusion")
    parser.add_argument("--option", required=True, help="its dotted name")
    parser.add_argument("--default", type=float, required=True, help="its value where a recipe does not name it")
    parser.add_argument("--out", required=True, help="picture to write, as PNG")
    args = parser.parse_args()
    runs = rows_of(args.results)
    column = "test" if any(run["test"] for run in runs) else "last"
    named = re.compile(rf" {re.escape(args.option)}=(\S+)")
    found: dict[str, dict[float, dict[tuple[str, str], tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        value = named.search(run["recipe"])
        at = float(value[1]) if value else args.default
        point = float(run[column]), float(run["participation"] or "nan")
        found[named.sub("", run["recipe"])][at][run["fold"], run["seed"]] = point
    curves = {recipe: common(by_value) for recipe, by_value in found.items() if len(by_value) > 1}
    if not any(any(points.values()) for points in curves.values()):
        parser.error(f"{args.results} has no recipe that was run with two values of {args.option} on the same fold")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    share = axes.twinx()
    for recipe, points in curves.items():
        at, means = sorted(points), {v: np.mean(x, axis=0) for v, x in points.items()}
        errors = [np.std([x for x, _ in points[v]], ddof=1) / len(points[v]) ** 0.5 if points[v][1:] else 0 for v in at]
        axes.errorbar(at, [means[v][0] for v in at], yerr=errors, marker="o", capsize=3, label=recipe)
        share.plot(at, [means[v][1] for v in at], linestyle=":", color="grey")
        for v in at:
            score, taken = means[v]
            print(f"{recipe}: {args.option} {v:g}: {score:.3f}, participation {taken:.2f}, {len(points[v])} runs")
    axes.set(xlabel=args.option, ylabel="test accuracy" if column == "test" else "validation accuracy")
    share.set(ylabel="share of tokens that take part (dotted)", ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    write_figure(args.out, figure)
    return 0


def common(by_value: dict[float, dict[tuple[str, str], tuple[float, float]]]) -> dict[float, list[tuple[float, float]]]:
    """The points of every value, of the runs (fold, seed) that all values have."""
    runs = sorted(set.intersection(*(set(points) for points in by_value.values())))
    return {value: [points[run] for run in runs] for value, points in by_value.items()}


if __name__ == "__main__":
    sys.exit(main())
