"""The unit of a label decides nothing: the same clips learned with their labels in other units."""

import numpy as np
import pytest
from storefiles import make_clip, write_store

from clcr.config import CLCRConfig, ModelConfig
from clcr.errors import ConfigError
from clcr.training import OptimConfig
from pipelines.common.errors import JobError
from pipelines.training.inputs import check
from pipelines.training.learner import Learner, Recipe

UNITS = [(-3.0, 5.0), (0.001, 0.0), (100.0, 500.0), (3e8, 1e9), (1e-6, 1.7e9 * 1e-6)]


def labelled(folder, moods, tests=8):
    splits = ["train"] * (len(moods) - 2 * tests) + ["val"] * tests + ["test"] * tests
    clips = [
        make_clip(f"c{n}", split, "ab"[n % 2], mood) for n, (split, mood) in enumerate(zip(splits, moods, strict=True))
    ]
    return write_store(folder, clips)


def skill(store, epochs, architecture="clcr", **optim):
    recipe = Recipe(
        architecture=architecture,
        tasks=("mood",),
        optim=OptimConfig(epochs=epochs, batch_size=8, **optim),
        network=CLCRConfig(model=ModelConfig(width=16, heads=2, levels=1, dropout=0.0)),
    )
    learner = Learner(store.uri, recipe)
    for _ in learner.fit():
        pass
    return learner.test()[0]["mood"]["skill"]


@pytest.fixture(scope="module")
def moods():
    """Of 48 clips whose brightness is their number."""
    rng = np.random.default_rng(1)
    return (np.arange(48) % 12 / 4 + rng.normal(0, 0.05, 48)).tolist()


@pytest.fixture(scope="module")
def plain(moods, tmp_path_factory):
    store = labelled(tmp_path_factory.mktemp("plain") / "store", moods)
    return {steps: skill(store, steps // 4) for steps in (20, 120)}


@pytest.mark.parametrize("unit", UNITS)
def test_skill_does_not_depend_on_the_unit(moods, plain, tmp_path, unit):
    store = labelled(tmp_path / "store", [unit[1] + unit[0] * mood for mood in moods])
    assert skill(store, 5) == pytest.approx(plain[20], abs=1e-3)
    assert skill(store, 30) == pytest.approx(plain[120], abs=0.02)


def test_a_constant_target_is_refused_before_anything_starts(tmp_path):
    store = labelled(tmp_path / "store", [7.0] * 32 + [1.0, 2.0] * 8)
    with pytest.raises(ConfigError, match=r"task 'mood': every training label is 7"):
        check(store.uri, Recipe())


def test_a_task_without_training_labels_is_refused_and_what_no_training_clip_has_is_named(tmp_path, capsys):
    none = labelled(tmp_path / "none", [None] * 32 + [1.0, 2.0] * 8)
    with pytest.raises(JobError, match="task mood: no training clip has a label of it"):
        check(none.uri, Recipe())
    clips = [make_clip(f"c{3 * n}", "train", "a", n / 2) for n in range(8)]
    clips += [
        make_clip(f"v{n}", split, "b", None if split == "val" else n) for n in range(3) for split in ("val", "test")
    ]
    part = write_store(tmp_path / "part", clips)
    check(part.uri, Recipe())
    said = capsys.readouterr().out
    assert "task label: no training clip has class b" in said
    assert "task mood: no clip in split val has a label of it, so it counts for nothing in val/score" in said


def test_a_modality_of_no_training_clip_is_named(tmp_path, capsys):
    clips = [make_clip(f"c{n}", "train", "ab"[n % 2], n / 2) for n in range(1)]
    clips = [clips[0], make_clip("v", "val", "a", 1.0), make_clip("t", "test", "b", 2.0)]
    store = write_store(tmp_path / "store", clips)  # every third sample, from the first, has no sound
    with pytest.raises(JobError, match="modality audio: no training clip has any of it"):
        check(store.uri, Recipe(architecture="audio", tasks=("label",)))
    check(store.uri, Recipe(tasks=("label",)))
    assert "modality audio: no training clip has it" in capsys.readouterr().out


def test_a_run_names_what_it_reads_and_what_is_missing_in_how_many_clips(store):
    assert check(store.uri, Recipe()).lines() == [
        f"reading {store.uri}: 29 train, 3 val, 5 test clips",
        "  modality video: in all clips",
        "  modality audio: missing in 13 of 37 clips",
        "  task label (classification, 2 classes): missing in 7 of 37 clips",
        "  task mood (regression): missing in 5 of 37 clips",
    ]
    lines = check(store.uri, Recipe(architecture="audio", tasks=("label",))).lines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  modality audio",
        "  task label (classification, 2 classes)",
    ]
