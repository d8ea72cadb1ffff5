"""Averaged weights: what torch's own average gives, used for answers alone, and resumed exactly."""

import copy
from dataclasses import replace

import torch
from learners import losses, recipe, run

from clcr.averaging import AveragedTrainer
from pipelines.training.learner import Learner


def learner(store, **changes):
    return Learner(store.uri, replace(recipe(epochs=2), **changes))


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_average_is_that_of_all_steps_and_training_itself_is_not_changed(store):
    plain, averaged = learner(store), learner(store, ema=0.9)
    assert isinstance(averaged.trainer, AveragedTrainer)
    expected, steps = weights(averaged.trainer.model), 0

    def follow(_):
        nonlocal steps
        decay = min(0.9, (1 + steps) / (10 + steps))
        for mean, now in zip(expected, averaged.trainer.model.parameters(), strict=True):
            mean.lerp_(now.detach(), 1 - decay)
        steps += 1

    first = next(iter(averaged.fit(follow)))
    torch.testing.assert_close(averaged.trainer.average, expected)
    torch.testing.assert_close(weights(averaged.trainer.model), expected)
    other = next(iter(plain.fit()))
    assert first.metrics["train/loss"] == other.metrics["train/loss"]
    torch.testing.assert_close(averaged.trainer.own, weights(plain.trainer.model), rtol=0, atol=0)
    assert any((a != b).any() for a, b in zip(expected, averaged.trainer.own, strict=True))


def test_a_run_resumes_exactly_between_epochs_and_within_one(store):
    whole, states = learner(store, ema=0.9), []
    history = []
    for epoch in whole.fit(lambda _: states.append(copy.deepcopy(whole.trainer.state_dict()))):
        history.append(epoch.metrics)
        states.append(copy.deepcopy(whole.trainer.state_dict()))
    for state in (states[1], states[len(states) // 2 - 1]):
        again = learner(store, ema=0.9)
        again.trainer.load_state_dict(state)
        assert losses(run(again)) == losses(history[state["next_epoch"] :])
        torch.testing.assert_close(again.trainer.average, whole.trainer.average, rtol=0, atol=0)
        torch.testing.assert_close(weights(again.trainer.model), weights(whole.trainer.model), rtol=0, atol=0)


def test_the_best_weights_are_averaged_ones(store):
    one = learner(store, ema=0.9)
    next(iter(one.fit()))
    kept = [one.trainer.best_weights[name] for name, _ in one.trainer.model.named_parameters()]
    torch.testing.assert_close(kept, one.trainer.average)
