"""Modality dropout: in training a clip now and then loses a modality, so that the model learns to do without it.

Which clip loses what is a function of (seed, epoch, clip, modality) alone: whatever the batch, the number of workers or
a resume in mid-epoch. A clip never loses all that it has: of those that would go, the one whose draw is the largest
part of its share stays.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from clcr import Batch
from clcr.batches import Features
from pipelines.common.errors import JobError


def parse_shares(option: str, entries: Sequence[str]) -> dict[str, float]:
    """Shares by modality from `audio=.2`. Raises JobError for what is none."""
    shares: dict[str, float] = {}
    for entry in entries:
        name, _, share = entry.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = -1.0
        if not (name and 0 <= shares[name] <= 1):
            name = option.replace("_", "-")
            raise JobError(f"--loader.{name} {entry}: write NAME=SHARE, a share from 0 to 1, for example audio=.2")
    return shares


def lost(clip_id: str, present: Iterable[str], shares: Mapping[str, float], seed: int, epoch: int) -> set[str]:
    """The modalities, of those present, that a clip loses in an epoch."""
    present = list(present)
    draws = {m: _draw(clip_id, m, seed, epoch) for m in present if shares.get(m)}
    going = {m for m, draw in draws.items() if draw < shares[m]}
    if going and len(going) == len(present):
        going.remove(max(going, key=lambda m: draws[m] / shares[m]))
    return going


def drop_modalities(batch: Batch, shares: Mapping[str, float], seed: int, epoch: int) -> Batch:
    """The batch without what its clips lose; the batch itself where nothing is lost."""
    absent = {m: torch.zeros(len(batch), dtype=torch.bool) for m in batch.features}
    for row, clip_id in enumerate(batch.clip_ids):
        present = [m for m in batch.features if batch.present[m][row]]
        for modality in lost(clip_id, present, shares, seed, epoch):
            absent[modality][row] = True
    features = dict(batch.features)
    for modality, rows in absent.items():
        if rows.any():
            values, valid = features[modality].values, features[modality].valid
            emptied = values.masked_fill(rows.view(-1, *[1] * (values.ndim - 1)), 0)
            features[modality] = Features(emptied, valid & ~rows[:, None])
    return replace(batch, features=features, present={m: batch.present[m] & ~absent[m] for m in batch.present})


def _draw(clip_id: str, modality: str, seed: int, epoch: int) -> float:
    """Uniform on [0, 1)."""
    return np.random.default_rng([seed, epoch, zlib.crc32(clip_id.encode()), zlib.crc32(modality.encode())]).random()
