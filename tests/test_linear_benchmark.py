"""The benchmarks' logistic regression: what it reads of a clip, and which part it is scored on."""

import numpy as np
import pytest

from clcr.tasks import TaskSpec
from tests.benchmarks.linear import fit_linear, statistics

TASKS = {"class": TaskSpec("class", "classification", ("a", "b"))}


def samples(count: int) -> list[dict]:
    """Clips of two classes: the spread over time of `sound` tells them apart, its mean and `face` do not."""
    rng = np.random.default_rng(0)
    clips = []
    for n in range(count):
        sound = rng.normal(0, 1 + 3 * (n % 2), (20, 2)).astype(np.float32)
        face = rng.normal(size=(1, 3)).astype(np.float32)
        clips.append({"features": {"sound": sound - sound.mean(0), "face": face}, "targets": {"class": n % 2}})
    return clips


def test_statistics_are_means_and_spreads_and_zeros_for_what_is_missing():
    clips = samples(3)
    clips[0]["features"]["face"][0, 0] = np.nan
    del clips[1]["features"]["face"]
    found = statistics(clips, ["sound", "face"])
    assert found.shape == (3, 2 + 2 + 3)
    np.testing.assert_allclose(found[2, 2:4], clips[2]["features"]["sound"].std(axis=0), rtol=1e-5)
    assert found[0, 4] == 0
    assert (found[1, 4:] == 0).all()


def test_spread_over_time_is_learned_and_the_test_part_scored():
    parts = [("train", "train", "val", "test", "train")[n % 5] for n in range(200)]
    both = fit_linear(samples(200), parts, ["sound", "face"], TASKS)
    face = fit_linear(samples(200), parts, ["face"], TASKS)
    assert both["test"] > 0.9 > face["test"]
    assert both["right"].startswith("40:")


def test_without_a_test_part_the_validation_part_is_scored():
    parts = ["train" if n % 4 else "val" for n in range(40)]
    found = fit_linear(samples(40), parts, ["sound"], TASKS)
    assert found["test"] == ""
    assert found["right"].startswith("10:")


def test_clips_without_a_label_are_left_out():
    clips = samples(40)
    clips[0]["targets"]["class"] = None
    parts = ["train" if n % 4 else "test" for n in range(38)] + ["val", "val"]
    assert fit_linear(clips, parts, ["sound"], TASKS)["right"].startswith("9:")


def test_what_it_cannot_answer_is_one_line():
    with pytest.raises(SystemExit, match="linear vedio: the store holds no such modality"):
        fit_linear(samples(8), ["train"] * 8, ["vedio"], TASKS)
    mood = TaskSpec("mood", "regression")
    for tasks in ({"mood": mood}, TASKS | {"mood": mood}):
        with pytest.raises(SystemExit, match="one task with classes, and the store has"):
            fit_linear(samples(8), ["train"] * 8, ["sound"], tasks)
