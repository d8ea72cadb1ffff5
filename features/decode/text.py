"""Texts to tokens: hidden layers of a pretrained language encoder of BERT's kind, an early, a middle and a late one.

The layers are what CLCR reads as language's levels (sec. Semantic-Hierarchy Encoder); models without levels read the
last. Tokens have an order and no time. One text goes through the encoder at a time: its numbers never depend on others.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.corpus.manifest import is_text_file
from features.decode.media import open_source
from features.decode.specs import Encoded, TextSpec
from features.encoders import hub, running
from features.encoders.contract import thirds
from features.encoders.registry import find_encoder, identity_of
from features.errors import FeaturesError, MediaError, one_line
from features.store.spec import Feature

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTION = "--text.encoder"


def find_feature(spec: TextSpec) -> Feature:
    """What a text's tokens are: (layers, D) float16, from the encoder's own config. Raises FeaturesError."""
    if (asked := spec.asked()) is not None:
        return Feature(tuple(find_encoder(asked).shape), "float16", 0.0, identity_of(asked))
    config = hub.pretrained("AutoConfig", spec.encoder, OPTION)
    depth, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if depth is None or width is None:
        raise FeaturesError(f"--text.encoder {spec.encoder}: a {config.model_type} is no encoder of BERT's kind")
    layers = spec.layers or thirds(depth)
    if layers[-1] > depth:
        raise FeaturesError(f"--text.layers {','.join(map(str, layers))}: the encoder has {depth} layers")
    model = f"{config.model_type} {depth} x {width}"
    encoder: dict[str, Any] = {"name": "hidden_layers", "model": model, "layers": list(layers)}
    encoder |= {"weights": hub.weights_id(spec.encoder), "max_tokens": spec.max_tokens}
    return Feature((len(layers), width), "float16", 0.0, encoder)


def encode_text(text: str, spec: TextSpec, feature: Feature) -> Encoded:
    """A text (or the content of a .txt file) as tokens: (T, layers, D) float16. Raises MediaError (stage text)."""
    if is_text_file(text):
        text = _read(text)
    if not text.strip():
        raise MediaError("text", "the text is blank; leave the field empty where there is none")
    if (asked := spec.asked()) is not None:
        return Encoded(running.encode_text(text, asked), 0.0, {})
    import torch

    tokenizer, model = load_encoder(spec.encoder)
    tokens = tokenizer(text, truncation=True, max_length=spec.max_tokens, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens, output_hidden_states=True).hidden_states  # the first: what goes into layer 1
    values = torch.stack([hidden[layer][0] for layer in feature.encoder["layers"]], dim=1)
    return Encoded(running.finite(values.numpy(), OPTION), 0.0, {})


def _read(uri: str) -> str:
    source = open_source(uri)
    try:
        return Path(source).read_text() if isinstance(source, str) else source.read().decode()
    except UnicodeDecodeError as error:
        raise MediaError("text", f"{uri} is no UTF-8 text: {one_line(error)}") from error


def load(spec: TextSpec) -> None:
    """Load what encodes texts, once per process."""
    if (asked := spec.asked()) is not None:
        running.runner_alone(asked)
    else:
        load_encoder(spec.encoder)


@functools.lru_cache(maxsize=1)
def load_encoder(name: str) -> tuple["PreTrainedTokenizerBase", "PreTrainedModel"]:
    """Tokenizer and model, once per process; see TextSpec for names. Raises FeaturesError."""
    tokenizer = hub.pretrained("AutoTokenizer", name, OPTION)
    return tokenizer, hub.pretrained("AutoModel", name, OPTION).float().eval()
