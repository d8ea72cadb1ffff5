import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error

from clcr import TaskSpec
from clcr.metrics import (
    Predictions,
    bounded,
    concatenate,
    confusion_matrix,
    score,
    split_metrics,
    task_metrics,
    tracked,
)

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


def f1_by_hand(truth, guess, weighted=False):
    """Harmonic mean of precision and recall of every class that occurs; its mean, or by the classes' numbers."""
    classes = np.union1d(truth, guess)
    hits, said, there = (
        np.array([np.sum(x) for x in counts])
        for counts in zip(*[((truth == c) & (guess == c), guess == c, truth == c) for c in classes], strict=True)
    )
    return np.average(2 * hits / (said + there), weights=there if weighted else None)


def test_classification_metrics_by_hand():
    given = predictions()["color"]
    truth, guess = given.targets[5:].numpy(), given.logits[5:].argmax(-1).numpy()
    found = task_metrics(COLOR, given)
    assert found["accuracy"] == pytest.approx(np.mean(truth == guess))
    assert found["macro_f1"] == pytest.approx(f1_by_hand(truth, guess))
    assert found["n"] == 45
    counts = [[np.sum((truth == row) & (guess == column)) for column in range(3)] for row in range(3)]
    assert confusion_matrix(COLOR, given).tolist() == counts


def test_a_class_that_does_not_occur_has_no_f1_but_a_row():
    given = Predictions(["a", "b"], torch.eye(3)[:2], torch.tensor([0, 0]))
    found = task_metrics(COLOR, given)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert confusion_matrix(COLOR, given).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_regression_metrics_agree_with_scikit_learn_and_scipy():
    given = predictions()["mood"]
    truth, guess = given.targets[5:].numpy(), given.logits[5:, 0].numpy()
    found = task_metrics(MOOD, given)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, guess), rel=1e-5)
    assert found["pearson"] == pytest.approx(pearsonr(truth, guess).statistic, abs=1e-5)


SENTIMENT = TaskSpec("mood", "sentiment")


def sentiment(guess, truth):
    ids = [str(n) for n in range(len(truth))]
    return task_metrics(SENTIMENT, Predictions(ids, torch.tensor(guess)[:, None], torch.tensor(truth)))


def test_sentiment_metrics_by_hand():
    """Rounded and clipped to 3: truth -3 0 0 2 3 1, guess -3 0 0 2 3 -1; to 2: the same but for the ends."""
    found = sentiment(guess=[-3.7, -0.2, 0.4, 1.6, 9.0, -1.0], truth=[-2.8, 0.0, 0.0, 2.4, 3.0, 1.4])
    assert found["acc7"] == found["acc5"] == pytest.approx(5 / 6)
    assert found["acc2_has0"] == pytest.approx(4 / 6)  # the guesses -0.2 and -1.0 are negative, their truths are not
    assert found["acc2_non0"] == pytest.approx(3 / 4)  # the two neutral clips are out
    # Negative: precision 1 / 2, recall 1; positive: precision 1, recall 2 / 3; weights 1 and 3.
    assert found["f1_non0"] == pytest.approx((1 * 2 / 3 + 3 * 4 / 5) / 4)
    assert found["n"] == 6 and {"mae", "pearson", "skill"} <= set(found)


def test_halves_are_rounded_to_even_and_beyond_two_is_one_class_of_five():
    found = sentiment(guess=[0.5, 1.5, 2.5, -2.5], truth=[0.0, 2.0, 3.0, -3.0])
    assert found["acc7"] == 0.5 and found["acc5"] == 1.0


def test_sentiment_metrics_agree_with_the_fields_definition():
    rng = np.random.default_rng(0)
    truth = (rng.integers(-9, 10, 400) / 3).astype(np.float32)
    guess = (truth + rng.normal(size=400)).astype(np.float32)
    guess[:20] = 0
    found = sentiment(guess, truth)
    for limit, name in ((3, "acc7"), (2, "acc5")):
        clipped = (np.round(np.clip(x, -limit, limit)) for x in (guess, truth))
        assert found[name] == pytest.approx(np.mean(np.equal(*clipped)))
    polar = truth != 0
    assert 0 < polar.sum() < 400
    for name, g, t in (("has0", guess >= 0, truth >= 0), ("non0", guess[polar] > 0, truth[polar] > 0)):
        assert found[f"acc2_{name}"] == pytest.approx(np.mean(t == g))
        assert found[f"f1_{name}"] == pytest.approx(f1_by_hand(t, g, weighted=True))


def test_neutral_clips_alone_have_no_polarity_to_measure():
    found = sentiment(guess=[0.1, -0.1], truth=[0.0, 0.0])
    assert found["acc2_has0"] == 0.5 and not any(name.endswith("non0") for name in found)


def test_a_regression_is_not_measured_as_sentiment():
    assert set(task_metrics(MOOD, predictions()["mood"])) == {"mae", "pearson", "skill", "n"}


def test_a_constant_guess_of_the_median_has_no_skill_and_an_exact_one_has_all():
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    ids = list("abcde")
    assert task_metrics(MOOD, Predictions(ids, torch.full((5, 1), 3.0), targets))["skill"] == pytest.approx(0)
    assert task_metrics(MOOD, Predictions(ids, targets[:, None], targets))["skill"] == pytest.approx(1)


def test_where_all_targets_are_equal_a_closer_guess_has_more_skill():
    far, near = (
        task_metrics(MOOD, Predictions(["a", "b"], torch.full((2, 1), guess), torch.tensor([2.0, 2.0])))["skill"]
        for guess in (0.0, 1.5)
    )
    assert (far, near) == (-2.0, -0.5)


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
    assert names["val/score"] == pytest.approx((both["color"]["accuracy"] + bounded(both["mood"]["skill"])) / 2)
    alone = tracked("val", {"color": both["color"]})
    assert set(alone) == {"val/score", "val/accuracy", "val/macro_f1"}
    assert score({"color": both["color"]}) == both["color"]["accuracy"]


def test_a_task_without_a_known_label_has_no_metrics():
    assert task_metrics(COLOR, Predictions(["x"], torch.zeros(1, 3), torch.tensor([-1]))) == {}
