"""A crop that follows the largest face of a clip, or its mouth: `--video.crop face` and `mouth`.

A detector looks at some of the clip's frames. The crop is a square of one size, the median of what it finds; its place
is smoothed over time, and inside the picture. A clip without a face shows the largest square in the picture's middle.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from features.encoders.faces import Face, find_faces

What = Literal["face", "mouth"]
MARGIN = 1.3  # sides of the face's box that its crop is wide
MOUTH = 1.8  # distances from the eyes to the mouth that its crop is wide
LOOKS = 3  # frames that are looked at, at least; one a second of longer clips
BYTES = 500_000_000  # of a clip's whole pictures at most, which are read smaller where they are more


class Window(NamedTuple):
    """Squares to cut out of N pictures. left, top: (N,) pixels; side: pixels."""

    left: np.ndarray
    top: np.ndarray
    side: float


def picture_size(width: int, height: int, frames: int) -> tuple[int, int]:
    """Width and height in pixels that so many whole pictures are read at: their own, where memory suffices."""
    shrink = max(1.0, math.sqrt(3 * width * height * frames / BYTES))
    return max(1, round(width / shrink)), max(1, round(height / shrink))


def follow(pictures: np.ndarray, times: np.ndarray, what: What, size: int) -> tuple[np.ndarray, float]:
    """(N, H, W, 3) uint8 at times (s, sorted) to (N, size, size, 3); and the share of looks that found a face."""
    count = min(len(times), max(LOOKS, round(times[-1] - times[0])))
    looks = ((np.arange(count) + 0.5) * len(times) / count).astype(int)
    faces = find_faces(pictures[looks])
    height, width = pictures.shape[1:3]
    window = place(faces, times[looks], times, what, width, height)
    return cut(pictures, window, size), float(np.isfinite(faces.side).mean())


def place(faces: Face, looked: np.ndarray, times: np.ndarray, what: What, width: int, height: int) -> Window:
    """Where to cut pictures at times (s), from the faces at the times that were looked at."""
    found = np.isfinite(faces.side)
    if found.any():
        centres, sides = (faces.mouth, MOUTH * faces.height) if what == "mouth" else (faces.centre, MARGIN * faces.side)
        side = min(float(np.median(sides[found])), width, height)
        at = [np.interp(times, looked[found], axis) for axis in _steadied(centres[found]).T]
    else:
        side = min(width, height)
        at = [np.full(len(times), length / 2) for length in (width, height)]
    left, top = ((middle - side / 2).clip(0, length - side) for middle, length in zip(at, (width, height), strict=True))
    return Window(left, top, side)


def _steadied(centres: np.ndarray) -> np.ndarray:
    """(N, 2): each the median of itself and its neighbours, so that one wrong look moves nothing."""
    padded = np.concatenate([centres[:1], centres, centres[-1:]])
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def cut(pictures: np.ndarray, window: Window, size: int) -> np.ndarray:
    """The window of each picture, scaled to size x size pixels."""
    from PIL import Image

    squares = [
        Image.fromarray(picture).resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + window.side, top + window.side)
        )
        for picture, left, top in zip(pictures, window.left, window.top, strict=True)
    ]
    return np.stack([np.asarray(square) for square in squares])
