"""SpecAugment: in training a stretch of time and a band of each clip's features are masked, anew in every epoch.

What is masked is a function of (seed, epoch, clip, modality) alone: whatever the batch, the number of workers or a
resume in mid-epoch. torchaudio's masks draw from torch's global generator, which the training loop has seeded for its
own use while a thread makes the batches: so the draws are made here. Park et al. 2019 mask with 0, on features of mean
0, the spectrogram's mean; features here have any mean, so a stretch of time becomes the clip's mean of each dimension,
and a band one number, the clip's mean over all dimensions: that of the band itself would tell what it was. Where
dimensions are in unlike units, that number says nothing, and bands are not to be masked.
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from clcr import Batch
from clcr.batches import Features


def mask_features(batch: Batch, times: Mapping[str, float], bands: Mapping[str, float], seed: int, epoch: int) -> Batch:
    """The batch with one stretch of time and one band of each clip's features masked.

    times, bands: by modality the largest share (0-1) of a clip's tokens, and of a vector's dimensions, that a mask may
    cover; its width is uniform from 0 to that. Tokens that are no vectors (frames) have no bands.
    """
    features = dict(batch.features)
    for modality in batch.features.keys() & {*times, *bands}:
        values, valid = features[modality].values.clone(), features[modality].valid
        for row, clip_id in enumerate(batch.clip_ids):
            clip = values[row, valid[row]]
            if not len(clip):
                continue
            rng = np.random.default_rng([seed, epoch, zlib.crc32(clip_id.encode()), zlib.crc32(modality.encode()), 1])
            mean = clip.float().mean(dim=0).to(clip.dtype)
            clip[_stretch(rng, len(clip), times.get(modality, 0.0))] = mean
            if clip.ndim == 2:
                band = _stretch(rng, clip.shape[1], bands.get(modality, 0.0))
                clip[:, band] = clip.float().mean().to(clip.dtype)
            values[row, valid[row]] = clip
        features[modality] = Features(values, valid)
    return replace(batch, features=features)


def _stretch(rng: np.random.Generator, length: int, share: float) -> slice:
    """A stretch of up to `share` of a length, anywhere in it."""
    width = int(rng.integers(int(share * length) + 1))
    first = int(rng.integers(length - width + 1))
    return slice(first, first + width)
