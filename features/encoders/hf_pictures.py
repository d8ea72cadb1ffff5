"""Pictures through Hugging Face models: CLIP, SigLIP, DINOv2, ViT by the frame, VideoMAE by several frames at once.

A picture is scaled to a square of the model's size, whole. Of a frame, each layer is the mean of its patches; of an
image, the mean of the patches of each region.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from features.encoders import hub
from features.encoders.contract import Asked
from features.encoders.hidden import HiddenLayers, central
from features.errors import FeaturesError

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MOMENTS = {"clip": CLIP, "dinov2": IMAGENET, "videomae": IMAGENET}  # where no preprocessor_config.json says it


class Pictures(HiddenLayers):
    """Frames, or an image, one at a time."""

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        super().__init__(asked, config, model)
        said, self.patch = hub.preprocessing(asked.name), config.patch_size
        size: Any = config.image_size
        if config.model_type.startswith("dinov2"):  # takes any size, and learned on another than it is used with
            size = said.get("crop_size") or 224
        size = next(iter(size.values())) if isinstance(size, dict) else size
        self.size = size // self.patch * self.patch
        family = config.model_type.partition("_")[0]
        self.mean, self.std = (
            said.get(f"image_{name}") or default
            for name, default in zip(("mean", "std"), MOMENTS.get(family, HALF), strict=True)
        )
        self.tokens = asked.grid**2

    def inputs(self, windows: np.ndarray) -> Tensor:
        """(..., H, W, 3) uint8 to (..., 3, H, W), normalised."""
        x = torch.from_numpy(np.ascontiguousarray(windows)).to(self.device).float() / 255
        mean, std = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        return torch.movedim((x - mean) / std, -1, -3)

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """See HiddenLayers."""
        side, count = self.size // self.patch, len(hidden)
        patches = hidden[:, hidden.shape[1] - side**2 :]  # the first may stand for the whole picture
        if self.tokens == 1:
            return patches.mean(dim=1, keepdim=True)
        maps = rearrange(patches, "n (h w) l d -> n (l d) h w", h=side)
        pooled = F.adaptive_avg_pool2d(maps, self.asked.grid)
        return rearrange(pooled, "n (l d) h w -> n (h w) l d", n=count, l=len(self.layers))


class Clips(Pictures):
    """Several frames at once: a token is a tubelet's frames, the mean of their patches."""

    batch = 16

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        super().__init__(asked, config, model)
        self.window, self.tubelet = config.num_frames, config.tubelet_size
        self.hop = int(asked.stride) or self.window
        if self.hop % self.tubelet or self.hop > self.window or (self.window - self.hop) % (2 * self.tubelet):
            raise FeaturesError(
                f"--video.stride {self.hop}: {asked.name} sees {self.window} frames at once, {self.tubelet} a token; "
                f"name that number less a multiple of {2 * self.tubelet}"
            )
        self.tokens = self.hop // self.tubelet

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """See HiddenLayers."""
        times = rearrange(hidden, "n (t p) l d -> n t p l d", t=self.window // self.tubelet).mean(dim=2)
        return times[:, central(times.shape[1], self.tokens)]
