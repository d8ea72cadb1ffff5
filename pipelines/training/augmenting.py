"""Augmentation: in training a clip's frames are mirrored, cropped, made brighter or darker, anew in every epoch.

What is done to a clip is the same for all its frames, and a function of (seed, epoch, clip, modality) alone: whatever
the batch, the number of workers or a resume in mid-epoch. torchvision's own random transforms draw from torch's global
generator, which the training loop has seeded for its own use while a thread makes the batches: so the draws are made
here, and its functions do the rest.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from clcr import Batch
from clcr.batches import Features

Shares = Mapping[str, float]


def augment_frames(batch: Batch, flips: Shares, crops: Shares, brightness: Shares, seed: int, epoch: int) -> Batch:
    """The batch with other frames, of the same size and type; padding stays.

    By modality, each 0-1. flips: the chance of a clip to be mirrored, left to right; crops: the largest share of a
    side that is cut off, before what is left is resized; brightness: by how much at most values grow or shrink.
    """
    features = dict(batch.features)
    for modality in batch.features.keys() & {*flips, *crops, *brightness}:
        values, valid = features[modality].values.clone(), features[modality].valid
        flip, crop, most = (shares.get(modality, 0.0) for shares in (flips, crops, brightness))
        for row, clip_id in enumerate(batch.clip_ids):
            if valid[row].any():
                key = [seed, epoch, zlib.crc32(clip_id.encode()), zlib.crc32(modality.encode()), 2]
                clip = values[row, valid[row]]
                values[row, valid[row]] = _augmented(clip, flip, crop, most, np.random.default_rng(key))
        features[modality] = Features(values, valid)
    return replace(batch, features=features)


def _augmented(frames: Tensor, flip: float, crop: float, brightness: float, rng: np.random.Generator) -> Tensor:
    """One clip's frames, (T, H, W, 3); every draw is made whatever is asked for, so that options do not interfere."""
    from torchvision.transforms.v2 import functional as F  # heavy, and needed here alone

    mirrored, (height, width) = rng.random() < flip, frames.shape[1:3]
    left = 1 - crop * rng.random()
    size = [max(1, round(side * left)) for side in (height, width)]
    corner = [int(rng.integers(side - kept + 1)) for side, kept in zip((height, width), size, strict=True)]
    factor = 1 + brightness * rng.uniform(-1, 1)
    images: Any = frames.movedim(-1, -3)
    if mirrored:
        images = F.horizontal_flip(images)
    if size != [height, width]:
        images = F.resized_crop(images, *corner, *size, [height, width], antialias=True)
    if brightness:
        images = F.adjust_brightness(images, factor)
    changed: Tensor = images.movedim(-3, -1)
    return changed
