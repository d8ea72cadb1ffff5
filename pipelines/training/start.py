"""Where a training starts: the weights of another model (`--init`), and the parts of it that stay (`--freeze`)."""

from collections.abc import Sequence

import torch
from torch import nn

from clcr.schedule import is_of, parts_of
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model


def begin(model: nn.Module, init: str, frozen: Sequence[str]) -> None:
    """Put a fresh model where its training starts; "" and () leave it as it is."""
    if init:
        initialise(model, init)
    freeze(model, frozen)


def initialise(model: nn.Module, uri: str) -> list[str]:
    """Take the weights of a trained model that `model` has by the same name and shape; returns their names.

    uri: --out of a training, its folder `model`, or models:/NAME/VERSION. Buffers are taken too (the statistics of the
    inputs among them). Raises JobError where nothing fits.
    """
    source = open_model("--init", uri).model
    trained, own = _by_modality(source), _by_modality(model)
    # The unit of a number is this model's own, as its labels have it.
    fitting = {
        name: value
        for name, value in trained.items()
        if name in own and own[name].shape == value.shape and not name.startswith("units.")
    }
    names = dict(zip(own, model.state_dict(), strict=True))
    parameters = {name for name, _ in model.named_parameters()}
    taken = [names[name] for name in fitting if names[name] in parameters]
    if not taken:
        raise JobError(f"--init {uri}: none of its weights fits this model")
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return taken


def _by_modality(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights, those of an encoder by its modality instead of its place."""
    modalities = getattr(getattr(model, "encoder", None), "modalities", ())
    places = {f"encoder.encoders.{place}.": f"encoder.encoders.{name}." for place, name in enumerate(modalities)}
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        place = ".".join(name.split(".")[:3]) + "."
        weights[name.replace(place, places.get(place, place), 1)] = value
    return weights


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
