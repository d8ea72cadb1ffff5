"""Answers in plain values: what `model.predict` says is what the logits say, whatever the batches."""

import numpy as np
import pytest
import torch

import clcr
from clcr.answers import to_events
from clcr.errors import ClcrError, ConfigError
from clcr.registry import MODELS

WHEN = clcr.TaskSpec("when", "events", ("background", "a", "b"), 5.0)


def fitted(make, name, tasks=None):
    model = clcr.build(name, make.config(dropout=0.3), make.features, tasks or make.tasks)
    model.fit_statistics([make.batch()])
    model.prepare_evaluation(lambda clips: [make.batch(4, seed=7)])
    return model


@pytest.mark.parametrize("name", [*MODELS, "video"])
def test_a_prediction_is_what_the_logits_say_whatever_the_batch_size(make, name):
    model, samples = fitted(make, name), make.samples()
    answers = list(model.predict(iter(samples), batch_size=4))
    assert [answer["clip_id"] for answer in answers] == [sample["clip_id"] for sample in samples]
    assert model.training  # as it was, and still nothing was dropped out
    with torch.no_grad():
        logits = model.eval()(make.batch()).logits
    for number, answer in enumerate(answers):
        probabilities = logits["word"][number].softmax(-1)
        assert answer["word"] == "abc"[int(probabilities.argmax())]
        assert answer["word_probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert list(answer["word_probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert list(answer["word_probabilities"]) == ["a", "b", "c"]
        assert answer["mood"] == pytest.approx(logits["mood"][number].item(), abs=1e-5)


def test_events_are_answered_in_seconds_within_the_clip(make):
    model = fitted(make, "concat", {"when": WHEN}).eval()
    samples = [sample | {"duration": 1.1} for sample in make.samples()]
    for answer in model.predict(samples):
        for event in answer["when"]:
            assert event["label"] in "ab" and 0 <= event["start"] < event["end"] <= 1.1
    with pytest.raises(ClcrError, match="clip 'clip0': task 'when' is events"):
        next(model.predict(make.samples()))


def test_runs_of_a_class_are_one_event_and_background_is_none():
    bins = np.array([0, 1, 1, 2, 0, 1, 1, 1])  # the last two are padding: 1.1 s hold 6 bins of .2 s
    assert to_events(WHEN, bins, 1.1) == [
        {"start": 0.2, "end": 0.6, "label": "a"},
        {"start": 0.6, "end": 0.8, "label": "b"},
        {"start": 1.0, "end": 1.1, "label": "a"},
    ]


def test_a_batch_of_no_clips_is_refused(make):
    with pytest.raises(ConfigError, match="batch_size 0"):
        next(fitted(make, "concat").predict(make.samples(), batch_size=0))


def test_features_that_the_model_does_not_know_are_named(make):
    model, (sample, *_) = fitted(make, "concat"), make.samples()
    sample["features"]["audio"] = sample["features"]["audio"][:, :5]
    with pytest.raises(ClcrError, match="a token of 'audio' has shape"):
        next(model.predict([sample]))
