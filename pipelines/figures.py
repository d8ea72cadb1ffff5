"""Pictures that jobs put beside their numbers."""

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
