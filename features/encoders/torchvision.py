"""`torchvision:NAME`: the stages of a convolutional network of torchvision's, with weights from a file or its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from features.encoders.contract import Asked
from features.encoders.pyramid import Pyramid
from features.encoders.registry import WEIGHT_FILES
from features.encoders.resnet18 import read_weights
from features.errors import FeaturesError, one_line

SIDE = 128  # pixels of the picture by which the stages are found


def make(asked: Asked) -> "Torchvision":
    """See features.encoders.registry."""
    from torchvision import models

    name = asked.name.partition(":")[2]
    try:
        with torch.device("meta"):  # its shape alone
            net = models.get_model(name, weights=None)
            blocks = last_of_each_size(net)
    except Exception as error:  # an unknown name, or a network that does not run on maps
        raise FeaturesError(f"{asked.option} is no network of torchvision's with stages: {one_line(error)}") from error
    own = models.get_model_weights(name).__members__
    if not asked.weights.endswith(WEIGHT_FILES) and asked.weights not in own:
        given = f"--{asked.modality}.weights {asked.weights or '(none)'}"
        raise FeaturesError(
            f"{given}: name a file ({', '.join(WEIGHT_FILES)}), or weights of {name}'s: {', '.join(own)}"
        )
    return Torchvision(asked, name, blocks)


class Torchvision(Pyramid):
    """blocks: names of the modules whose outputs are the stages, and their channels."""

    def __init__(self, asked: Asked, name: str, blocks: dict[str, int]) -> None:
        super().__init__(asked, [*blocks.values()])
        self.name, self.blocks = name, [*blocks]
        self.maps: list[Tensor] = []

    def load(self, device: str) -> None:
        """See Encoder."""
        from torchvision import models

        weights = self.asked.weights
        try:
            self.net = models.get_model(self.name, weights=None)
            if weights.endswith(WEIGHT_FILES):
                state = read_weights(weights)
            else:
                state = models.get_model_weights(self.name)[weights].get_state_dict(progress=False)
            self.net.load_state_dict(state)
        except Exception as error:  # torch.load raises whatever damaged bytes make it raise
            problem = f"weights {weights} are none of its own: {one_line(error)}"
            raise FeaturesError(f"{self.asked.option}: {problem}") from error
        self.net.eval().to(device)
        for name in self.blocks:
            self.net.get_submodule(name).register_forward_hook(lambda *args: self.maps.append(args[-1]))

    def stages(self, pictures: Tensor) -> Sequence[Tensor]:
        """See Pyramid."""
        self.maps = []
        self.net(pictures)
        return self.maps


def last_of_each_size(net: nn.Module) -> dict[str, int]:
    """Of a network's blocks in a row the last at each resolution: module name to channels.

    Raises ValueError where there is no such row, as in transformers.
    """
    sizes: dict[int, tuple[str, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: Any, made: Tensor) -> None:
            side = SIDE // made.shape[-1] if made.ndim == 4 and made.shape[-1] == made.shape[-2] else 0
            if side > 1 and made.shape[-1] > 1:
                sizes[side] = name, made.shape[1]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in _blocks(net)]
    net.eval()(torch.zeros(1, 3, SIDE, SIDE, device="meta"))
    for handle in handles:
        handle.remove()
    if len(sizes) < 3:
        raise ValueError(f"it has maps of {len(sizes)} sizes")
    return dict(sizes.values())


def _blocks(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network one after the other: of `features` or `trunk_output` their parts."""
    for name, module in net.named_children():
        if name == "avgpool":
            return
        if name in ("features", "trunk_output"):
            yield from ((f"{name}.{inner}", part) for inner, part in module.named_children())
        else:
            yield name, module
