"""Augmented frames: a function of (seed, epoch, clip), in training alone, off by default, and refused for vectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import recipe, run

from clcr import Batch
from clcr.batches import Features
from pipelines.common.errors import JobError
from pipelines.training.augmenting import augment_frames
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs

ALL = {"video": 0.5}


def batch(ids, frames=4, height=12, width=8):
    """Clips of random frames, of which "a" lacks its last frame; the id says the content."""
    values = [
        np.random.default_rng(len(name)).integers(0, 256, (frames, height, width, 3), dtype=np.uint8) for name in ids
    ]
    valid = torch.ones(len(ids), frames, dtype=torch.bool)
    valid[[name == "a" for name in ids], -1] = False
    pixels = torch.from_numpy(np.stack(values)) * valid[..., None, None, None]
    return Batch({"video": Features(pixels, valid)}, {"video": valid.any(1)}, {}, list(ids))


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_frames_keep_their_shape_and_type_and_padding_stays(flip, crop, brightness, epoch):
    plain = batch(["a", "bb"])
    changed = augment_frames(plain, {"video": flip}, {"video": crop}, {"video": brightness}, 0, epoch).features["video"]
    assert changed.values.shape == plain.features["video"].values.shape and changed.values.dtype == torch.uint8
    assert (changed.valid == plain.features["video"].valid).all() and (changed.values[~changed.valid] == 0).all()


def test_each_does_what_it_says_to_all_frames_of_a_clip_alike():
    plain = batch([f"{'b' * n}" for n in range(2, 40)])
    before = plain.features["video"].values.float()
    mirrored = augment_frames(plain, {"video": 0.5}, {}, {}, 0, 0).features["video"].values.float()
    kinds = ["same" if (a == b).all() else "mirrored" for a, b in zip(mirrored, before, strict=True)]
    assert all((a == b).all() or (a == b.flip(-2)).all() for a, b in zip(mirrored, before, strict=True))
    assert 8 < kinds.count("mirrored") < 30
    lit = augment_frames(plain, {}, {}, {"video": 0.2}, 0, 0).features["video"].values.float()
    for a, b in zip(lit, before, strict=True):
        ratio = (a / b.clamp(min=1))[(b > 100) & (b < 200)]
        assert ratio.min() > 0.79 and ratio.max() < 1.21 and ratio.max() - ratio.min() < 0.02
    ramp = replace(
        plain, features={"video": Features(plain.features["video"].values * 0 + 7, plain.features["video"].valid)}
    )
    assert (augment_frames(ramp, {}, {"video": 0.5}, {}, 0, 0).features["video"].values == 7).all()
    cropped = augment_frames(plain, {}, {"video": 0.5}, {}, 0, 0).features["video"].values
    assert (cropped.float() != before).any((1, 2, 3, 4)).float().mean() > 0.8


def test_what_is_done_to_a_clip_depends_on_seed_epoch_and_clip_alone():
    together = augment_frames(batch(["a", "bb", "ccc"]), ALL, ALL, ALL, 0, 1).features["video"].values
    alone = augment_frames(batch(["bb"]), ALL, ALL, ALL, 0, 1).features["video"].values
    assert (together[1] == alone[0]).all()
    others = [augment_frames(batch(["bb"]), ALL, ALL, ALL, *of).features["video"].values for of in ((0, 2), (1, 1))]
    assert all((other != alone).any() for other in others)
    flips = [
        augment_frames(batch(["bb"]), ALL, {}, more, 0, 1).features["video"].values for more in ({}, {"video": 1e-9})
    ]
    assert (flips[0] == flips[1]).all(), "one option does not change another's draws"


def test_only_training_frames_are_augmented_and_a_learner_learns(store):
    config = LoaderConfig(flip=("video=.5",), crop=("video=.4",), brightness=("video=.5",))

    def values(config, split, epoch, first=0):
        loader = SplitLoader(store, split, feature_specs(store), task_specs(store), config, batch_size=8)
        return torch.cat([b.features["video"].values.flatten() for b in loader.batches(epoch, first)])

    plain = LoaderConfig()
    assert (values(config, "val", 0) == values(plain, "val", 0)).all()
    assert (values(config, "train", 0) != values(plain, "train", 0)).any()
    whole, rest = values(config, "train", 1), values(config, "train", 1, first=2)
    assert (whole[-len(rest) :] == rest).all(), "a resume in mid-epoch sees the same"
    (history,) = run(Learner(store.uri, replace(recipe(architecture="video", epochs=1), loader=config)))
    assert history["val/score"] == history["val/score"]


def test_vectors_and_what_is_not_there_are_refused_by_name(store):
    for option, message in (
        ({"flip": ("audio=.5",)}, r"--loader.flip audio: .* holds vectors of it, and only frames have sides"),
        ({"crop": ("picture=.5",)}, r"--loader.crop picture: .* has video, audio"),
        ({"brightness": ("video=2",)}, r"--loader.brightness video=2: write NAME=SHARE, a share from 0 to 1"),
    ):
        with pytest.raises(JobError, match=message):
            SplitLoader(store, "train", feature_specs(store), task_specs(store), LoaderConfig(**option), batch_size=8)
