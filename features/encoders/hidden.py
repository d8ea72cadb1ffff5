"""Hidden layers of a Hugging Face model as tokens: what its families have in common."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.encoders import hub
from features.encoders.contract import Asked, Encoder, thirds
from features.errors import FeaturesError


class HiddenLayers(Encoder):
    """Layers of a transformer, (L, D), from its config alone until it is loaded.

    config: of the part that is used (a CLIP's vision tower). model: the class of transformers that loads it.
    """

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        self.asked, self.config, self.model_class = asked, config, model
        depth = config.num_hidden_layers
        self.layers = asked.layers or thirds(depth)
        if self.layers[-1] > depth:
            raise FeaturesError(
                f"--{asked.modality}.layers {','.join(map(str, asked.layers))}: {asked.name} has {depth} layers"
            )
        self.shape = (len(self.layers), config.hidden_size)
        weights = hub.weights_id(asked.name, also=(hub.PREPROCESSING,))
        self.identity = {"encoder": f"hf:{weights}", "model": config.model_type, "layers": list(self.layers)}
        self.net: Any = None
        self.device = "cpu"

    def load(self, device: str) -> None:
        """See Encoder."""
        self.device = device
        self.net = self.part(hub.pretrained(self.model_class, self.asked.name, self.asked.option)).float().eval()
        self.net.to(device)

    def part(self, model: Any) -> Any:
        """The part of a loaded model that makes the layers."""
        return model

    def inputs(self, windows: np.ndarray) -> Tensor:
        """Windows as the model takes them, on its device."""
        raise NotImplementedError

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """(N, positions, L, D) to (N, tokens, L, D)."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Encoder."""
        states = self.net(self.inputs(windows), output_hidden_states=True).hidden_states  # the first: before layer 1
        return self.tokens_of(torch.stack([states[layer] for layer in self.layers], dim=2)).cpu().numpy()


def central(given: int, wanted: int) -> slice:
    """So many of a window's tokens, from its middle: the others are context."""
    first = (given - wanted) // 2
    return slice(first, first + wanted)
