"""Pictures that jobs write with their numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def confusion_figure(counts: np.ndarray, classes: tuple[str, ...], title: str) -> Figure:
    """A confusion matrix: row = true class, column = predicted class, shade = share of the row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(3 + 0.35 * len(classes), 14)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 6 else 0)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:d}", ha="center", va="center", color=shade)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def weights_figure(omega: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> Figure:
    """Left: level weights by task, (clips, K) each, mean and spread over clips; right: modality weights, (clips,)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    levels = next(iter(omega.values())).shape[1]
    width = 0.8 / levels
    for level in range(levels):
        places = np.arange(len(omega)) + (level - (levels - 1) / 2) * width
        means, spreads = zip(*((o[:, level].mean(), o[:, level].std()) for o in omega.values()), strict=True)
        left.bar(places, means, width, yerr=spreads, capsize=2, label=f"level {level}", color=f"C{level}")
    left.set_xticks(range(len(omega)), list(omega))
    left.set(ylabel="omega (sums to 1)", ylim=(0, 1), title="level weights by task")
    left.legend(fontsize=8)
    means, spreads = zip(*((w.mean(), w.std()) for w in weights.values()), strict=True)
    right.barh(range(len(weights)), means, xerr=spreads, capsize=2, color="0.6")
    right.set_yticks(range(len(weights)), list(weights))
    right.invert_yaxis()
    right.set(xlim=(0, 1), title="modality weights")
    figure.suptitle("test split: mean and standard deviation over clips", fontsize=9)
    return figure


def participation_figure(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Participation rate over epochs: (epoch, rate) by "level/modality"; the paper's best is marked."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(dict.fromkeys(name.split("/")[1] for name in history), ("-", "--", ":", "-."), strict=False))
    for name, points in history.items():
        level, modality = name.split("/")
        axes.plot(
            *zip(*points, strict=True), styles.get(modality, "-"), color=f"C{level}", label=f"level {level} {modality}"
        )
    axes.axhline(0.68, color="0.7", linewidth=1, zorder=0)
    axes.annotate("0.68, the paper's best", (0, 0.68), fontsize=7, color="0.4", va="bottom")
    axes.set(xlabel="epoch", ylabel="participation rate (val)", ylim=(0, 1.02))
    axes.legend(fontsize=7, ncols=2)
    return figure
