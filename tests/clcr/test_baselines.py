"""What makes each baseline the model that it is named after; test_models holds what all have in common."""

import math
from dataclasses import replace

import pytest
import torch

import clcr
from clcr.baselines.misa import central_moment_discrepancy, overlap, weighted_losses
from clcr.baselines.ogm_ge import coefficients
from clcr.batches import collate
from clcr.config import MISAConfig
from clcr.errors import ConfigError
from clcr.training import OptimConfig, Trainer


def without(batch, modality):
    return replace(batch, present={**batch.present, modality: torch.zeros(len(batch)) > 0})


def largest_difference(first, second):
    return max((first.logits[t] - second.logits[t]).abs().max().item() for t in first.logits)


@torch.no_grad()
def test_late_fusion_is_the_mean_of_what_each_modality_says_alone(make):
    batch = make.batch()
    model = make.train(make.model("late"), batch, steps=5).eval()
    both, video, audio = model(batch), model(without(batch, "audio")), model(without(batch, "video"))
    assert largest_difference(video, audio) > 1e-2
    for task in make.tasks:
        assert torch.allclose(both.logits[task], (video.logits[task] + audio.logits[task]) / 2, atol=1e-5)
    nothing = model(without(without(batch, "audio"), "video"))
    assert not any(logits.any() for logits in nothing.logits.values())


@torch.no_grad()
def test_film_scales_and_shifts_tokens_by_the_mean_of_the_other_modality(make):
    batch = make.batch()
    model, seen = make.model("film", pooling="mean").eval(), {}
    start = model(batch)
    model.heads.register_forward_hook(lambda module, given, result: seen.update(summaries=given[0]))
    (deepest,) = model.encoder(batch)
    mean = {m: t.values.sum(1) / t.valid.sum(1, keepdim=True) for m, t in deepest.items()}  # padding is zero
    model(batch)
    plain = torch.cat([mean["video"], mean["audio"]], dim=-1)
    assert torch.allclose(seen["summaries"][:, 0], plain, atol=1e-5)  # at the start nothing is modulated
    for linear in model.modulation:
        linear.weight.normal_(std=0.1)
    assert largest_difference(model(batch), start) > 1e-3
    gamma, beta = (mean["audio"] @ model.modulation[0].weight.T).chunk(2, dim=-1)
    assert torch.allclose(seen["summaries"][:, 0, :32], (1 + gamma) * mean["video"] + beta, atol=1e-5)
    model(without(batch, "audio"))
    assert torch.allclose(seen["summaries"][:, 0, :32], mean["video"], atol=1e-5)


def moments(x, y):
    """Central moment discrepancy, plainly."""
    x, y = x.numpy().astype("float64"), y.numpy().astype("float64")
    total = ((x.mean(0) - y.mean(0)) ** 2).sum() ** 0.5
    for power in range(2, 6):
        a, b = ((rows - rows.mean(0)) ** power for rows in (x, y))
        total += ((a.mean(0) - b.mean(0)) ** 2).sum() ** 0.5
    return total


def test_misas_discrepancy_is_the_distance_of_five_moments():
    x, y, mask = torch.rand(40, 6), torch.rand(40, 6) ** 3, torch.ones(40, dtype=torch.bool)
    mask[30:] = False
    assert central_moment_discrepancy(x, y, mask).item() == pytest.approx(moments(x[:30], y[:30]), rel=1e-4)
    assert central_moment_discrepancy(x, x[torch.randperm(40)], torch.ones(40) > 0) < 1e-4
    x.requires_grad_()
    central_moment_discrepancy(x, x.detach(), mask).backward()
    assert x.grad.isfinite().all()


def test_misas_overlap_is_of_directions_over_the_batch():
    x, y, mask = torch.randn(16, 4), torch.randn(16, 5), torch.ones(16, dtype=torch.bool)
    rows = [r - r.mean(0) for r in (x, y)]
    rows = [r / r.norm(dim=1, keepdim=True) for r in rows]
    assert torch.allclose(overlap(x, y, mask), ((rows[0] @ rows[0].T) * (rows[1] @ rows[1].T)).mean(), atol=1e-6)
    signs = torch.tensor([[1.0], [-1.0]] * 8)
    other = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]] * 4)
    assert overlap(signs, other, mask) < 1e-6 and overlap(signs, signs, mask).item() == pytest.approx(1)
    assert torch.allclose(overlap(x, y, mask), overlap(torch.cat([x, x]), torch.cat([y, y]), torch.arange(32) < 16))
    assert torch.allclose(overlap(x, y, mask), overlap(torch.cat([x, x]), torch.cat([y, y]), torch.ones(32) > 0))


def test_misas_weights_switch_its_losses(make):
    rows = [tuple(torch.rand(8, 4) for _ in range(3)) for _ in range(4)]
    there = torch.ones(8, 3, dtype=torch.bool)
    one = weighted_losses(*rows, there, MISAConfig(1.0, 1.0, 1.0))
    two = weighted_losses(*rows, there, MISAConfig(2.0, 0.0, 3.0))
    assert two["similarity"] == pytest.approx(2 * one["similarity"].item()) and two["difference"] == 0
    assert two["reconstruction"] == pytest.approx(3 * one["reconstruction"].item())
    error = torch.stack([(u - r).square().mean() for u, r in zip(rows[0], rows[3], strict=True)]).mean()
    assert one["reconstruction"] == pytest.approx(error.item())


