"""Figures of the report as SVG text, and the worst clips as a small JPEG: what is needed to see, and few bytes."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipelines.evaluation.scores import Figures, Scored

COLOURS = ("#3366aa", "#cc5500", "#2a8a4a", "#8844aa", "#aa2244", "#777777", "#0099aa", "#aa8800")
CELLS = 12  # classes up to which a confusion matrix shows its numbers
NAMES = 40  # classes up to which it names them
POINTS = 2000  # of a scatter plot
# Any: matplotlib's hint lists its hundreds of keys one by one.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "font.family": "sans-serif"}
SHEET_DPI = 90


def to_svg(figure: Figure) -> str:
    """A figure as an <svg> element; text stays text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_jpeg(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=SHEET_DPI, pil_kwargs={"quality": 80})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def noise_figure(curves: Mapping[str, Mapping[str, Figures]], figure: str) -> Figure:
    """A modality's panel each: the figure over the level of noise, a line per model; curves: by model and modality."""
    modalities = list(dict.fromkeys(m for by_modality in curves.values() for m in by_modality))
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(3.4 * len(modalities), 2.6))
        panels = picture.subplots(1, len(modalities), squeeze=False, sharey=True)[0]
        for panel, modality in zip(panels, modalities, strict=True):
            for colour, (model, by_modality) in _coloured(curves):
                if curve := by_modality.get(modality):
                    values = [point.get(figure, math.nan) for point in curve["figures"]]
                    panel.plot(curve["levels"], values, "o-", color=colour, label=model, markersize=3)
            panel.set(xlabel="noise (standard deviations)", title=f"noise in {modality}")
            if figure == "accuracy":
                panel.set_ylim(0, 1.02)
        panels[0].set_ylabel(figure)
        panels[-1].legend(frameon=False, fontsize=8)
    return picture


def reliability_figure(calibrations: Mapping[str, Figures]) -> Figure:
    """A model's panel each: accuracy over confidence, as it is and at the fitted temperature."""
    columns = min(4, len(calibrations))
    lines = -(-len(calibrations) // columns)
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(2.7 * columns, 2.7 * lines), layout="constrained")
        panels = picture.subplots(lines, columns, squeeze=False).ravel()
        for panel in panels[len(calibrations) :]:
            panel.remove()
        for panel, (model, found) in zip(panels, calibrations.items(), strict=False):
            panel.plot((0, 1), (0, 1), color="#bbbbbb", linewidth=1)
            for name, entry, colour in (("as it is", found, COLOURS[0]), ("scaled", found.get("scaled"), COLOURS[1])):
                if entry and entry["bins"]:
                    x, y, n = ([b[key] for b in entry["bins"]] for key in ("confidence", "accuracy", "n"))
                    panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
                    sizes = [4 + 150 * count / sum(n) for count in n]
                    panel.scatter(x, y, sizes, color=colour, alpha=0.7, linewidths=0, clip_on=False, label=name)
            panel.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title=model)
            for mark in panel.legend(frameon=False, fontsize=7).legend_handles:
                mark.set_sizes([16])
    return picture


def confusion_picture(confusion: Figures) -> Figure:
    """Shares of each label's rows by predicted class; numbers in the cells of a small one."""
    labels, counts = confusion["labels"], np.array(confusion["counts"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(7.0, max(2.6, 0.36 * len(labels) + 1.2))
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(side, side))
        panel = picture.subplots()
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        panel.set(xlabel="predicted", ylabel="label")
        if len(labels) <= NAMES:
            panel.set_xticks(range(len(labels)), [_short(name) for name in labels], rotation=90, fontsize=7)
            panel.set_yticks(range(len(labels)), [_short(name) for name in labels], fontsize=7)
        if len(labels) <= CELLS:
            for row, column in np.ndindex(counts.shape):
                colour = "white" if shares[row, column] > 0.55 else "#333333"
                panel.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    return picture


def residual_figure(scored: Scored, seed: int) -> Figure:
    """Predicted over true numbers (some of many), and the histogram of what lies between them."""
    picked = np.random.default_rng(seed).permutation(len(scored.truth))[:POINTS]
    truth, guess = scored.truth[picked], scored.guess[picked]
    with matplotlib.rc_context(STYLE):
        picture = Figure(figsize=(6.4, 2.7), layout="constrained")
        left, right = picture.subplots(1, 2)
        left.scatter(truth, guess, s=6, color=COLOURS[0], alpha=0.5, linewidths=0, rasterized=len(picked) > 500)
        span = (min(truth.min(), guess.min()), max(truth.max(), guess.max()))
        left.plot(span, span, color="#bbbbbb", linewidth=1)
        left.set(xlabel="label", ylabel="predicted")
        right.hist(scored.guess - scored.truth, bins=30, color="#c8d6ea")
        right.axvline(0, color="#bbbbbb", linewidth=1)
        right.set(xlabel="predicted - label", ylabel="clips")
    return picture


def _coloured(by_model: Mapping[str, Any]) -> list[tuple[str, tuple[str, Any]]]:
    return [(COLOURS[i % len(COLOURS)], item) for i, item in enumerate(by_model.items())]


def _short(name: str, length: int = 18) -> str:
    return (name if len(name) <= length else f"{name[: length - 1]}…").replace("$", r"\$")


def worst_sheet(store: Any, rows: Sequence[Mapping[str, Any]], model: Any, what: str) -> str:
    """The clips of these rows as a model sees them, frames over log-mel; of a CLCR also what its budget admits."""
    import clcr
    from features.store.sheet import draw_clips
    from pipelines.evaluation.strips import alpha_strips

    strips = alpha_strips(model) if isinstance(model, clcr.CLCR) else {}
    return to_jpeg(draw_clips(store, rows, what, strips, columns=1))
