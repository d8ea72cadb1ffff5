"""The training loop alone: going on from any step, gradients summed over passes, stopping early and in time."""

import itertools
from dataclasses import replace

import pytest
import torch

from clcr.errors import ConfigError, DivergedError
from clcr.training import OptimConfig, Trainer


class Batches:
    """Three fixed batches an epoch."""

    steps = 3

    def __init__(self, make, clips=6):
        self.made = [make.batch(clips, seed) for seed in range(self.steps)]

    def batches(self, epoch, first=0):
        return self.made[first:]

    def sample_batches(self, clips):
        return self.made


def trainer(make, name="clcr", dropout=0.1, loss=None, shift=0.0, **optim):
    torch.manual_seed(0)
    config = OptimConfig(**{"epochs": 3, "lr": 3e-3, **optim})
    return Trainer(
        make.model(name, dropout=dropout, loss=loss, stem={"shift": shift}), make.tasks, config, Batches.steps
    )


def losses_of(trainer, loader):
    """Of every step, and the epochs' metrics, the speed left out."""
    steps, epochs = [], []
    for epoch in trainer.fit(loader, loader, steps.append):
        epochs.append({name: value for name, value in epoch.metrics.items() if not name.startswith("perf/")})
    return steps, epochs


@pytest.mark.parametrize("stop_after", [1, 3, 4, 8])
def test_a_run_goes_on_from_any_step_as_if_it_had_never_stopped_dropout_included(make, tmp_path, stop_after):
    loader = Batches(make)
    steps, epochs = losses_of(trainer(make, shift=0.1), loader)
    assert len(steps) == 9

    class Stop(Exception):
        pass

    def stop(_, taken=itertools.count(1)):  # noqa: B008
        if next(taken) == stop_after:
            torch.save(stopped.state_dict(), tmp_path / "state.pt")
            raise Stop

    stopped = trainer(make, shift=0.1)
    with pytest.raises(Stop):
        list(stopped.fit(loader, loader, stop))
    torch.manual_seed(99)
    resumed = trainer(make, shift=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    more_steps, more_epochs = losses_of(resumed, loader)
    assert more_steps == steps[stop_after:]  # value by value
    assert more_epochs == epochs[(stop_after - 1) // 3 :]


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize(
    ("name", "loss"), [("concat", None), ("mult", None), ("clcr", {"lambda_intra": 0.0, "lambda_inter": 0.0})]
)
def test_summing_gradients_over_passes_is_the_whole_batch_for_losses_that_are_sums_over_clips(
    make, name, loss, micro_batch
):
    """Labels are missing unevenly: each pass must be divided by what is known in the whole step."""
    loader = Batches(make)
    for batch in loader.made:
        batch.targets["word"][:3], batch.targets["mood"][1] = -1, torch.nan
    whole, _ = losses_of(trainer(make, name, dropout=0.0, loss=loss, optimizer="sgd", lr=0.01), loader)
    passes, _ = losses_of(
        trainer(make, name, dropout=0.0, loss=loss, optimizer="sgd", lr=0.01, micro_batch=micro_batch), loader
    )
    for one, many in zip(whole, passes, strict=True):
        assert many == {key: pytest.approx(value, abs=1e-5) for key, value in one.items()}


def test_regularisers_compare_the_clips_of_one_pass(make):
    batch, one = make.batch(12), trainer(make, dropout=0.0, lr=1e-12)
    with_passes = trainer(make, dropout=0.0, lr=1e-12, micro_batch=6)
    with torch.no_grad():
        parts = [with_passes.model.train()(part).losses["intra"].item() for part in batch.split(6)]
    assert with_passes.train_step(batch)["train/loss_intra"] == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert one.train_step(batch)["train/loss_intra"] != pytest.approx(sum(parts) / 2, rel=1e-3)


def test_training_stops_after_so_many_epochs_without_a_better_score(make):
    loader = Batches(make)
    for patience, expected in ((0, 6), (2, 3), (5, 6)):
        stopped = trainer(make, epochs=6, lr=1e-30, patience=patience)  # the first epoch's score is the best
        assert len(losses_of(stopped, loader)[1]) == expected
        assert stopped.finished and stopped.best_epoch == 0


def test_a_batch_splits_into_its_clips_in_order(make):
    batch = make.batch(7)
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [clip for part in parts for clip in part.clip_ids] == batch.clip_ids
    for m, features in batch.features.items():
        assert torch.equal(torch.cat([part.features[m].values for part in parts]), features.values)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_infinite_label_is_blamed_on_its_clip_and_leaves_the_weights_alone(make, grad_clip):
    stopped, batch = trainer(make, grad_clip=grad_clip), make.batch(6)
    batch.targets["mood"][2] = torch.inf
    before = {name: value.clone() for name, value in stopped.model.state_dict().items()}
    stopped.forward.train()
    with pytest.raises(DivergedError, match=r"step 0: the loss is inf on clips clip2: check"):
        stopped.train_step(batch)
    assert all(torch.equal(value, before[name]) for name, value in stopped.model.state_dict().items())


@pytest.mark.parametrize("option", ["patience", "micro_batch"])
def test_options_below_zero_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} -1"):
        OptimConfig(**{option: -1})


@pytest.mark.parametrize("name", ["clcr", "concat"])
def test_heads_of_each_modality_learn_from_the_clips_that_have_it_and_answer_nothing(make, name):
    weighted, loader = trainer(make, name, loss={"unimodal": 0.5}), Batches(make)
    model, batch = weighted.model, loader.made[0]
    assert not model.eval()(batch).unimodal
    answers = model(batch).logits
    with torch.no_grad():
        for parameter in model.own_heads.parameters():
            parameter.add_(1)
    assert all(torch.equal(logits, answers[task]) for task, logits in model(batch).logits.items())
    model.train()
    losses = dict(weighted.train_step(batch))
    own = {losses.pop(f"train/loss_unimodal_{m}") for m in make.features}
    assert all(value > 0 for value in own)
    rest = sum(value for term, value in losses.items() if term != "train/loss")
    assert losses["train/loss"] == pytest.approx(rest + sum(own), rel=1e-5)
    deaf = replace(batch, present={**batch.present, "audio": torch.zeros_like(batch.present["audio"])})
    assert weighted.train_step(deaf)["train/loss_unimodal_audio"] == 0
