"""Where a training starts: the weights of another model (`--init`), and the parts of it that stay (`--freeze`)."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from clcr.schedule import is_of, parts_of
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model

PLACE = re.compile(r"\b(encoders|pooling|own_heads)\.(\d+)\.")  # lists of one module for each modality


def begin(model: nn.Module, init: str, frozen: Sequence[str]) -> None:
    """Put a fresh model where its training starts; "" and () leave it as it is. init: models, separated by commas."""
    for uri in filter(None, init.split(",")):
        initialise(model, uri)
    freeze(model, frozen)


def initialise(model: nn.Module, uri: str) -> list[str]:
    """Take the weights of a trained model that `model` has by the same name and shape; returns their names.

    uri: --out of a training, its folder `model`, or models:/NAME/VERSION. Raises JobError where nothing fits.
    """
    if taken := take_weights(model, open_model("--init", uri).model):
        return taken
    raise JobError(f"--init {uri}: none of its weights fits this model")


def take_weights(model: nn.Module, source: nn.Module) -> list[str]:
    """Copy the weights of `source` that `model` has by the same name, modality and shape; returns their names.

    Buffers are taken too (the statistics of the inputs among them).
    """
    trained, own = _by_modality(source), _by_modality(model)
    # The unit of a number is this model's own, as its labels have it.
    fitting = {
        name: value
        for name, value in trained.items()
        if name in own and own[name].shape == value.shape and not name.startswith("units.")
    }
    names = dict(zip(own, model.state_dict(), strict=True))
    parameters = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return [names[name] for name in fitting if names[name] in parameters]


def _by_modality(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights, those of a part that each modality has one of by its modality instead of its place."""
    modalities = getattr(getattr(model, "encoder", None), "modalities", ())

    def named(found: re.Match[str]) -> str:
        place = int(found[2])
        return f"{found[1]}.{modalities[place]}." if place < len(modalities) else found[0]

    return {PLACE.sub(named, name): value for name, value in model.state_dict().items()}


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Leave parts of a model as they are: modules by dotted name. Raises JobError for one that it does not have."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(is_of(name, part) for name in names):
            raise JobError(f"--freeze {part}: this model has {', '.join(parts_of(model))}")
    for name, parameter in model.named_parameters():
        if any(is_of(name, part) for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"--freeze {','.join(parts)}: nothing is left to learn")
