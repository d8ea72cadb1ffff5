"""Pictures of a search, drawn by Optuna: they need no browser and are logged as artifacts of the parent run."""

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from optuna.trial import TrialState, create_trial
from optuna.visualization import matplotlib as plots

from tuning.objectives import SCORE, Objective
from tuning.study import finished, objectives_of, own_trials, reached

LEAST = 3  # trials that a picture needs at least
SHOWN = 8  # options shown in one picture, the most important ones
LEGEND = 10  # curves that a legend can name at most


def write_pictures(study: optuna.Study, folder: str | Path) -> list[str]:
    """Write curves, history, parallel coordinates, importance, contour, scatter and Pareto front; returns their names.

    Writes nothing if there are too few trials, or none that differ. A trial that was stopped early counts with the best
    score that it had by then.
    """
    with warnings.catch_warnings(), matplotlib.rc_context({"backend": "Agg", "figure.max_open_warning": 0}):
        warnings.simplefilter("ignore")  # Optuna calls its plots experimental
        figures = _figures(study)
        for name, figure in figures.items():
            figure.savefig(Path(folder) / name, dpi=150, bbox_inches="tight")
            plt.close(figure)
    return list(figures)


def _figures(study: optuna.Study) -> dict[str, Figure]:
    objectives = objectives_of(study)
    scores = scores_of(study, objectives[0])
    trials = scores.get_trials(deepcopy=False)
    always = [n for n in trials[0].params if all(n in trial.params for trial in trials)] if trials else []
    varied = [n for n in always if len({trial.params[n] for trial in trials}) > 1]  # without options of a condition
    if len(trials) < LEAST or len(varied) < 2 or len({trial.value for trial in trials}) < 2:
        return {}
    score = "score" if objectives[0].metric == SCORE else objectives[0].metric.removeprefix("best/")
    importance = optuna.importance.get_param_importances(scores, params=varied)
    first = list(importance)[:SHOWN]
    stopped = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    note = f"\n{stopped} of {len(trials)} trials were stopped early and count with their best score" if stopped else ""

    def drawn(plot: Callable, title: str, inches: tuple[float, float] = (9, 5), **options: list[str]) -> Figure:
        return _figure(plot(scores, target_name=objectives[0].metric, **options), title, inches)

    pictures = {
        "history.png": drawn(plots.plot_optimization_history, f"Best {score} so far"),
        "parallel.png": drawn(plots.plot_parallel_coordinate, "Trials" + note, (15, 6), params=first),
        "importance.png": drawn(plots.plot_param_importances, f"Importance for the {score}{note}", params=varied),
        "contour.png": drawn(plots.plot_contour, score.capitalize() + note, (8, 6), params=contour_pair(importance)),
        "scatter.png": drawn(
            plots.plot_slice, f"{score.capitalize()} by option{note}", (2.6 * len(first), 4), params=first
        ),
    }
    if len(objectives) == 1:
        pictures["curves.png"] = _figure(plots.plot_intermediate_values(study), f"Best {score} by epoch")
    else:  # of four objectives and more the first three
        pictures["pareto.png"] = front_figure(finished(study), objectives[:3])
    return pictures


def front_figure(study: optuna.Study, objectives: Sequence[Objective]) -> Figure:
    """A panel for each pair of objectives, with the front's trials: points in space hide how far away they are."""
    trials, front = study.get_trials(deepcopy=False), {trial.number for trial in study.best_trials}
    pairs = list(combinations(range(len(objectives)), 2))
    figure, panels = plt.subplots(1, len(pairs), squeeze=False, figsize=(6 * len(pairs), 5), layout="constrained")
    for panel, (x, y) in zip(panels[0], pairs, strict=True):
        for color, label, on in (("tab:gray", "trial", False), ("tab:red", "Pareto front", True)):
            points = [trial.values for trial in trials if (trial.number in front) == on]
            panel.scatter([p[x] for p in points], [p[y] for p in points], color=color, label=label, zorder=2 + on)
        for axis, number in ((panel.set_xlabel, x), (panel.set_ylabel, y)):
            better = "more" if objectives[number].direction == "maximize" else "less"
            axis(f"{objectives[number].metric.removeprefix('best/')} ({better} is better)")
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle(f"Pareto front: {len(front)} of {len(trials)} trials")
    return figure


def scores_of(study: optuna.Study, objective: Objective) -> optuna.Study:
    """A copy in memory with one objective and stopped trials marked complete, as the plots need."""
    copy = optuna.create_study(direction=objective.direction)
    for trial in own_trials(study, TrialState.COMPLETE, TrialState.PRUNED):
        value = reached(trial)[objective.metric]
        copy.add_trial(create_trial(params=trial.params, distributions=trial.distributions, value=value))
    return copy


def contour_pair(importance: dict[str, float]) -> list[str]:
    """The two options to draw: the most important of the budget and of the loss weights, or else of all options."""
    ranked = list(importance)  # most important first
    budgets = [name for name in ranked if name.startswith("budget.")]
    losses = [name for name in ranked if name.startswith("loss.")]
    return [budgets[0], losses[0]] if budgets and losses else ranked[:2]


def _figure(axes: Any, title: str, inches: tuple[float, float] = (9, 5)) -> Figure:
    panels = np.atleast_1d(axes).ravel()
    figure = panels[0].figure
    for panel in panels:
        panel.set_title("")
        panel.set_title("", loc="left")
        if (legend := panel.get_legend()) and len(legend.get_texts()) > LEGEND:
            legend.remove()
    figure.suptitle(title, y=0.95 + 0.04 * title.count("\n"))
    figure.set_size_inches(*inches)
    return figure
