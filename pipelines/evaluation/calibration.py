"""Calibration: does a class that is given .8 turn out right in 8 of 10 cases? And the temperature that repairs it.

The expected calibration error (Guo et al. 2017) is the gap between confidence and accuracy, averaged over bins of
confidence. The temperature divides the logits before the softmax; it is fitted to the labels of the validation split,
so that what is reported of the other split is honest. It changes no predicted class.
"""

import math

import numpy as np

from pipelines.evaluation.scores import Figures, Scored, softmax

BINS = 15
LIMITS = 0.05, 20.0  # of the temperature


def calibration(scored: Scored, validation: Scored | None) -> Figures:
    """ECE, NLL and Brier score as the model is; `temperature` and `scaled` where validation labels allow its fit.

    bins: of confidence, those with rows alone: their mean confidence, accuracy and count.
    """
    found: Figures = calibration_figures(scored, 1.0)
    temperature = None if validation is None else fit_temperature(validation)
    if temperature is not None:
        found |= {"temperature": temperature, "scaled": calibration_figures(scored, temperature)}
    return found


def calibration_figures(scored: Scored, temperature: float) -> Figures:
    """Of classes that the model knows; NaN where there is no row."""
    known = scored.take(scored.truth < len(scored.task.classes))
    if not len(known.truth):
        return {"ece": math.nan, "nll": math.nan, "brier": math.nan, "bins": []}
    probabilities = softmax(known.logits / temperature)
    picked = probabilities[np.arange(len(known.truth)), known.truth]
    confidence, right = probabilities.max(1), known.guess == known.truth
    bins = reliability(confidence, right)
    return {
        "ece": sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(right),
        "nll": float(-np.log(np.maximum(picked, 1e-12)).mean()),
        "brier": float((np.square(probabilities).sum(1) - 2 * picked + 1).mean()),
        "bins": bins,
    }


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[Figures]:
    """Bins of equal width with rows in them. confidence: (n,) in 0-1; right: (n,) bool."""
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for k in np.unique(number):
        here = number == k
        figures = {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())}
        bins.append({"low": k / BINS, "high": (k + 1) / BINS, **figures, "n": int(here.sum())})
    return bins


def fit_temperature(validation: Scored) -> float | None:
    """The temperature with the least negative log-likelihood on these rows; None without a row of a known class."""
    from scipy.optimize import minimize_scalar

    known = validation.take(validation.truth < len(validation.task.classes))
    if not len(known.truth):
        return None

    def loss(log_temperature: float) -> float:
        probabilities = softmax(known.logits / math.exp(log_temperature))
        return float(-np.log(np.maximum(probabilities[np.arange(len(known.truth)), known.truth], 1e-30)).mean())

    return math.exp(minimize_scalar(loss, bounds=(math.log(LIMITS[0]), math.log(LIMITS[1])), method="bounded").x)
