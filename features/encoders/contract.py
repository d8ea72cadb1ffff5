"""The contract of an encoder: what it takes, what it gives, and when in a clip each of its tokens lies.

A clip is a row of units: frames (`--video.fps` a second), or samples of sound (at the encoder's own rate). The encoder
sees `window` units at once, and makes `tokens` tokens of them. The next window begins `hop` units later. So a token
covers hop / tokens units: token k of a clip the seconds from k / rate to (k + 1) / rate. What a window shows around
them is context. An image is one unit, and a text is given as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np


class Encoder:
    """A frozen network, or any function, from windows of a clip to tokens: subclass it, and define the call.

    Everything but `load` and the call must work before weights are loaded: it is asked before any clip is read.
    """

    shape: tuple[int, ...] = ()
    """One token: (D,), or (L, D) for layers from early to late, which CLCR reads as levels."""
    identity: Mapping[str, Any] = MappingProxyType({})
    """JSON values that change whenever the numbers do; empty: a hash of the file that defines the class."""
    size: int = 0
    """Width and height in pixels of the pictures that it takes; 0 = what --video.size or --image.size says."""
    sample_rate: int = 0
    """Samples per second that it takes; an encoder of sound must say."""
    window: int = 1
    """Frames, or samples, that it sees at once."""
    hop: int = 1
    """Frames, or samples, from one window to the next."""
    lead: int | None = None
    """Units of a window that lie before what its tokens cover; None = (window - hop) // 2, half of the context."""
    tokens: int = 1
    """Tokens that it makes of one window."""
    batch: int = 128
    """Windows that go through it at once where the batch is shared by many clips."""

    def load(self, device: str) -> None:
        """Load the weights onto a device of torch's, once per process."""

    def prepare(self, values: np.ndarray) -> np.ndarray:
        """What is done to all of a clip before it is cut into windows, such as normalising its sound."""
        return values

    def __call__(self, windows: Any) -> np.ndarray:
        """N windows to tokens, (N, tokens, *shape), or (N, *shape) where each makes one.

        windows: of pictures (N, window, H, W, 3) uint8, without the second axis where window is 1; of sound
        (N, window) float32 in [-1, 1]. An encoder of text takes one str, and gives (T, *shape).
        """
        raise NotImplementedError

    def rate(self, units: float) -> float:
        """Tokens per second, where the clip has so many units per second."""
        return units * self.tokens / self.hop


@dataclass(frozen=True)
class Asked:
    """The options that name one encoder; two equal ones are the same encoder.

    name: as in --video.encoder; modality: video, audio, image or text; weights: a file or a name; layers: counted from
    1, none = thirds of the way up; grid: regions per side that an image's tokens stand for; span: seconds of sound that
    the network sees at once; stride: seconds of sound, or frames, from one window to the next (0 = the network's own).
    """

    name: str
    modality: str
    weights: str = ""
    layers: tuple[int, ...] = ()
    grid: int = 1
    span: float = 0.0
    stride: float = 0.0

    @property
    def option(self) -> str:
        """The option that named it, for messages."""
        return f"--{self.modality}.encoder {self.name}"


def thirds(depth: int) -> tuple[int, ...]:
    """A third, two thirds and all of the way up so many layers, counted from 1."""
    return tuple(sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)}))
