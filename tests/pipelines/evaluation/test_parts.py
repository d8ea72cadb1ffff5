"""Parts of an evaluation: conditions of the input, calibration, intervals and tests, against what is known of them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small_model

import clcr
from pipelines.answering.batches import batch_of
from pipelines.evaluation.calibration import calibration, calibration_figures, fit_temperature
from pipelines.evaluation.comparison import compare_models, holm, intervals
from pipelines.evaluation.conditions import Condition, measure_spread, noises, subsets
from pipelines.evaluation.report import environment
from pipelines.evaluation.scores import Scored, class_areas, figures, groups_of, plain, score_rows
from pipelines.evaluation.slices import _values as slice_values
from pipelines.evaluation.slices import worst_clips

LETTERS = clcr.TaskSpec("letter", "classification", ("a", "b", "c", "d"))
NUMBER = clcr.TaskSpec("number", "regression")


def scored(task, truth, logits):
    n = len(truth)
    return Scored(task, task.classes, tuple(map(str, range(n))), np.arange(n), np.array(truth), np.array(logits))


def random_scored(n=4000, scale=1.0, seed=0):
    """Labels drawn from the very probabilities that the logits (over scale) say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (probabilities.cumsum(1) < rng.random((n, 1))).sum(1)
    return scored(LETTERS, truth, (scale * logits).astype(np.float32))


@given(st.integers(0, 6))
def test_every_subset_is_there_once(count):
    names = [f"m{i}" for i in range(count)]
    found = subsets(names)
    kept = [frozenset(names) - set(c.absent) for c in found]
    assert len(set(kept)) == len(kept) == len({c.name for c in found})
    assert len(found) == (0 if count < 2 else 2**count - 2 if count <= 4 else 2 * count)


def test_an_absent_modality_is_as_if_the_clip_had_no_such_track(store, tmp_path):
    model = small_model(tmp_path, store, "clcr")
    rows = store.index("train").to_pylist()[1:3]  # with sound
    batch = batch_of(model, store, rows)
    muted = Condition("only-video", absent=("audio",)).apply(batch, {}, 0)
    assert not muted.present["audio"].any() and muted.present["video"].all() and batch.present["audio"].all()
    silent = batch_of(model, store, store.index("train").to_pylist()[:1])  # a clip without sound
    assert not silent.present["audio"].any()
    with torch.no_grad():
        one, other = model(muted).logits["label"], model(batch).logits["label"]
    assert torch.isfinite(one).all() and not torch.equal(one, other)


def test_worst_clips_of_one_clip_id_are_told_apart_by_their_row():
    index = [
        {"clip_id": "same", "duration": 1.0, "nbytes": n, "shard": f"{n}:train", "tokens_audio": n} for n in (0, 1)
    ]
    values = Scored(NUMBER, (), ("same", "same"), np.arange(2), np.array([0.0, 0.0]), np.array([[1.0], [3.0]]))
    worst = worst_clips(values, index, 2)
    assert [(clip["row"], clip["loss"], clip["shard"]) for clip in worst] == [(1, 3.0, "1:train"), (0, 1.0, "0:train")]


def test_noise_is_a_function_of_seed_clip_and_modality_alone(store, tmp_path):
    model = small_model(tmp_path, store)
    rows = store.index("train").to_pylist()[:6]
    together, spread = batch_of(model, store, rows), measure_spread([batch_of(model, store, rows)])
    assert spread["audio"].shape == (8,) and spread["video"].shape == ()
    for condition in noises(("audio", "video"), (0.5,)):
        noisy = condition.apply(together, spread, 3).features[condition.noisy]
        for i, row in enumerate(rows):
            alone = condition.apply(batch_of(model, store, [row]), spread, 3).features[condition.noisy]
            tokens = int(alone.valid[0].sum())
            assert torch.equal(noisy.values[i, :tokens], alone.values[0, :tokens])
            assert not noisy.values[i, tokens:].any()  # padding stays zero
        other = condition.apply(together, spread, 4).features[condition.noisy]
        assert not torch.equal(noisy.values, other.values)
        assert noisy.values.dtype == together.features[condition.noisy].values.dtype


def test_spread_is_the_standard_deviation_of_the_valid_tokens(store, tmp_path):
    model = small_model(tmp_path, store)
    batch = batch_of(model, store, store.index("train").to_pylist()[:6])
    sound = batch.features["audio"]
    wanted = sound.values[sound.valid].double().std(0, unbiased=False)
    parts = batch.split(2)
    np.testing.assert_allclose(measure_spread(parts)["audio"], wanted.numpy(), rtol=1e-9)


def test_calibrated_answers_have_no_error_and_overconfident_ones_find_their_temperature():
    right, sharp = random_scored(), random_scored(scale=3.0)
    assert calibration_figures(right, 1.0)["ece"] < 0.03 < 0.1 < calibration_figures(sharp, 1.0)["ece"]
    assert fit_temperature(right) == pytest.approx(1, abs=0.1) and fit_temperature(sharp) == pytest.approx(3, abs=0.3)
    found = calibration(sharp, random_scored(scale=3.0, seed=1))
    assert found["scaled"]["ece"] < 0.03 and found["scaled"]["nll"] < found["nll"]
    assert sum(b["n"] for b in found["bins"]) == 4000


