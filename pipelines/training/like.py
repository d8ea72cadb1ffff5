"""`extract --like STORE|MODEL`: the options that another store was made with, so that new clips fit by construction."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.decode.like import spec_of_store
from features.decode.specs import EncoderSpec
from features.errors import FeaturesError
from features.files import read_json, resolve
from features.store import StoreSpec
from pipelines.common.cli import resolve_uri
from pipelines.common.errors import JobError


def read_spec(uri: str) -> StoreSpec:
    """The spec of a store, or the one in a model's folder, a run's, or models:/NAME/VERSION. Raises JobError."""
    if uri.startswith("models:/"):
        from pipelines.tracking.registry import fetch

        with tempfile.TemporaryDirectory() as folder:
            found = read_json(str(Path(fetch(uri, folder))), "store.json")
    else:
        uri = resolve_uri("--like", uri)
        found = read_json(uri, "store.json") or read_json(resolve("model", uri), "store.json")
    if found is None:
        raise JobError(f"--like {uri} is neither a feature store nor a trained model: there is no store.json")
    return StoreSpec.from_dict(found)


def spec_like(uri: str, places: Mapping[str, str], wanted: tuple[str, ...]) -> EncoderSpec:
    """How to encode clips as a store's or a model's were; wanted: modalities, none named = all of it.

    Raises JobError for a modality that is not there, or clips that this version cannot encode that way.
    """
    features = read_spec(uri).features
    if missing := sorted(set(wanted) - features.keys()):
        raise JobError(f"--modalities {','.join(missing)}: {uri} has {', '.join(features)}")
    try:
        return spec_of_store({m: f for m, f in features.items() if not wanted or m in wanted}, places)
    except FeaturesError as error:
        raise JobError(f"--like {uri}: {error}") from error


def require_default(config: Any, groups: tuple[str, ...]) -> None:
    """Raise JobError where an option that --like decides is given as well; a place of weights may be."""
    free = dict.fromkeys(("video", "image"), ("weights", "encoder")) | dict.fromkeys(("audio", "text"), ("encoder",))
    for group in groups:
        given = getattr(config, group)
        default = type(given)()
        for name in vars(default):
            if name not in free.get(group, ()) and getattr(given, name) != getattr(default, name):
                option = f"--{group}.{name.replace('_', '-')}"
                raise JobError(f"{option}: --like {config.like} decides it: leave one of the two out")


def with_places(config: Any) -> dict[str, str]:
    """Where weights lie, by modality, from the options that name them."""
    places = {name: getattr(config, name).weights for name in ("video", "image")}
    named = {name: getattr(config, name).encoder for name in ("video", "audio", "image")}
    places |= {name: encoder for name, encoder in named.items() if ":" in encoder and not places.get(name)}
    return places | {"text": config.text.encoder}
