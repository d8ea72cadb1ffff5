"""A preset is what `--config` takes: each parses into the job that it names, with the settings of the paper."""

import typing
from pathlib import Path

import pytest

from features.corpus.tasks import parse_tasks
from features.datasets.__main__ import READERS, Options
from pipelines.common.cli import parse
from pipelines.extract import ExtractConfig
from pipelines.train import TrainConfig

PRESETS = Path(__file__).parents[2] / "pipelines/presets"


def test_every_benchmark_has_its_two_presets():
    names = {name for benchmark in READERS for name in (f"{benchmark}.yaml", f"{benchmark}-extract.yaml")}
    assert {path.name for path in PRESETS.iterdir()} >= names
    annotated = typing.get_type_hints(Options)["name"]
    assert typing.get_args(annotated) == tuple(READERS)


@pytest.mark.parametrize("name", READERS)
def test_training_presets_hold_the_papers_settings(name):
    config = parse(TrainConfig, ["--config", str(PRESETS / f"{name}.yaml"), "--store", "s", "--out", "o"])
    optim = config.recipe.optim
    assert (optim.optimizer, optim.lr, optim.weight_decay) == ("sgd", 1e-3, 1e-4)
    assert (optim.batch_size, optim.epochs, config.recipe.architecture) == (64, 100, "clcr")
    assert config.recipe.network.stem.video == ("resnet18" if name != "memotion" else "patches")


@pytest.mark.parametrize("name", READERS)
def test_what_a_preset_extracts_is_what_the_other_learns(name):
    extract = parse(ExtractConfig, ["--config", str(PRESETS / f"{name}-extract.yaml"), "--corpus", "c", "--store", "s"])
    train = parse(TrainConfig, ["--config", str(PRESETS / f"{name}.yaml"), "--store", "s", "--out", "o"])
    declared = {task.name for task in parse_tasks(",".join(extract.tasks))}
    assert set(train.recipe.tasks) <= declared and len(extract.modalities) >= 2


def test_the_papers_own_preset_leaves_out_what_is_ours():
    config = parse(TrainConfig, ["--config", str(PRESETS / "paper.yaml"), "--store", "s", "--out", "o"]).recipe
    model = config.network.model
    assert (config.optim.optimizer, config.optim.epochs, model.pooling) == ("sgd", 100, "mean")
    assert not model.null_key and model.nearest == model.farthest == 0
    assert (model.space, config.network.loss.correlation) == ("lifted", "whitened")
