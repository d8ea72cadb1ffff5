"""The networks that encode clips, as a job's options name them: found and looked at once, before anything starts."""

import os
from dataclasses import replace
from typing import Any, TypeVar

from features.decode.specs import AudioSpec, ImageSpec, TextSpec, VideoSpec
from features.encoders import find_encoder, hub
from features.encoders.registry import WEIGHT_FILES, pinned
from features.errors import FeaturesError
from pipelines.common.cli import resolve_uri

Options = TypeVar("Options", VideoSpec, AudioSpec, ImageSpec, TextSpec)


def resolved(modality: str, spec: Options) -> Options:
    """The same options with files, folders and the hub's commits that every process finds.

    Raises FeaturesError for no network.
    """
    option, changes = f"--{modality}.encoder", dict[str, Any]()
    kind, _, place = spec.encoder.partition(":")
    if kind in ("onnx", "voice") or (kind == "hf" and _is_folder(place)):
        changes["encoder"] = f"{kind}:{resolve_uri(option, place)}"
    elif modality == "text" and _is_folder(spec.encoder):
        changes["encoder"] = resolve_uri(option, spec.encoder)
    weights = getattr(spec, "weights", "")
    if weights.endswith(WEIGHT_FILES):
        changes["weights"] = resolve_uri(f"--{modality}.weights", weights)
        if not os.path.isfile(changes["weights"]):
            raise FeaturesError(f"--{modality}.weights {weights}: there is no such file")
    spec = replace(spec, **changes)
    if "resnet18" in (spec.encoder, spec.encoder.removeprefix("torchvision:")):
        from features.decode.image import load_resnet18

        load_resnet18(getattr(spec, "weights", ""))
    elif (asked := spec.asked()) is not None:
        asked = pinned(asked)
        find_encoder(asked)
        named: dict[str, Any] = {"weights": asked.weights} if asked.weights else {}
        spec = replace(spec, encoder=asked.name, **named)
    elif modality == "text":
        spec = replace(spec, encoder=hub.pinned(spec.encoder, option))
    return spec


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or os.path.isdir(name)
