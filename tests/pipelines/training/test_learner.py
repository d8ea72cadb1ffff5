"""The one training loop over a real store, without Ray: determinism, resuming, several workers."""

import pytest
import torch
from learners import losses, on_two_workers, recipe, run

from clcr.config import CLCRConfig, ModelConfig
from clcr.errors import ClcrError
from pipelines.training.learner import Learner


def test_one_seed_gives_one_result_and_another_seed_another(store):
    first, second = (losses(run(Learner(store.uri, recipe()))) for _ in range(2))
    assert first == second
    from dataclasses import replace

    assert losses(run(Learner(store.uri, replace(recipe(), seed=1)))) != first


@pytest.mark.parametrize("architecture", ["clcr", "concat", "video", "audio"])
def test_every_model_runs_the_loop_and_reports_losses_and_diagnostics(store, architecture):
    learner = Learner(store.uri, recipe(architecture))
    history = run(learner)
    assert len(history) == 3
    assert {"train/loss", "train/loss_label", "train/loss_mood", "val/score", "val/accuracy", "val/mae"} <= set(
        history[0]
    )
    if architecture == "clcr":
        assert {"train/loss_intra", "diag/participation/0/video", "diag/omega/2", "diag/beta/audio"} <= set(history[0])
        assert 0 < history[0]["diag/participation/0/video"] <= 1
    metrics, predictions, _ = learner.test()
    assert set(metrics) == {"label", "mood"}
    assert len(predictions["label"].clip_ids) == len(set(predictions["label"].clip_ids)) == 5


def test_a_run_resumed_from_a_checkpoint_equals_one_that_never_stopped(store, tmp_path):
    whole = losses(run(Learner(store.uri, recipe(epochs=4))))
    interrupted = Learner(store.uri, recipe(epochs=4))
    for epoch in interrupted.fit():
        if epoch.number == 1:
            break
    torch.save(interrupted.trainer.state_dict(), tmp_path / "state.pt")
    resumed = Learner(store.uri, recipe(epochs=4))
    resumed.trainer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert losses(run(resumed)) == whole[2:]


def test_the_best_epochs_weights_are_the_ones_tested(store):
    learner = Learner(store.uri, recipe(epochs=4))
    scores = [m["val/score"] for m in run(learner)]
    learner.trainer.load_best()
    predictions, _ = learner.trainer.evaluate(learner.val.batches(0))
    from clcr.metrics import score, split_metrics

    assert score(split_metrics(learner.tasks, predictions)) == pytest.approx(max(scores))


def test_a_loss_that_is_not_finite_names_the_clips(store):
    learner = Learner(store.uri, recipe())
    batch = next(iter(learner.train.batches(0)))
    next(learner.trainer.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ClcrError, match=batch.clip_ids[0]):
        learner.trainer.train_step(batch)


def without_dropout():
    from dataclasses import replace

    return replace(recipe(), network=CLCRConfig(model=ModelConfig(width=16, heads=2, dropout=0.0)))


def learned(uri, rank=0, world=1):
    return losses(run(Learner(uri, without_dropout(), rank, world)))


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(store):
    """Shares of 29 clips in batches of 8 are uneven: padding, global counts and gathered rows must all be right."""
    alone = learned(store.uri)
    for theirs in on_two_workers(learned, store.uri):
        for one, two in zip(alone, theirs, strict=True):
            for name in one:
                assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-3), name