def test_misas_summaries_are_not_made_easier_to_restore():
    rows = [tuple(torch.rand(8, 4, requires_grad=True) for _ in range(2)) for _ in range(4)]
    weighted_losses(*rows, torch.ones(8, 2) > 0, MISAConfig())["reconstruction"].backward()
    summaries, *_, restored = rows
    assert all(u.grad is None for u in summaries) and all(r.grad.any() for r in restored)


def test_training_misa_brings_shared_parts_together_and_restores_the_modalities(make):
    batch = make.batch(16)
    model = make.model("misa")
    before = {name: loss.item() for name, loss in model.train()(batch).losses.items()}
    after = {name: loss.item() for name, loss in make.train(model, batch, steps=60)(batch).losses.items()}
    assert set(before) == {"similarity", "difference", "reconstruction"}
    assert after["similarity"] < 0.5 * before["similarity"]
    assert after["reconstruction"] < 0.5 * before["reconstruction"]
    assert not model.eval()(batch).losses


def test_a_modality_that_is_ahead_is_slowed_down_and_no_other():
    assert coefficients(torch.tensor([6.0, 3.0]), 0.5).tolist() == pytest.approx([1 - math.tanh(1.0), 1])
    three = coefficients(torch.tensor([4.0, 4.0, 1.0]), 1.0)
    expected = 1 - math.tanh(4.0 / 2.5)
    assert three.tolist() == pytest.approx([expected, expected, 1.0])
    assert coefficients(torch.tensor([3.0, 3.0]), 0.5).tolist() == [1, 1]
    assert coefficients(torch.zeros(2), 0.5).tolist() == [1, 1]
    assert coefficients(torch.tensor([1.0, 0.0]), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_encoders_are_multiplied_by_the_coefficients_and_no_others(make, compiled):
    batch = make.batch(12)

    def gradients(alpha):
        torch.manual_seed(0)
        model = make.model("ogm_ge", ogm_ge={"alpha": alpha, "noise": False}, stem={"shift": 0.0})
        with torch.no_grad():
            model.parts[0][0].weight.mul_(30)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        out = forward(batch)
        torch.nn.functional.cross_entropy(out.logits["word"], batch.targets["word"]).backward()
        return model, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (plain, expected), (model, found) = gradients(0.0), gradients(1.5)
    assert plain.coefficients.tolist() == [1, 1]
    k = model.coefficients
    assert (k < 1).sum() == 1 and (k == 1).sum() == 1
    for name, gradient in found.items():
        scale = k[int(name.split(".")[2])] if name.startswith("encoder.") else 1.0
        assert torch.allclose(gradient, scale * expected[name], rtol=1e-3, atol=1e-7), name


def test_enhancement_adds_noise_as_spread_as_the_gradient_to_the_encoders_matrices(make):
    batch = make.batch(12)

    def gradients(noise):
        torch.manual_seed(0)
        model = make.model("ogm_ge", width=64, ogm_ge={"alpha": 0.0, "noise": noise}, stem={"shift": 0.0})
        make.loss(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, noisy = gradients(False), gradients(True)
    for name, gradient in plain.items():
        added = noisy[name] - gradient
        if name.startswith("encoder.") and gradient.ndim > 1:
            assert added.std() == pytest.approx(gradient.std().item(), rel=0.1), name
        else:
            assert not added.any(), name


def test_a_score_is_the_probability_that_a_modality_alone_gives_to_what_is_known(make):
    samples = make.samples(6)
    del samples[0]["targets"]["word"]
    model, batch = make.model("ogm_ge").train(), collate(samples, make.features, make.tasks)
    with torch.no_grad():
        for linear in model.parts[1]:
            linear.weight.zero_()  # audio says nothing: one third for each of three classes
    scores = [model._score([torch.zeros(6, 3), torch.zeros(6, 1)], batch.targets).item()]
    assert scores == pytest.approx([5 / 3])
    sure = torch.nn.functional.one_hot(batch.targets["word"].clamp(min=0), 3) * 50.0
    assert model._score([sure, torch.zeros(6, 1)], batch.targets).item() == pytest.approx(5.0)


def test_ogm_ge_without_a_class_to_score_is_refused(make):
    with pytest.raises(ConfigError, match="no task has classes"):
        clcr.build("ogm_ge", make.config(), make.features, {"mood": make.tasks["mood"]})


@pytest.mark.parametrize("name", ["concat", "mm_orient"])
def test_a_tasks_weight_scales_its_loss_in_the_training_loop(make, name):
    batch, losses = make.batch(), []
    for weights in ((), ("word=2.5", "mood=0")):
        torch.manual_seed(0)
        model = make.model(name, loss={"task_weights": weights}, stem={"shift": 0.0})
        losses.append(Trainer(model, make.tasks, OptimConfig(epochs=1), 1).train_step(batch))
    assert losses[1]["train/loss_word"] == pytest.approx(2.5 * losses[0]["train/loss_word"], rel=1e-5)
    assert losses[1]["train/loss_mood"] == 0
    assert losses[1]["train/loss"] == pytest.approx(losses[1]["train/loss_word"], rel=1e-5)


def test_depth_and_every_models_own_options_leave_the_others_as_they_are(make):
    sizes = {}
    for options in ({}, {"depth": 3}, {"mm_orient": {"bank": 4}}, {"misa": {"similarity": 0.0}}):
        for name in ("concat", "late", "film"):
            sizes.setdefault(name, set()).add(sum(p.numel() for p in make.model(name, **options).parameters()))
    assert all(len(counts) == 1 for counts in sizes.values())
