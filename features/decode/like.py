"""The options that made a store, read back from what its spec says of each feature: new clips fit by construction.

A spec names weights by their sha256, never by a path of some machine. So whoever wants the same vectors of a network
says again where its weights file lies; that it is the same file is checked.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from features.decode import text
from features.decode.specs import (
    AudioSpec,
    EncoderSpec,
    ImageSpec,
    TextSpec,
    VectorSpec,
    VideoSpec,
    resolve_decoder,
)
from features.encoders import hub
from features.encoders.registry import TAKES_WEIGHTS, is_digest, kind_of
from features.errors import FeaturesError
from features.store.quality import QualitySpec
from features.store.spec import Feature

Options = TypeVar("Options", VideoSpec, AudioSpec, ImageSpec, TextSpec, VectorSpec, QualitySpec)
NETWORKS: dict[str, type] = {"video": VideoSpec, "audio": AudioSpec, "image": ImageSpec, "text": TextSpec}
PLACES = {"video": "--video.weights", "image": "--image.weights", "text": "--text.encoder"}


def spec_of_store(features: Mapping[str, Feature], places: Mapping[str, str] | None = None) -> EncoderSpec:
    """How to encode clips so that they become exactly these features.

    places: where the weights of video and image lie, and the encoder of text, by modality; needed for files alone.
    Raises FeaturesError for a feature that this version cannot make, or other weights than the spec's.
    """
    places = {name: place for name, place in (places or {}).items() if place}
    found: dict[str, Any] = {}
    for name, feature in features.items():
        encoder = dict(feature.encoder)
        kind = encoder.get("name")
        if "quality" in encoder:
            found["quality"] = _options(QualitySpec, encoder["quality"])
        if "encoder" in encoder and name in NETWORKS:
            options = dict(encoder, encoder=_network(name, encoder, places.get(name, "")))
            weights = _weights(name, encoder, places.get(name, "")) if kind in TAKES_WEIGHTS else ""
            options["weights"] = weights  # those of other kinds belong to their name
            found[name] = _options(NETWORKS[name], _with_auto(options))
        elif name == "video" and kind in ("frames", "resnet18"):
            found["video"] = _video(encoder, places.get("video", ""))
        elif name == "audio" and kind == "log_mel":
            found["audio"] = _options(AudioSpec, encoder)
        elif name == "image" and kind in ("patches", "resnet18"):
            own = {"encoder": kind, "weights": _weights("image", encoder, places.get("image", ""))}
            found["image"] = _options(ImageSpec, {**encoder, **own})
        elif name == "text" and kind == "hidden_layers":
            found["text"] = replace(_options(TextSpec, encoder), encoder=_text(encoder, places.get("text", "")))
        elif kind == "vectors":
            rates = (f"{name}={feature.rate:g}",) if feature.rate else ()
            before = found["vectors"].rates if "vectors" in found else ()
            found["vectors"] = replace(_options(VectorSpec, encoder), rates=(*before, *rates))
        else:
            raise FeaturesError(f"feature {name} was made by {kind!r}, which this version cannot repeat on new clips")
    given = {name: f for name, f in features.items() if f.encoder.get("name") == "vectors"}
    declared = given | ({"text": text.find_feature(found["text"])} if "text" in found else {})
    spec = EncoderSpec(
        video=found.get("video"),
        audio=found.get("audio"),
        quality=found.get("quality", QualitySpec()),
        image=found.get("image"),
        text=found.get("text"),
        vectors=found.get("vectors"),
        declared=declared,
    )
    _require_same(spec.features(), features)
    return spec


def _video(encoder: Mapping[str, Any], place: str) -> VideoSpec:
    options = dict(encoder, encoder="pixels" if encoder["name"] == "frames" else encoder["name"])
    if options["encoder"] != "pixels":
        options["weights"] = _weights("video", encoder, place)
    return _options(VideoSpec, _with_auto(options))


def _with_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder auto where it stands for the store's: it also reads what the store's decoder alone does not."""
    is_auto = options.get("decoder") == resolve_decoder("auto")
    return dict(options, decoder="auto") if is_auto else dict(options)


def _network(modality: str, encoder: Mapping[str, Any], place: str) -> str:
    """The name of an encoder of the contract: the store's, or the place of its file or folder that the caller knows."""
    name = encoder["encoder"]
    if kind_of(place) and kind_of(place) == kind_of(name):  # one place may be given for several modalities
        return hub.pinned(place, f"--{modality}.encoder") if kind_of(place) == "hf" else place
    if is_digest(name.partition(":")[2]):
        raise FeaturesError(
            f"feature {modality} was made by {encoder['name']} from files (sha256 {name.partition(':')[2][:12]}): "
            f"name them with --{modality}.encoder {encoder['name']}:PLACE"
        )
    return name


def _text(encoder: Mapping[str, Any], place: str) -> str:
    """Where a language model is: the place that the caller knows, the store's commit of the hub, or the package's."""
    if place:
        return hub.pinned(place, PLACES["text"])
    return "" if is_digest(encoder["weights"]) else encoder["weights"]


def _weights(modality: str, encoder: Mapping[str, Any], place: str) -> str:
    """Where a network's weights are: torchvision's name for them, or the place that the caller knows."""
    wanted = encoder.get("weights", "")
    if is_digest(wanted) and not place:
        raise FeaturesError(
            f"feature {modality} was made by {encoder['name']} with weights from a file (sha256 {wanted[:12]}): "
            f"name that file with {PLACES[modality]}"
        )
    return place if is_digest(wanted) else wanted


def _options(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """A dataclass of options from what a spec says of them; lists become tuples, what it does not say its default."""
    known = {f.name for f in fields(kind)}
    make: Any = kind  # each takes other options
    return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def _require_same(mine: Mapping[str, Feature], wanted: Mapping[str, Feature]) -> None:
    for name, feature in wanted.items():
        made = mine[name]
        if (tuple(made.shape), made.dtype) != (tuple(feature.shape), feature.dtype):
            raise FeaturesError(
                f"feature {name} would be {made.dtype} {made.shape}, not {feature.dtype} {feature.shape}"
            )
        for key, value in feature.encoder.items():
            now = made.encoder.get(key)
            if (list(now) if isinstance(now, tuple) else now) != (list(value) if isinstance(value, tuple) else value):
                place = f"; name the right one with {PLACES[name]}" if key == "weights" and name in PLACES else ""
                raise FeaturesError(f"feature {name}: {key} would be {now}, and the store has {value}{place}")
