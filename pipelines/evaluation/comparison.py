"""How sure the figures are: bootstrap intervals over clips, and paired tests between models on the same clips.

Clips are resampled, not bins, and groups of clips where the store has any (a speaker's): bins of one clip are alike,
and so are clips of one speaker. Two models are compared with McNemar's exact test on the clips that one of them gets
right and the other wrong; numbers, events and groups with Wilcoxon's signed-rank test on the mean error of each clip or
group. Several comparisons of one task are corrected by Holm's method.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from pipelines.evaluation.scores import Figures, Scored

RESAMPLES = 1000
BLOCK = 5_000_000  # weights that are held at once
CONFIDENCE = 0.95


def resampled(scored: Scored, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each clip is in each resample, its group sampled with replacement: blocks of (resamples, clips)."""
    clips, groups = len(scored.clip_ids), scored.groups
    drawn = clips if groups is None else int(groups.max()) + 1
    rng, block = np.random.default_rng(seed), max(1, BLOCK // max(clips, len(scored.truth), 1))
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        counts = rng.multinomial(drawn, np.full(drawn, 1 / drawn), size).astype(np.float32)
        yield counts if groups is None else counts[:, groups]


def weighted_figures(scored: Scored, blocks: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The main figures of every resample, (resamples,) each; blocks: weights of the clips as of `resampled`."""
    columns: dict[str, list[np.ndarray]] = {}
    for weights in blocks:
        by_row = weights[:, scored.rows]
        total = by_row.sum(1)
        total[total == 0] = math.nan
        if scored.task.has_classes:
            right = (scored.guess == scored.truth).astype(np.float32)
            block = {"accuracy": by_row @ right / total, "macro_f1": np.array([_macro_f1(scored, w) for w in by_row])}
        else:
            errors = np.abs(scored.guess - scored.truth)
            block = {"mae": by_row @ errors / total, "pearson": np.array([_pearson(scored, w) for w in by_row])}
        for name, values in block.items():
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def intervals(scored: Scored, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the main figures: percentiles over resamples; empty where no row is labelled."""
    if not len(scored.truth):
        return {}
    values = weighted_figures(scored, resampled(scored, seed))
    return {name: _interval(column) for name, column in values.items()}


def compare_models(by_model: Mapping[str, Scored], seed: int) -> list[Figures]:
    """Every pair of models on one task: the difference of the main figure, its interval, and the test's p.

    Raises nothing: a pair without a common labelled row is left out.
    """
    compared = (_compare(a, b, by_model[a], by_model[b], seed) for a, b in itertools.combinations(by_model, 2))
    pairs = [pair for pair in compared if pair]
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p
    return pairs


def holm(p_values: list[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979)."""
    order, corrected, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _compare(a: str, b: str, one: Scored, other: Scored, seed: int) -> Figures | None:
    from scipy.stats import binomtest

    if not len(one.truth) or not np.array_equal(one.rows, other.rows):
        return None
    name = "accuracy" if one.task.has_classes else "mae"
    clips = len(one.clip_ids)
    mine, theirs = (weighted_figures(scored, resampled(scored, seed))[name] for scored in (one, other))
    whole = [np.ones((1, clips), np.float32)]
    value = float((weighted_figures(one, whole)[name] - weighted_figures(other, whole)[name])[0])
    pair: Figures = {"task": one.task.name, "a": a, "b": b, "figure": name, "difference": value}
    pair["interval"] = _interval(mine - theirs)
    if one.groups is not None:
        return pair | {"test": "Wilcoxon signed-rank over groups", "p": _wilcoxon(_errors(one), _errors(other))}
    if one.task.kind == "classification":
        right, others = one.guess == one.truth, other.guess == other.truth  # each by its own order of classes
        only_a, only_b = int((right & ~others).sum()), int((~right & others).sum())
        p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
        return pair | {"test": "McNemar, exact", "only_a_right": only_a, "only_b_right": only_b, "p": p}
    return pair | {"test": "Wilcoxon signed-rank", "p": _wilcoxon(_errors(one), _errors(other))}


def _errors(scored: Scored) -> np.ndarray:
    """The mean error of each clip, or group of clips; of classes the share that is wrong."""
    wrong = scored.guess != scored.truth if scored.task.has_classes else np.abs(scored.guess - scored.truth)
    units = scored.rows if scored.groups is None else scored.groups[scored.rows]
    count = np.bincount(units)
    total = np.bincount(units, wrong.astype(float))
    return (total / np.maximum(count, 1))[count > 0]


def _wilcoxon(one: np.ndarray, other: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    return 1.0 if np.array_equal(one, other) else float(wilcoxon(one, other).pvalue)


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return (math.nan, math.nan)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _macro_f1(scored: Scored, weights: np.ndarray) -> float:
    size = len(scored.labels)
    counts = np.bincount(scored.truth * size + scored.guess, weights, size * size).reshape(size, size)
    support, guessed, right = counts.sum(1), counts.sum(0), counts.diagonal()
    seen = support + guessed > 0
    return float((2 * right[seen] / (support + guessed)[seen]).mean()) if seen.any() else math.nan


def _pearson(scored: Scored, weights: np.ndarray) -> float:
    total = weights.sum()
    if not total:
        return math.nan
    x, y = (v - weights @ v / total for v in (scored.guess.astype(float), scored.truth.astype(float)))
    spread = math.sqrt((weights @ (x * x)) * (weights @ (y * y)))
    return float(weights @ (x * y) / spread) if spread else math.nan
