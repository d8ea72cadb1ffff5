"""SpecAugment: masks of the asked width at most, the same whatever the batch, and another in every epoch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import recipe, run

from clcr import Batch
from clcr.batches import Features
from pipelines.common.errors import JobError
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs
from pipelines.training.masking import mask_features


def batch(ids, tokens=20, bands=10):
    """Clips whose values are all different, of which the first lacks its last five tokens; the id says the content."""
    values = torch.stack([torch.arange(tokens * bands).view(tokens, bands).float() + len(name) * 1000 for name in ids])
    valid = torch.ones(len(ids), tokens, dtype=torch.bool)
    valid[[name == "a" for name in ids], -5:] = False
    present = {"audio": valid.any(1)}
    return Batch({"audio": Features(values * valid[..., None], valid)}, present, {}, list(ids))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_no_mask_is_wider_than_asked_and_padding_stays(time, band, epoch):
    plain = batch(["a", "bb"])
    masked = mask_features(plain, {"audio": time}, {"audio": band}, 0, epoch).features["audio"]
    before = plain.features["audio"]
    assert (masked.valid == before.valid).all() and (masked.values[~before.valid] == 0).all()
    for row, tokens in ((0, 15), (1, 20)):
        changed = masked.values[row, :tokens] != before.values[row, :tokens]
        whole = changed.sum(1) > int(band * 10)  # tokens that changed in more than the band
        assert whole.sum() <= int(time * tokens)
        assert changed[~whole].any(0).sum() <= int(band * 10)


def test_a_clips_mask_depends_on_seed_epoch_and_clip_alone():
    shares = {"audio": 0.5}, {"audio": 0.5}
    together = mask_features(batch(["a", "bb", "ccc"]), *shares, 0, 1).features["audio"].values
    alone = mask_features(batch(["bb"]), *shares, 0, 1).features["audio"].values
    assert (together[1] == alone[0]).all()
    others = [mask_features(batch(["bb"]), *shares, *of).features["audio"].values for of in ((0, 2), (1, 1))]
    assert all((other != alone).any() for other in others)


def test_only_training_clips_are_masked_and_a_learner_learns(store):
    config = LoaderConfig(mask_time=("audio=.5", "video=.5"), mask_bands=("audio=.5",))

    def values(config, split, epoch):
        loader = SplitLoader(store, split, feature_specs(store), task_specs(store), config, batch_size=8)
        return torch.cat([b.features["audio"].values.flatten() for b in loader.batches(epoch)])

    plain = LoaderConfig()
    assert (values(config, "val", 0) == values(plain, "val", 0)).all()
    assert (values(config, "train", 0) != values(plain, "train", 0)).any()
    assert (values(config, "train", 1) == values(config, "train", 1)).all()
    (history,) = run(Learner(store.uri, replace(recipe(epochs=1), loader=config)))
    assert history["val/score"] == history["val/score"]


def test_what_is_no_mask_is_named(store):
    with pytest.raises(JobError, match=r"--loader.mask-time audio: write NAME=SHARE"):
        LoaderConfig(mask_time=("audio",))
    with pytest.raises(JobError, match=r"--loader.mask-bands sound: .* has video, audio"):
        SplitLoader(
            store,
            "train",
            feature_specs(store),
            task_specs(store),
            LoaderConfig(mask_bands=("sound=.1",)),
            batch_size=8,
        )
