import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from clcr import TaskSpec
from clcr.metrics import Predictions, concatenate, confusion_matrix, score, split_metrics, task_metrics, tracked

COLOR = TaskSpec("color", "classification", ("a", "b", "c"))
MOOD = TaskSpec("mood", "regression")


def predictions(n=50, missing=5, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, n)
    targets[:missing] = -1
    ids = [f"clip{i}" for i in range(n)]
    mood = rng.normal(size=n).astype(np.float32)
    mood[:missing] = np.nan
    return {
        "color": Predictions(ids, torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32)), torch.tensor(targets)),
        "mood": Predictions(ids, torch.from_numpy(rng.normal(size=(n, 1)).astype(np.float32)), torch.tensor(mood)),
    }


def test_classification_metrics_agree_with_scikit_learn():
    given = predictions()["color"]
    truth, guess = given.targets[5:].numpy(), given.logits[5:].argmax(-1).numpy()
    found = task_metrics(COLOR, given)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(truth, guess, average="macro"))
    assert found["n"] == 45
    assert (confusion_matrix(COLOR, given).numpy() == reference.confusion_matrix(truth, guess)).all()


def test_regression_metrics_agree_with_scikit_learn_and_numpy():
    given = predictions()["mood"]
    truth, guess = given.targets[5:].numpy(), given.logits[5:, 0].numpy()
    found = task_metrics(MOOD, given)
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(truth, guess), rel=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-5)


def test_a_constant_guess_of_the_median_has_no_skill_and_an_exact_one_has_all():
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    ids = list("abcde")
    assert task_metrics(MOOD, Predictions(ids, torch.full((5, 1), 3.0), targets))["skill"] == pytest.approx(0)
    assert task_metrics(MOOD, Predictions(ids, targets[:, None], targets))["skill"] == pytest.approx(1)


def test_padding_samples_fall_out_when_workers_are_joined():
    whole = predictions()
    first = {t: Predictions([*p.clip_ids[:20], ""], p.logits[:21], p.targets[:21]) for t, p in whole.items()}
    second = {t: Predictions(p.clip_ids[20:], p.logits[20:], p.targets[20:]) for t, p in whole.items()}
    joined = concatenate([first, second])
    assert joined["color"].clip_ids == whole["color"].clip_ids
    assert torch.equal(joined["color"].logits, whole["color"].logits)


def test_tracking_names_carry_the_task_only_where_there_are_several():
    tasks = {"color": COLOR, "mood": MOOD}
    both = split_metrics(tasks, predictions())
    names = tracked("val", both)
    assert names["val/accuracy"] == both["color"]["accuracy"] == names["val/color/accuracy"]
    assert names["val/score"] == pytest.approx((both["color"]["accuracy"] + both["mood"]["skill"]) / 2)
    alone = tracked("val", {"color": both["color"]})
    assert set(alone) == {"val/score", "val/accuracy", "val/macro_f1"}
    assert score({"color": both["color"]}) == both["color"]["accuracy"]


def test_a_task_without_a_known_label_has_no_metrics():
    assert task_metrics(COLOR, Predictions(["x"], torch.zeros(1, 3), torch.tensor([-1]))) == {}
