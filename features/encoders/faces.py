"""Where the largest face of a picture lies, by MTCNN: three small networks, which an installed package holds.

Zhang et al., Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks, 2016.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from features.encoders.registry import weights_id
from features.errors import FeaturesError

PACKAGE, FILES = "facenet_pytorch", ("data/pnet.pt", "data/rnet.pt", "data/onet.pt")
SIDE = 256  # pixels of the longer side of a picture that is looked at
AT_ONCE = 32  # pictures: a long clip is looked at many times
LEAST = 20  # pixels of the smallest face in it, the least that it learned on


class Face(NamedTuple):
    """Numbers of one face in each picture, in pixels; NaN where there is none.

    centre: (N, 2) x and y of its box; side: (N,) the box's longer side; mouth: (N, 2), between the mouth's corners;
    height: (N,) from between the eyes to there.
    """

    centre: np.ndarray
    side: np.ndarray
    mouth: np.ndarray
    height: np.ndarray


def identity() -> dict[str, Any]:
    """What a store's spec says of the detector. Raises FeaturesError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FeaturesError(
            "--video.crop face and mouth need the package facenet-pytorch: pip install 'clcr-pipeline[encoders]'"
        )
    return {"name": "mtcnn", "weights": [weights_id(str(Path(spec.origin).parent / file)) for file in FILES]}


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """The detector, on the CPU, once per process."""
    from facenet_pytorch import MTCNN

    return MTCNN(min_face_size=LEAST)


def find_faces(pictures: np.ndarray) -> Face:
    """The largest face of each picture; pictures: (N, H, W, 3) uint8."""
    from PIL import Image

    height, width = pictures.shape[1:3]
    shrink = max(1.0, max(height, width) / SIDE)
    size = round(width / shrink), round(height / shrink)
    boxes, points = np.full((len(pictures), 4), np.nan), np.full((len(pictures), 5, 2), np.nan)
    if min(size) >= LEAST:  # smaller ones it does not take
        small = [np.asarray(Image.fromarray(picture).resize(size)) for picture in pictures]
        for first in range(0, len(small), AT_ONCE):
            found, _, landmarks = load().detect(np.stack(small[first : first + AT_ONCE]), landmarks=True)
            for number, (box, marks) in enumerate(zip(found, landmarks, strict=True), first):
                if box is not None:  # the largest is the first
                    boxes[number], points[number] = box[0], marks[0]
    boxes, points = boxes * shrink, points * shrink
    eyes, mouth = points[:, :2].mean(axis=1), points[:, 3:].mean(axis=1)
    corners = boxes[:, :2], boxes[:, 2:]
    sides = (corners[1] - corners[0]).max(axis=1)
    return Face(sum(corners) / 2, sides, mouth, np.linalg.norm(mouth - eyes, axis=1))
