"""How clips become numbers: the options of each modality, and what a clip becomes. Loads no decoder and no torch."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from features.quality import QualitySpec
from features.store.reader import Feature

Sampling = Literal["exact", "nonref", "keyframes"]


@dataclass(frozen=True)
class VideoSpec:
    """How a clip's frames are sampled: fps per second of the clip, size x size pixels of the cropped picture."""

    fps: float = 12.5
    """Frames sampled per second."""
    size: int = 64
    """Width and height of a sampled frame in pixels."""
    crop: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom as fractions of the picture; none takes all of it."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto is decord for whole files, and PyAV for segments and for files that decord does not read or that are
    damaged. decord alone fails on those files."""
    sampling: Sampling = "exact"
    """exact: the frame on screen at each time. The others decode fewer frames, by PyAV, and take the last of those
    before each time. nonref leaves out the frames that no other refers to: it is late by a few frames, and faster
    where a file has B-frames (else the same). keyframes decodes key frames alone: it is late by up to their distance,
    often seconds, so that motion is lost, and several times faster."""

    def __post_init__(self) -> None:
        left, top, right, bottom = self.crop or (0.0, 0.0, 1.0, 1.0)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"crop {self.crop} is not left < right, top < bottom within 0 and 1")
        if not (self.fps > 0 and self.size > 0):
            raise ValueError(f"fps {self.fps} and size {self.size} must be above 0")
        if self.decoder == "decord" and self.sampling != "exact":
            raise ValueError(f"decord decodes every frame; sampling {self.sampling} needs decoder auto or pyav")
        if self.decoder == "decord" and decord_misreads(self.window()[0]):
            raise ValueError(
                f"decord misreads pictures {self.window()[0]} pixels wide; set decoder auto, or another size"
            )

    def window(self) -> tuple[int, int, int, int]:
        """Width and height the whole picture is scaled to, and where the crop's left and top edge then lie (pixels)."""
        left, top, right, bottom = self.crop or (0.0, 0.0, 1.0, 1.0)
        width, height = round(self.size / (right - left)), round(self.size / (bottom - top))
        return width, height, min(round(left * width), width - self.size), min(round(top * height), height - self.size)


def decord_misreads(width: int) -> bool:
    """Rows are padded to 32 pixels; where that is a whole multiple of the width, decord takes it for more channels."""
    row = 3 * 32 * -(-width // 32)
    return row % width == 0 and row != 3 * width


@dataclass(frozen=True)
class AudioSpec:
    """How sound becomes log-mel frames."""

    sample_rate: int = 16_000
    """Samples per second that the sound is resampled to."""
    mels: int = 64
    """Mel bands."""
    hop: float = 0.02
    """Seconds from one log-mel frame to the next."""
    window: float = 0.04
    """Seconds of sound that one log-mel frame sees."""

    def __post_init__(self) -> None:
        if not (self.sample_rate > 0 and self.mels > 0 and 0 < self.hop <= self.window):
            raise ValueError(f"{self}: sample_rate and mels must be above 0, and 0 < hop <= window")
        if abs(self.hop * self.sample_rate - round(self.hop * self.sample_rate)) > 1e-6:
            raise ValueError(f"hop {self.hop} s is not a whole number of samples at {self.sample_rate} Hz")


@dataclass(frozen=True)
class Sample:
    """features: `{modality: (T, *shape)}`, absent modalities left out; duration in seconds; quality: see quality.py."""

    features: Mapping[str, np.ndarray]
    duration: float
    quality: Mapping[str, float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSpec:
    """How clips become numbers: one spec per modality, None where a store leaves it out; and which are good enough."""

    video: VideoSpec | None
    audio: AudioSpec | None
    quality: QualitySpec = field(default_factory=QualitySpec)

    def features(self) -> dict[str, Feature]:
        """What the store's spec says about each modality."""
        features, quality = {}, dict(vars(self.quality))  # the thresholds decide which clips are there
        if (v := self.video) is not None:
            decoder = resolve_decoder(v.decoder) if v.sampling == "exact" else "pyav"
            encoder = {"name": "frames", **vars(v), "decoder": decoder, "quality": quality}
            features["video"] = Feature((v.size, v.size, 3), "uint8", v.fps, encoder)
        if (a := self.audio) is not None:
            encoder = {"name": "log_mel", **vars(a), "quality": quality}
            features["audio"] = Feature((a.mels,), "float16", 1 / a.hop, encoder)
        return features


def resolve_decoder(decoder: str) -> str:
    """The decoder that auto stands for on this machine: decord or pyav."""
    if decoder == "auto":
        return "pyav" if importlib.util.find_spec("decord") is None else "decord"
    return decoder
