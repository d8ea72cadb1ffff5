"""A contact sheet: some clips of a store as a person sees and hears them, frames over log-mel on one time axis.

What is drawn is what a model gets: the stored arrays, placed by the rates in store.json. Features that are neither
pictures (height, width, 3) nor vectors (bands,) are named with their shape.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from features.errors import StoreError
from features.files import open_fs, write_atomic
from features.store.reader import Store
from features.store.spec import Feature

DPI = 150
CELL = 7.6  # inches that a clip's time axis is wide
FRAME = 0.9  # inches, about, that one frame is wide
BANDS = 1.1  # inches that a row of vectors is high
LEFT, RIGHT, TITLE, AXIS, TOP = 0.6, 0.2, 0.3, 0.5, 0.4  # inches around and above a cell
TITLE_LENGTH = 100  # characters
EMPTY = "#ececec"


Strip = Callable[[Axes, Mapping[str, Any]], None]  # draws into axes in seconds what it knows of a sample


def contact_sheet(
    store: Store,
    clips: int = 6,
    seed: int = 0,
    split: str | None = None,
    strips: Mapping[str, Strip] | None = None,
    fold: int | None = None,
) -> Figure:
    """Draw randomly sampled clips, in the order in which they lie in the store; under each its further strips.

    fold: of cross-validation, as `Store.index` has it. Raises StoreError for a split without clips.
    """
    rows = choose(store, clips, seed, split, fold)
    heading = f"{store.uri}    {len(rows)} clips of {split or 'any split'}, seed {seed}"
    return draw_clips(store, rows, heading, strips)


def draw_clips(
    store: Store,
    rows: Sequence[Mapping[str, Any]],
    heading: str,
    strips: Mapping[str, Strip] | None = None,
    columns: int = 2,
) -> Figure:
    """Draw the clips of some rows of the index, in their order, below a heading; under each its further strips."""
    samples = [store.read(row["shard"], row["offset"], row["nbytes"]) for row in rows]
    features = store.spec.features
    strips = strips or {}
    heights = {name: _height(feature) for name, feature in features.items()} | dict.fromkeys(strips, BANDS)
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    cell = TITLE + sum(heights.values()) + AXIS
    width, height = columns * (LEFT + CELL + RIGHT), TOP + lines * cell
    figure = Figure(figsize=(width, height), dpi=DPI)
    _text(figure, 0.1 / width, 1 - TOP / 2 / height, heading, size=10, weight="bold", va="center")
    colours = {name: _colour_range([sample[name] for sample in samples if name in sample]) for name in features}
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        line, column = divmod(number, columns)
        left, top = column * (LEFT + CELL + RIGHT) + LEFT, height - TOP - line * cell - TITLE
        _text(figure, left / width, (top + 0.07) / height, describe(row, store), size=9, va="bottom")
        spans = [len(sample[m]) / f.rate for m, f in features.items() if m in sample and f.rate]
        duration = max([row["duration"], *spans]) or 1.0  # a clip without time is as long as its axis
        for name in heights:
            top -= heights[name]
            axes = figure.add_axes((left / width, top / height, CELL / width, (heights[name] - 0.03) / height))
            axes.set(xlim=(0, duration), facecolor=EMPTY, yticks=[])
            axes.set_ylabel(name, fontsize=8)
            if name in features:
                _draw(axes, sample.get(name), name, features[name], duration, colours[name])
            else:
                strips[name](axes, sample)
            last = name == list(heights)[-1]
            axes.tick_params(axis="x", labelsize=7, labelbottom=last, length=3 if last else 0)
        timed = row["duration"] or spans
        axes.set_xlabel("seconds" if timed else "in order, without time", fontsize=7, labelpad=1)
    return figure


def choose(store: Store, clips: int, seed: int, split: str | None, fold: int | None = None) -> list[dict[str, Any]]:
    """Randomly sampled rows of the index, each once, in the index's order; all of them where there are fewer."""
    columns = ["clip_id", "split", "shard", "offset", "nbytes", "duration"]
    index = store.index(split, columns + [f"label_{task.name}" for task in store.spec.tasks], fold)
    if not len(index):
        splits = ", ".join(store.spec.splits)
        raise StoreError(f"{store.uri} has no indexed clip in {split or 'any split'}; its splits are {splits}")
    lot = np.random.default_rng(seed).permutation(len(index))[:clips]
    drawn = index.take(np.sort(lot)).to_pylist()
    return drawn if fold is None else [row | {"split": split} for row in drawn]  # not the manifest's split