def test_a_temperature_at_the_limit_of_its_search_is_marked():
    all_right = random_scored(scale=9.0)
    all_right = replace(all_right, truth=all_right.guess)
    say = environment().filters["temperature"]
    assert say(fit_temperature(all_right)) == "0.05 (limit)" and say(1.25) == "1.250" and say(None) == "–"


def test_intervals_cover_the_figure_and_shrink_with_more_clips():
    few, many = (intervals(random_scored(n), 0)["accuracy"] for n in (100, 1600))
    accuracy = figures(random_scored(1600))["accuracy"]
    assert many[0] < accuracy < many[1] and (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(4, rel=0.3)
    half = 1.96 * (accuracy * (1 - accuracy) / 1600) ** 0.5
    assert (many[1] - many[0]) / 2 == pytest.approx(half, rel=0.15)


def test_paired_tests_tell_a_better_model_and_find_none_between_equals():
    truth = np.tile(np.arange(4), 50)
    good, bad = (np.eye(4)[np.where(np.arange(200) < n, truth, (truth + 1) % 4)] for n in (150, 110))
    pair = compare_models({"good": scored(LETTERS, truth, good), "bad": scored(LETTERS, truth, bad)}, 0)[0]
    assert (pair["only_a_right"], pair["only_b_right"], pair["difference"]) == (40, 0, pytest.approx(0.2))
    assert pair["p"] == pytest.approx(2 * 0.5**40) and pair["interval"][0] > 0.1
    same = compare_models({name: scored(LETTERS, truth, good) for name in "ab"}, 0)[0]
    assert (same["p"], same["difference"]) == (1, 0)
    numbers = np.linspace(0, 1, 200)
    close, far = (scored(NUMBER, numbers, (numbers + error)[:, None]) for error in (0.01, 0.2))
    pair = compare_models({"close": close, "far": far}, 0)[0]
    assert pair["p"] < 1e-6 and pair["difference"] == pytest.approx(-0.19)


def test_clips_of_a_group_are_resampled_and_tested_together():
    """Ten speakers of forty clips each: within one, all are right or all are wrong."""
    by_speaker = np.repeat(np.arange(10), 40)
    truth = np.zeros(400, int)
    good, bad = (np.eye(4)[np.where(by_speaker < n, 0, 1)] for n in (8, 6))
    alone = {name: scored(LETTERS, truth, logits) for name, logits in (("good", good), ("bad", bad))}
    grouped = {name: replace(values, groups=by_speaker) for name, values in alone.items()}
    (low, high), (lower, higher) = (intervals(s["good"], 0)["accuracy"] for s in (alone, grouped))
    assert (higher - lower) / (high - low) == pytest.approx(40**0.5, rel=0.3)
    (pair,), (cautious,) = (compare_models(s, 0) for s in (alone, grouped))
    assert pair["p"] < 1e-20 and cautious["p"] == pytest.approx(0.5, abs=0.02)  # two speakers differ
    assert cautious["test"] == "Wilcoxon signed-rank over groups" and cautious["difference"] == pair["difference"]
    rows = [{"group": g} for g in ("x", "x", None, "y", "")]
    assert groups_of(rows).tolist() == [0, 0, 1, 2, 3]
    mixed = [{"group": "1", "shard": shard} for shard in ("a:train-0", "a:train-0", "b:train-0")]
    assert groups_of(mixed).tolist() == [0, 0, 1]
    assert groups_of([{}] * 3) is None and groups_of([{"group": "x"}] * 3) is None


def test_quarters_whose_edges_are_close_have_names_of_their_own():
    column = pa.chunked_array([60 + np.arange(40) / 10_000])
    assert len(set(slice_values(column))) == 4


def test_holm_corrects_as_in_its_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_events_are_scored_by_bin_and_resampled_by_clip():
    task = clcr.TaskSpec("word", "events", ("background", "hello"), 2.0)
    rows = [
        {"clip_id": "x", "duration": 2.0, "label_word": [{"start": 0.0, "end": 1.0, "label": "hello"}]},
        {"clip_id": "y", "duration": 1.0, "label_word": None},
        {"clip_id": "z", "duration": 1.0, "label_word": [{"start": 0.0, "end": 0.5, "label": "moo"}]},
    ]
    logits = [np.eye(2, dtype=np.float32)[[1, 1, 1, 0]], np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)]
    found = score_rows(task, rows, logits)
    assert found.rows.tolist() == [0, 0, 0, 0, 2, 2] and found.labels == ("background", "hello", "moo")
    assert found.truth.tolist() == [1, 1, 0, 0, 2, 0]
    assert figures(found)["accuracy"] == pytest.approx(4 / 6)
    assert np.isnan(class_areas(found)[2]) and set(intervals(found, 0)) == {"accuracy", "macro_f1"}


@settings(max_examples=30)
@given(
    st.recursive(st.floats() | st.integers(-5, 5), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=8)
)
def test_json_never_holds_nan(tree):
    import json

    json.loads(json.dumps(plain(tree), allow_nan=False), parse_constant=pytest.fail)
