"""Numbers in any unit: the same standardised targets, robust against wild labels, exact where float32 is not."""

import json

import numpy as np
import pytest
import torch

import clcr
from clcr.config import LossConfig, ModelConfig
from clcr.errors import ConfigError
from clcr.metrics import Predictions as P
from clcr.metrics import bounded, score, task_metrics
from clcr.tasks import task_loss
from clcr.units import Units, robust_statistics
from clcr.versions import completed_weights

MOOD = clcr.TaskSpec("mood", "regression")
FEATURES = {"a": clcr.FeatureSpec((4,), 4.0, "float32"), "b": clcr.FeatureSpec((3,), 4.0, "float32")}


def model(name="concat", **loss):
    config = clcr.CLCRConfig(ModelConfig(width=16, heads=2), loss=LossConfig(**loss))
    return clcr.build(name, config, FEATURES, {"mood": MOOD})


def batch(labels):
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(len(labels), 5, *spec.shape, generator=generator) for name, spec in FEATURES.items()}
    samples = [
        {"clip_id": str(i), "features": {m: x[i].numpy() for m, x in features.items()}, "targets": {"mood": label}}
        for i, label in enumerate(labels)
    ]
    return clcr.batches.collate(samples, FEATURES, {"mood": MOOD})


def test_standardised_targets_are_the_same_in_every_unit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels = rng.normal(size=rng.integers(2, 60)) * 10 ** rng.uniform(-3, 3)
        scale = rng.choice([-1, 1]) * 10 ** rng.uniform(-9, 9)
        offset = scale * rng.uniform(-1, 1) * 10 ** rng.uniform(0, 6) * np.abs(labels).max()
        plain, other = (Units({"mood": MOOD}) for _ in range(2))
        plain.fit({"mood": labels})
        other.fit({"mood": offset + scale * labels})
        z = [((torch.tensor(y) - u.center) / u.spread) for u, y in ((plain, labels), (other, offset + scale * labels))]
        torch.testing.assert_close(*z, rtol=1e-6, atol=1e-6)


def test_a_wild_label_and_missing_ones_change_little_and_many_equal_ones_have_a_spread():
    labels = np.arange(101.0)
    center, spread = robust_statistics(labels)
    assert center == 50 and spread == pytest.approx(1.4826 * 25)
    wild = np.append(labels, [1e30, np.nan])
    assert robust_statistics(wild) == (pytest.approx(50.5), pytest.approx(spread, rel=0.03))
    assert robust_statistics([0] * 9 + [10.0])[1] == pytest.approx(1.0)
    assert robust_statistics([np.nan]) == (0.0, 1.0)


@pytest.mark.parametrize("labels", [[3.0], [2.5, 2.5, float("nan")], [1.7e9] * 4])
def test_a_constant_target_is_named(labels):
    with pytest.raises(ConfigError, match=r"task 'mood': every training label is .*nothing to learn"):
        model().fit_statistics([batch(labels)])


def test_a_time_stamp_is_answered_to_the_second():
    stamps = [1.7e9 + n for n in range(40)]
    learner = model()
    learner.fit_statistics([batch(stamps)])
    out = learner(batch(stamps)).logits["mood"]
    assert out.dtype == torch.float64
    z = (out - learner.units.center) / learner.units.spread
    assert 0 < z.abs().max() < 30  # float32 has steps of 128 s here, and would give 0
    loss = task_loss(
        MOOD, torch.tensor([[1.7e9 + 3]], dtype=torch.float64), torch.tensor([1.7e9 + 1], dtype=torch.float64), 4.0
    )
    assert loss[0].item() == pytest.approx(0.5)


def test_a_saved_model_answers_in_the_unit_of_the_labels(tmp_path):
    labels = [500 + 100 * n for n in range(9)]
    learner = model("clcr").eval()
    learner.fit_statistics([batch(labels)])
    clcr.save(learner, tmp_path, {})
    with torch.no_grad():
        answer, again = (each(batch(labels)).logits["mood"] for each in (learner, clcr.load(tmp_path)))
    assert torch.equal(answer, again) and 300 < answer.mean() < 1500


def test_weights_without_units_are_neutral_and_the_option_switches_them_off():
    raw = model(standardise=False)
    raw.fit_statistics([batch([500.0, 700.0])])
    assert raw.units.center.item() == 0 and raw.units.spread.item() == 1
    state = raw.state_dict()
    old = {name: value for name, value in state.items() if not name.startswith("units.")}
    assert completed_weights(old, state).keys() == state.keys()


def test_the_score_is_bounded_and_the_plain_one_is_there_by_option():
    assert [bounded(skill) for skill in (1.0, 0.3, 0.0)] == [1.0, 0.3, 0.0]
    assert bounded(-1.0) == -0.5 and -1 <= bounded(-1e12) < -0.999 and bounded(-float("inf")) == -1
    terms = [bounded(skill) for skill in np.linspace(-50, 1, 500)]
    assert terms == sorted(terms)
    metrics = {"a": {"accuracy": 0.9}, "b": {"skill": -1e6}}
    assert score(metrics) == pytest.approx(-0.05, abs=1e-5) and score(metrics, "skill") < -1e5


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1.0, 1e9, 1e200])
def test_metrics_are_json_in_every_unit(scale):
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64) * scale
    guesses = (truth[:, None] * 1.1, torch.full((4, 1), 1e308, dtype=torch.float64), truth[:, None] * 0)
    for guess in guesses:
        found = task_metrics(MOOD, P(list("abcd"), guess, truth), spread=scale)
        json.dumps(found, allow_nan=False)
    assert task_metrics(MOOD, P(list("abcd"), guesses[0], truth), spread=scale)["skill"] == pytest.approx(
        1 - 0.375 / 2.25
    )


def test_a_split_whose_targets_are_equal_has_a_skill_in_units_of_the_training_labels():
    truth = torch.full((3,), 2e9, dtype=torch.float64)
    found = task_metrics(MOOD, P(list("abc"), truth[:, None] + 5e8, truth), spread=1e9)
    assert found["skill"] == pytest.approx(-0.5)
