"""Where a training starts: the weights of another model (`--init`), and the parts of it that stay (`--freeze`)."""

import os
import re
from collections.abc import Sequence

import torch
from torch import nn

from clcr.schedule import is_of, parts_of
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model

OF_MODALITY = re.compile(r"\b(encoders|pooling)\.(\d+)\.")  # lists of one module for each modality
OF_LAYER = re.compile(r"\b(project|levels)\.(\d+)\.")  # in the encoder of several layers: one for each that is read
ENCODER = "encoder."


def begin(model: nn.Module, init: str, frozen: Sequence[str]) -> None:
    """Put a fresh model where its training starts; "" and () leave it as it is. init: as in `Recipe`."""
    for uri in sources_of(init):
        initialise(model, uri)
    freeze(model, frozen)


def sources_of(init: str) -> list[str]:
    """The models that `--init` names, separated by commas; a path that exists is one, commas and all."""
    parts = [init] if os.path.exists(init) else init.split(",")
    return [part.strip() for part in parts if part.strip()]


def initialise(model: nn.Module, uri: str) -> list[str]:
    """Take the weights of a trained model that fit, as `take_weights` does; returns their names.

    uri: --out of a training, its folder `model`, or models:/NAME/VERSION.
    """
    return take_weights(model, open_model("--init", uri).model, f"--init {uri}")


def take_weights(model: nn.Module, source: nn.Module, name: str) -> list[str]:
    """Copy the weights of `source` that `model` has by the same name and shape; returns their names.

    An encoder goes to its modality, and a layer's part of it to that layer. Of a model of other modalities the encoders
    and what pools their tokens are all that is taken. Buffers are taken too (the statistics of the inputs among them).
    Raises JobError, in which the source is called `name`, where nothing of an encoder fits.
    """
    alike = _modalities(model) == _modalities(source)
    trained, own = _named(source), _named(model)
    theirs, ours, parameters = source.state_dict(), model.state_dict(), dict(model.named_parameters())
    taken = []
    with torch.no_grad():
        for place, mine in own.items():
            # The unit of a number is this model's own, as its labels have it.
            if place not in trained or place.startswith("units.") or not (alike or OF_MODALITY.search(mine)):
                continue
            value = theirs[trained[place]]
            if value.shape == ours[mine].shape:
                ours[mine].copy_(value)
                if mine in parameters:
                    taken.append(mine)
    if not any(mine.startswith(ENCODER) for mine in taken):
        raise JobError(
            f"{name}: none of its weights fits this model; both need the same --model.width, and a modality that is "
            "encoded alike"
        )
    return taken


def _modalities(model: nn.Module) -> tuple[str, ...]:
    return getattr(getattr(model, "encoder", None), "modalities", ())


def _named(model: nn.Module) -> dict[str, str]:
    """A model's weights by a name that says of which modality and layer they are, instead of at which place."""
    modalities = _modalities(model)

    def by_modality(found: re.Match[str]) -> str:
        return f"{found[1]}.{modalities[int(found[2])]}." if modalities else found[0]

    def by_layer(name: str) -> str:
        place = OF_MODALITY.search(name)
        if not name.startswith(ENCODER) or place is None:
            return name
        picks = getattr(getattr(model.get_submodule(name[: place.end() - 1]), "stem", None), "picks", [])
        if not picks or len(set(picks)) < len(picks):  # no layers, or levels that read the same one
            return name
        return OF_LAYER.sub(lambda found: f"{found[1]}.layer{picks[int(found[2])]}.", name)

    return {OF_MODALITY.sub(by_modality, by_layer(name)): name for name in model.state_dict()}


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
