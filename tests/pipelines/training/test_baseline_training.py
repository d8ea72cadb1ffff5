"""Baselines through the job's own options and loop: one worker or two, and what only some models have."""

from dataclasses import replace

import pytest
import torch
from learners import losses, on_two_workers, run

from clcr.config import CLCRConfig, LossConfig, MMOrientConfig, ModelConfig, OGMGEConfig
from clcr.training import OptimConfig
from pipelines.common.cli import parse, to_yaml
from pipelines.train import TrainConfig
from pipelines.training.learner import Learner, Recipe

OVER_WORKERS = ("mm_orient", "misa", "ogm_ge")  # models whose losses or gradients need all workers' clips


def recipe(architecture, **parts):
    return Recipe(
        architecture=architecture,
        optim=OptimConfig(epochs=2, batch_size=8),
        network=CLCRConfig(
            ModelConfig(width=16, heads=2, dropout=0.0), mm_orient=MMOrientConfig(linked=0.3, bank=16), **parts
        ),
    )


def learned(uri, rank=0, world=1, *, architecture):
    options = recipe(architecture, ogm_ge=OGMGEConfig(noise=False))  # it is each worker's own, so two are not one
    learner = Learner(uri, options, rank, world)
    history = [{k: v for k, v in m.items() if k.startswith("train/")} for m in run(learner)]
    predictions, _ = learner.trainer.evaluate(learner.loader("val").batches(0))
    order = sorted(range(3), key=predictions["label"].clip_ids.__getitem__)
    state = learner.trainer.model.state_dict()
    bank = {name: state[name] for name in state if name.startswith("bank_")}
    return history, {name: p.logits[order] for name, p in predictions.items()}, bank


def each(uri, rank=0, world=1):
    return {architecture: learned(uri, rank, world, architecture=architecture) for architecture in OVER_WORKERS}


@pytest.fixture(scope="module")
def of_two_workers(store):
    """What each of these models learns on two workers; their start costs more than the training."""
    return on_two_workers(each, store.uri)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OVER_WORKERS)
def test_two_workers_learn_what_one_learns_and_keep_the_same_bank(store, of_two_workers, architecture):
    """Neighbours, rows of the losses and scores come from all workers; the bank is the same sample on each."""
    alone, expected, bank = learned(store.uri, architecture=architecture)
    theirs = [worker[architecture] for worker in of_two_workers]
    for history, logits, _ in theirs:
        for one, two in zip(alone, history, strict=True):
            for name in one:
                assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-3), name
        for name in expected:
            assert torch.allclose(logits[name], expected[name], atol=5e-3), name
    for name, values in bank.items():
        assert torch.equal(theirs[0][2][name], theirs[1][2][name]), name
        assert torch.allclose(theirs[0][2][name].float(), values.float(), atol=5e-3), name
    assert bool(bank) == (architecture == "mm_orient") and (not bank or bank["bank_present"].any(0).all())


def test_a_resumed_mm_orient_equals_one_that_never_stopped(store):
    options = replace(recipe("mm_orient"), optim=OptimConfig(epochs=3, batch_size=8))
    whole, first = losses(run(Learner(store.uri, options))), Learner(store.uri, options)
    next(first.fit())
    again = Learner(store.uri, options)
    again.trainer.load_state_dict(first.trainer.state_dict())
    assert losses(run(again)) == whole[1:]


def test_task_weights_change_what_is_learned(store):
    plain, weighted = (
        losses(run(Learner(store.uri, recipe("concat", loss=LossConfig(task_weights=weights)))))
        for weights in ((), ("mood=0",))
    )
    assert plain[0]["train/loss_mood"] > 0 and weighted[0]["train/loss_mood"] == 0


def test_the_options_of_single_models_pass_the_command_line_and_its_yaml(tmp_path):
    given = (
        "--store s --out o --model mm_orient --mm-orient.threshold 0.9 --mm-orient.side look,mood "
        "--mm-orient.embeddings video=clip --loss.task-weights label=2,mood=.5 --misa.similarity .1 --ogm-ge.no-noise"
    )
    config = parse(TrainConfig, given.split())
    options = config.recipe.network
    assert options.mm_orient == MMOrientConfig(threshold=0.9, side=("look", "mood"), embeddings=("video=clip",))
    assert options.loss.task_weight("label") == 2 and options.loss.task_weight("mood") == 0.5
    assert options.misa.similarity == 0.1 and not options.ogm_ge.noise and options.loss.task_weight("other") == 1
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config
