"""Collating samples: stored dtypes kept, padding masked, what is missing marked."""

import numpy as np
import pytest
import torch

import clcr
from clcr.batches import collate
from clcr.errors import ClcrError, ConfigError


def test_values_keep_their_dtype_and_padding_is_invalid(make):
    samples = make.samples(4)
    batch = collate(samples, make.features, make.tasks)
    video = batch.features["video"]
    assert video.values.dtype == torch.uint8 and batch.features["audio"].values.dtype == torch.float16
    for i, sample in enumerate(samples):
        n = len(sample["features"]["video"])
        assert video.valid[i].sum() == n and video.valid[i, :n].all()
        assert np.array_equal(video.values[i, :n].numpy(), sample["features"]["video"])
        assert not video.values[i, n:].any()


def test_a_missing_modality_is_one_padded_token_and_not_present(make):
    samples = make.samples(2)
    del samples[0]["features"]["audio"]
    samples[1]["features"]["audio"] = None
    batch = collate(samples, make.features, make.tasks)
    assert batch.features["audio"].values.shape[:2] == (2, 1)
    assert not batch.features["audio"].valid.any() and not batch.present["audio"].any()
    assert batch.present["video"].all()


def test_missing_targets_are_minus_one_and_nan(make):
    samples = make.samples(3)
    samples[0]["targets"] = {"word": None, "mood": None}
    samples[1]["targets"] = {}
    targets = collate(samples, make.features, make.tasks).targets
    assert targets["word"].tolist() == [-1, -1, 2] and targets["word"].dtype == torch.int64
    assert targets["mood"].isnan().tolist() == [True, True, False]


def test_a_token_of_another_shape_is_named(make):
    samples = make.samples(1)
    samples[0]["features"]["audio"] = np.zeros((5, 7), np.float16)
    with pytest.raises(ClcrError, match=r"'clip0'.*'audio'.*shape"):
        collate(samples, make.features, make.tasks)


def test_a_token_of_no_known_kind_is_refused():
    with pytest.raises(ConfigError, match="one token is"):
        clcr.FeatureSpec((4, 4, 4), 1.0, "float32")
