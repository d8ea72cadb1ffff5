"""Where a training starts: the weights of another model (`--init`), and the parts of it that stay (`--freeze`)."""

from collections.abc import Sequence

import torch
from torch import nn

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
    theirs, own = open_model("--init", uri).model.state_dict(), model.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    taken = [name for name, _ in model.named_parameters() if name in fitting]
    if not taken:
        raise JobError(f"--init {uri}: none of its weights fits this model")
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return taken


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Leave parts of a model as they are: modules by dotted name. Raises JobError for one that it does not have."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(name == part or name.startswith(f"{part}.") for name in names):
            raise JobError(
                f"--freeze {part}: this model has {', '.join(dict.fromkeys(n.split('.')[0] for n in names))}"
            )
    for name, parameter in model.named_parameters():
        if any(name == part or name.startswith(f"{part}.") for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"--freeze {','.join(parts)}: nothing is left to learn")