def describe(row: Mapping[str, Any], store: Store) -> str:
    """A clip's heading: clip_id, split, seconds and labels; the middle of one that is too long is left out."""
    labels = {task.name: row[f"label_{task.name}"] for task in store.spec.tasks}
    values = [f"{name} {_label(value)}" for name, value in labels.items()]
    rest = "   ".join(["", row["split"], f"{row['duration']:.2f} s", *values])
    clip_id = row["clip_id"]
    rest = _shortened(rest, TITLE_LENGTH - min(len(clip_id), TITLE_LENGTH // 3))
    return _shortened(clip_id, TITLE_LENGTH - len(rest)) + rest


def _label(value: Any) -> str:
    if isinstance(value, list):  # events
        return " ".join(event["label"] for event in value) or "none"
    return "-" if value is None else str(value)


def write_figure(uri: str, figure: Figure) -> None:
    """Write a figure as PNG to a path or URI, whole or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a clip_id in a script that the font lacks
        figure.savefig(buffer, format="png", dpi=DPI)
    fs, path = open_fs(uri)
    write_atomic(fs, path, buffer.getvalue())


def _height(feature: Feature) -> float:
    """Inches that a modality's strip is high: frames keep their shape and fill the width."""
    if not _is_picture(feature):
        return BANDS
    tall, wide = feature.shape[:2]
    return CELL / _frames_across(feature) * tall / wide


def _is_picture(feature: Feature) -> bool:
    return len(feature.shape) == 3 and feature.shape[2] == 3 and feature.dtype == "uint8"


def _frames_across(feature: Feature) -> int:
    tall, wide = feature.shape[:2]
    return max(1, round(CELL / FRAME * math.sqrt(tall / wide)))


def _draw(
    axes: Axes,
    values: np.ndarray | None,
    name: str,
    feature: Feature,
    duration: float,
    colours: tuple[float, float] | None,
) -> None:
    if values is None:
        _note(axes, f"no {name}")
    elif _is_picture(feature):
        _draw_frames(axes, values, feature, duration)
    elif len(feature.shape) == 1:
        extent = (0, len(values) / feature.rate if feature.rate else duration, 0, feature.shape[0])
        values = values.astype(np.float32)
        low, high = colours or (None, None)
        if feature.encoder.get("name") != "log_mel":  # numbers of a vector may be of any kinds: each has its own scale
            values, low, high = _by_row(values), 0.0, 1.0
        axes.imshow(
            values.T,
            aspect="auto",
            origin="lower",
            extent=extent,
            cmap="magma",
            vmin=low,
            vmax=high,
            interpolation="nearest",
        )
        axes.set_xlim(0, duration)
        axes.set_yticks([0, feature.shape[0]])
        axes.tick_params(axis="y", labelsize=6, length=2)
    else:
        _note(axes, f"{len(values)} tokens of {feature.dtype} {list(feature.shape)}")


def _by_row(values: np.ndarray) -> np.ndarray:
    """(T, D) vectors with each of their D numbers scaled to 0-1 over the clip; one that stands still is in between."""
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)


def _draw_frames(axes: Axes, values: np.ndarray, feature: Feature, duration: float) -> None:
    """Evenly spaced frames side by side, each centred at the time it was shown; blank where the video has ended."""
    across, span = _frames_across(feature), len(values) / feature.rate
    count, width = min(len(values), max(1, round(across * span / duration))), duration / across
    for time in (np.arange(count) + 0.5) * span / count:
        left = max(0.0, time - width / 2)
        extent = (left, left + 0.98 * width, 0, 1)
        axes.imshow(values[int(time * feature.rate)], aspect="auto", extent=extent, interpolation="antialiased")
    axes.set(xlim=(0, duration), ylim=(0, 1))


def _colour_range(arrays: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """One range for all clips, so that a quiet one looks quiet; the few most extreme values do not set it."""
    if not arrays or not all(array.ndim == 2 for array in arrays):
        return None
    low, high = np.percentile(np.concatenate([array.ravel().astype(np.float32) for array in arrays]), (1, 99.8))
    return float(low), float(high)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color="#777777")


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text as it stands: a $ in a clip_id is no formula."""
    figure.text(x, y, text, parse_math=False, **style)


def _shortened(text: str, length: int) -> str:
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
