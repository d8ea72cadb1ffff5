"""Stages of a convolutional network as layers: the maps at each resolution, pooled.

Stages differ in how many channels they have; the narrower ones are filled up with zeros to the widest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from features.encoders.contract import Asked, Encoder, thirds
from features.encoders.registry import weights_id
from features.encoders.resnet18 import MEAN, STD, pixels
from features.errors import FeaturesError


class Pyramid(Encoder):
    """Frames, or images, through a network whose maps have these channels, from the finest stage to the coarsest."""

    mean, std = MEAN, STD

    def __init__(self, asked: Asked, channels: Sequence[int]) -> None:
        self.asked, self.channels, self.layers = asked, [*channels], asked.layers or thirds(len(channels))
        if self.layers[-1] > len(channels):
            chosen = ",".join(map(str, asked.layers))
            raise FeaturesError(f"--{asked.modality}.layers {chosen}: {asked.name} has {len(channels)} stages")
        self.shape = (len(self.layers), max(channels[layer - 1] for layer in self.layers))
        self.tokens = asked.grid**2
        self.identity = {"weights": weights_id(asked.weights), "layers": list(self.layers)}
        self.net: Any = None

    def stages(self, pictures: Tensor) -> Sequence[Tensor]:
        """(N, 3, H, W), normalised, to the maps of every stage, (N, channels, h, w) each."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Encoder."""
        maps = self.stages(pixels(windows, next(self.net.parameters()).device, self.mean, self.std))
        made = [x.shape[1] if x.ndim == 4 else 0 for x in maps]
        if made != self.channels:
            raise FeaturesError(f"{self.asked.option}: its stages have {made} channels, not {self.channels}")
        pooled = [F.adaptive_avg_pool2d(maps[layer - 1], self.asked.grid) for layer in self.layers]
        tokens = [rearrange(x, "n d h w -> n (h w) d") for x in pooled]
        return torch.stack([F.pad(x, (0, self.shape[-1] - x.shape[-1])) for x in tokens], dim=2).cpu().numpy()
