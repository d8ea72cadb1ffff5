"""Runs over seeds as statistics: mean, interval and a paired test against a reference, in a table and a picture."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from clcr.metrics import main_metric, score
from features.files import resolve, write_text
from features.store.sheet import write_figure
from pipelines.tracking.run import Run

MEAN = "mean"
Results = Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]]  # test metrics by name, seed and task


@dataclass(frozen=True)
class Line:
    """The scores of one recipe over its seeds, by column (each task, and the mean over tasks).

    scores: (seeds,) each. p: p-value of the paired t-test against the reference, corrected for the number of
    comparisons in that column (Benjamini and Hochberg); nan for the reference itself, and where no run differs.
    """

    name: str
    scores: dict[str, np.ndarray]
    p: dict[str, float]

    def mean(self, column: str) -> float:
        """Mean over the seeds."""
        return float(self.scores[column].mean())

    def half_width(self, column: str) -> float:
        """Half the width of the 95 % t interval of the mean; nan for a single seed."""
        return half_width(self.scores[column])


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % t interval of the mean of values (seeds,); nan for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def compare(results: Results, reference: str) -> list[Line]:
    """One line per recipe, in the order of `results`, which has the same seeds under every name.

    A task is scored by its main metric: accuracy, or skill for regression.
    """
    seeds = sorted(results[reference])
    columns = [*results[reference][seeds[0]], MEAN]
    scores = {
        name: {
            column: np.array([score(runs[s]) if column == MEAN else main_metric(runs[s][column]) for s in seeds])
            for column in columns
        }
        for name, runs in results.items()
    }
    others = [name for name in scores if name != reference]
    p: dict[str, dict[str, float]] = {name: dict.fromkeys(columns, float("nan")) for name in scores}
    for column in columns:
        raw = {name: _paired_p(scores[name][column], scores[reference][column]) for name in others}
        tested = [name for name in others if np.isfinite(raw[name])]
        corrected = stats.false_discovery_control([raw[name] for name in tested]) if tested else []
        for name, value in zip(tested, corrected, strict=True):
            p[name][column] = float(value)
    return [Line(name, values, p[name]) for name, values in scores.items()]


def publish(
    out: str,
    run: Run,
    results: Results,
    title: str,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    among: str = "seeds",
) -> None:
    """Print the table, and write table and picture to the output folder and to MLflow.

    The others are tested against the first of `results`. notes: further columns, by name; among: what the second key
    of `results` counts (seeds or folds).
    """
    lines, seeds = compare(results, next(iter(results))), tuple(sorted(next(iter(results.values()))))
    table, figure = markdown(lines, seeds, title, notes, among), interval_figure(lines, title, among)
    means = {f"test/{line.name}/{column}": line.mean(column) for line in lines for column in line.scores}
    texts = {f"{title}.md": table, f"{title}-metrics.md": every_metric(results)}
    write_figure(resolve(f"{title}.png", out), figure)
    for name, text in texts.items():
        write_text(out, name, text)
    print(f"{table}\nwritten to {out}/{title}.md and {title}.png; every metric: {title}-metrics.md", flush=True)
    run.log_metrics(means, step=int(time.time()))  # a later start with more seeds or finalists replaces these
    run.log_figure(figure, f"{title}.png")
    for name, text in texts.items():
        run.log_text(text, name)


def markdown(
    lines: list[Line],
    seeds: tuple[int, ...],
    title: str,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    among: str = "seeds",
) -> str:
    """The table; `*` marks what differs significantly from the first line (corrected p below 0.05)."""
    notes = notes or {}
    columns, noted = list(lines[0].scores), list(notes.get(lines[0].name, {}))
    rows = [f"| {title} | {' | '.join(columns + noted)} |", "|---" * (len(columns) + len(noted) + 1) + "|"]
    for line in lines:
        cells = []
        for column in columns:
            cells.append(_interval(line.scores[column]) + (" *" if line.p[column] < 0.05 else ""))
        cells += [notes[line.name][name] for name in noted]
        rows.append(f"| {line.name} | {' | '.join(cells)} |")
    test = f"paired t-test against {lines[0].name}, corrected for {len(lines) - 1} comparisons (Benjamini-Hochberg)"
    rows += [
        "",
        f"Test split, {among} {', '.join(map(str, seeds))}: mean ± half the 95 % t interval. \\* p < 0.05, {test}.",
    ]
    return "\n".join(rows) + "\n"


def every_metric(results: Results) -> str:
    """A table of all metrics that every run has: a row per task and metric, a column per recipe.

    A metric that several tasks have gets one more row, for its mean over them.
    """
    every = [run for runs in results.values() for run in runs.values()]
    shared = {
        task: [metric for metric in values if metric != "n" and all(metric in run[task] for run in every)]
        for task, values in every[0].items()
    }
    measured: dict[tuple[str, str], tuple[str, ...]] = {}  # the tasks that each row averages
    for task, metrics in shared.items():
        measured |= {(task, metric): (task,) for metric in metrics}
    for metric in dict.fromkeys(metric for _, metric in measured):
        tasks = tuple(task for task in shared if metric in shared[task])
        if len(tasks) > 1:
            measured[MEAN, metric] = tasks
    rows = [f"| metric | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for (name, metric), tasks in measured.items():
        values = [
            np.array([np.mean([run[task][metric] for task in tasks]) for run in runs.values()])
            for runs in results.values()
        ]
        rows.append(f"| {name} {metric} | {' | '.join(map(_interval, values))} |")
    return "\n".join(rows) + "\n"


def _interval(values: np.ndarray) -> str:
    half = half_width(values)
    return f"{values.mean():.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}")


def interval_figure(lines: list[Line], title: str, among: str = "seeds") -> Figure:
    """A panel per column: a dot for every run, mean and 95 % interval; the dashed line is the first recipe's mean."""
    columns = list(lines[0].scores)
    figure = Figure(figsize=(2.2 + 2.6 * len(columns), 1.4 + 0.34 * len(lines)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    heights = np.arange(len(lines))[::-1]
    for axes, column in zip(panels, columns, strict=True):
        axes.axvline(lines[0].mean(column), color="tab:orange", linestyle="--", linewidth=1, zorder=0)
        for line, height in zip(lines, heights, strict=True):
            values = line.scores[column]
            axes.plot(values, np.full(len(values), height), "o", color="0.7", markersize=4, zorder=1)
            half = np.nan_to_num(line.half_width(column))
            differs = line.p[column] < 0.05
            axes.errorbar(
                line.mean(column), height, xerr=half, fmt="D", color="tab:red" if differs else "black", capsize=3, ms=5
            )
        axes.set(xlabel=f"{column} (test)")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(heights, [line.name for line in lines])
    figure.suptitle(f"{title}: dots are {among}, red differs from {lines[0].name} (p < 0.05)", fontsize=10)
    return figure


def _paired_p(values: np.ndarray, reference: np.ndarray) -> float:
    """Two-sided p-value; nan where there is nothing to test: a single seed, or the same difference in all runs."""
    if len(values) < 2 or np.ptp(values - reference) < 1e-9:
        return float("nan")
    return float(stats.ttest_rel(values, reference).pvalue)
