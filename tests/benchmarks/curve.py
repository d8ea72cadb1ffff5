"""Draw what one option is worth: the score over its values, and the share of tokens that took part.

    python -m tests.benchmarks.curve --results utd_budget.csv --option budget.gamma --default 1 --out clcr/budget.png

Reads rows of `fusion`, a panel for each file; recipes that differ in the option alone make a curve, those that do not
name it have --default. Compared are the folds and seeds that every value has; bars are standard errors over them.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from features.store.sheet import write_figure
from tests.benchmarks.fusion import column_of, rows_of

RUN = ("corpus", "folds", "fold", "seed")  # what two runs of a curve have in common
Run = tuple[str, ...]
Point = tuple[float, float]  # score, share of tokens that took part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="csv files of fusion")
    parser.add_argument("--option", required=True, help="its dotted name")
    parser.add_argument("--default", type=float, required=True, help="its value where a recipe does not name it")
    parser.add_argument("--out", required=True, help="picture to write, as PNG")
    args = parser.parse_args()
    figure = Figure(figsize=(5.4 * len(args.results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(args.results), squeeze=False)[0]
    for file, axes in zip(args.results, panels, strict=True):
        runs = rows_of(file)
        curves = curves_of(runs, args.option, args.default)
        if not curves:
            parser.error(f"{file} has no recipe that was run with two values of {args.option} on the same fold")
        kind = {"test": "test", "last": "validation"}[column_of(runs)]
        axes.set(title=file.stem, xlabel=args.option, ylabel=f"{kind} accuracy")
        draw(axes, curves)
        for recipe, points in curves.items():
            for value, (score, taken) in ((v, np.mean(p, axis=0)) for v, p in points.items()):
                at = f"{args.option} {value:g}: {score:.3f}, participation {taken:.2f}"
                print(f"{recipe}: {at}, {len(points[value])} runs")
    write_figure(args.out, figure)
    return 0


def curves_of(runs: list[dict[str, str]], option: str, default: float) -> dict[str, dict[float, list[Point]]]:
    """Of each recipe that was run with several values, the points by value."""
    column = column_of(runs)
    named = re.compile(rf" {re.escape(option)}=(\S+)")
    found: dict[str, dict[float, dict[Run, Point]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        value = named.search(run["recipe"])
        at = float(value[1]) if value else default
        point = float(run[column]), float(run["participation"] or "nan")
        found[named.sub("", run["recipe"])][at][tuple(run[key] for key in RUN)] = point
    shared = {recipe: common(dict(sorted(values.items()))) for recipe, values in found.items() if len(values) > 1}
    return {recipe: points for recipe, points in shared.items() if any(points.values())}


def draw(axes: Axes, curves: Mapping[str, Mapping[float, list[Point]]]) -> None:
    """Scores with their standard errors; dotted, on the right, the share of tokens."""
    share = axes.twinx()
    for recipe, points in curves.items():
        means = np.array([np.mean(at, axis=0) for at in points.values()])
        scores = [[score for score, _ in at] for at in points.values()]
        errors = [np.std(at, ddof=min(1, len(at) - 1)) / len(at) ** 0.5 for at in scores]
        axes.errorbar(list(points), means[:, 0], yerr=errors, marker="o", capsize=3, label=recipe)
        share.plot(list(points), means[:, 1], linestyle=":", color="grey")
    share.set(ylabel="share of tokens that take part (dotted)", ylim=(0, 1))
    if len(curves) > 1:
        axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)


def common(by_value: Mapping[float, Mapping[Run, Point]]) -> dict[float, list[Point]]:
    """The points of every value, of the runs that all values have."""
    runs = sorted(set.intersection(*(set(points) for points in by_value.values())))
    return {value: [points[run] for run in runs] for value, points in by_value.items()}


if __name__ == "__main__":
    sys.exit(main())
