"""Modality dropout: a pure function of seed, epoch and clip, in training alone, that leaves every clip something."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learners import recipe

from pipelines.common.cli import parse
from pipelines.common.errors import JobError
from pipelines.training.dropping import lost, parse_shares
from pipelines.training.learner import Learner, Recipe
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs

NAMES = ("video", "audio", "text")


def loader(store, split="train", drop=("audio=.5", "video=.3"), **options):
    options = {"batch_size": 8, "seed": 1} | options
    config = LoaderConfig(drop=drop)
    return SplitLoader(store, split, feature_specs(store), task_specs(store), config, **options)


def heard(batches):
    """What each clip has, by clip."""
    return {
        clip: tuple(bool(batch.present[m][row]) for m in batch.present)
        for batch in batches
        for row, clip in enumerate(batch.clip_ids)
        if clip
    }


@given(
    st.text(max_size=20),
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1)),
    st.integers(0, 2**31),
    st.integers(0, 1000),
)
def test_a_clip_keeps_one_of_what_it_has_and_loses_only_what_may_go(clip, present, shares, seed, epoch):
    gone = lost(clip, present, shares, seed, epoch)
    assert gone < present and gone <= {m for m, share in shares.items() if share}
    assert gone == lost(clip, present, shares, seed, epoch)
    if len(present) > 1:
        assert {m for m in present if shares.get(m) == 1} - gone == set() or len(present - gone) == 1


def test_shares_are_what_was_asked_for_and_modalities_go_independently():
    gone = [lost(f"clip{n}", NAMES, {"audio": 0.3, "video": 0.2}, 0, n % 7) for n in range(4000)]
    audio, video = (np.array([m in g for g in gone]) for m in ("audio", "video"))
    assert audio.mean() == pytest.approx(0.3, abs=0.03) and video.mean() == pytest.approx(0.2, abs=0.03)
    assert (audio & video).mean() == pytest.approx(0.06, abs=0.02) and not any("text" in g for g in gone)


def test_what_is_lost_depends_on_neither_batches_nor_workers_nor_a_resume(store):
    alone = heard(loader(store).batches(3))
    assert heard(loader(store, batch_size=3).batches(3)) == alone
    workers = [heard(loader(store, rank=rank, world=2).batches(3)) for rank in range(2)]
    assert workers[0] | workers[1] == alone
    resumed = heard(loader(store).batches(3, first=2))
    assert resumed.items() <= alone.items()
    assert heard(loader(store).batches(4)) != alone != heard(loader(store, seed=2).batches(3))
    whole = heard(loader(store, drop=()).batches(3))
    assert alone != whole and all(any(kept) for kept in alone.values())
    assert all(set(np.flatnonzero(kept)) <= set(np.flatnonzero(whole[clip])) for clip, kept in alone.items())


def test_what_is_lost_is_empty_and_not_valid(store):
    for batch in loader(store).batches(0):
        for m, features in batch.features.items():
            absent = ~batch.present[m]
            assert not features.values[absent].any() and not features.valid[absent].any()


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_loses_anything(store, split):
    assert heard(loader(store, split).batches(0)) == heard(loader(store, split, drop=()).batches(0))
    statistics = loader(store).sample_batches(29)
    assert heard(statistics) == heard(loader(store, drop=()).sample_batches(29))


def test_a_run_learns_with_it_and_wrong_options_are_named(store):
    options = parse(Recipe, ["--loader.drop", "audio=.2,video=1"])
    assert parse_shares("drop", options.loader.drop) == {"audio": 0.2, "video": 1.0}
    learner = Learner(store, replace(recipe("concat", epochs=1), loader=LoaderConfig(drop=("audio=.5",))))
    assert all(np.isfinite(epoch.metrics["train/loss"]) for epoch in learner.fit())
    for entry in ("audio", "audio=2", "audio=x", "=.5"):
        with pytest.raises(JobError, match=r"--loader.drop .*: write NAME=SHARE"):
            LoaderConfig(drop=(entry,))
    with pytest.raises(JobError, match=r"--loader.drop smell: .* has video, audio"):
        loader(store, drop=("smell=.1",))
