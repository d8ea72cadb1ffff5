"""Means, intervals and paired tests of runs over seeds, against SciPy and by hand."""

import numpy as np
import pytest
from scipy import stats

from tuning.report import compare, every_metric, interval_figure, markdown


def runs(**accuracies):
    """Results of task a; task b's skill is half of it."""
    return {
        name: {seed: {"a": {"accuracy": x, "n": 9}, "b": {"skill": x / 2, "n": 9}} for seed, x in enumerate(values)}
        for name, values in accuracies.items()
    }


FULL, WORSE, NOISE = [0.8, 0.82, 0.81, 0.83], [0.6, 0.63, 0.6, 0.64], [0.85, 0.78, 0.8, 0.82]


def test_mean_and_interval_per_task_and_over_the_tasks():
    line = compare(runs(full=FULL), "full")[0]
    assert line.mean("a") == pytest.approx(np.mean(FULL)) and line.mean("b") == pytest.approx(np.mean(FULL) / 2)
    assert line.mean("mean") == pytest.approx(0.75 * np.mean(FULL))
    low, high = stats.t.interval(0.95, 3, np.mean(FULL), stats.sem(FULL))
    assert line.half_width("a") == pytest.approx((high - low) / 2)


def test_the_same_difference_on_every_seed_is_no_proof():
    """Two seeds on a small split often differ by the same few clips: a t-test would give p = 0."""
    lines = compare(runs(full=[0.5, 0.25], other=[0.75, 0.5], equal=[0.5, 0.25]), "full")
    assert all(np.isnan(line.p["a"]) for line in lines)


def test_p_is_of_the_paired_test_and_corrected_for_all_comparisons():
    full, worse, noise = compare(runs(full=FULL, worse=WORSE, noise=NOISE), "full")
    raw = [stats.ttest_rel(values, FULL).pvalue for values in (WORSE, NOISE)]
    assert raw[0] < raw[1]
    assert worse.p["a"] == pytest.approx(2 * raw[0]) and noise.p["a"] == pytest.approx(raw[1])
    assert np.isnan(full.p["a"])


def test_seeds_are_paired_whatever_the_order_in_which_they_ended():
    results = runs(full=FULL, worse=WORSE)
    results["worse"] = dict(reversed(results["worse"].items()))
    assert compare(results, "full")[1].p == compare(runs(full=FULL, worse=WORSE), "full")[1].p


def test_where_nothing_differs_or_there_is_one_seed_nothing_is_tested():
    same = compare(runs(full=FULL, same=FULL), "full")[1]
    single = compare(runs(full=FULL[:1], worse=WORSE[:1]), "full")[1]
    assert all(np.isnan(p) for p in (*same.p.values(), *single.p.values()))
    assert np.isnan(single.half_width("a"))


def test_the_table_marks_what_differs_and_says_how_it_was_tested():
    lines = compare(runs(full=FULL, worse=WORSE, noise=NOISE), "full")
    rows = markdown(lines, (0, 1, 2, 3), "variant").splitlines()
    assert rows[0] == "| variant | a | b | mean |"
    assert rows[2].startswith("| full | 0.815 ± 0.021 |")
    assert "0.618 ± 0.033 *" in rows[3] and "*" not in rows[4]
    assert "seeds 0, 1, 2, 3" in rows[-1] and "corrected for 2 comparisons" in rows[-1]


def test_every_metric_stands_in_a_row_of_its_own_with_its_mean_over_tasks():
    results = runs(full=FULL, worse=WORSE)
    for seed, run in results["full"].items():
        run["c"] = {"accuracy": FULL[seed] - 0.2, "n": 9}
        results["worse"][seed]["c"] = {"accuracy": 0.5, "f1": 0.4, "n": 9}  # which the others lack
    rows = [row.split(" | ") for row in every_metric(results).strip("\n").splitlines()]
    assert rows[0] == ["| metric", "full", "worse |"]
    names = [row[0].removeprefix("| ") for row in rows[2:]]
    assert names == ["a accuracy", "b skill", "c accuracy", "mean accuracy"]
    assert rows[2][1] == "0.815 ± 0.021" and rows[5][1] == "0.715 ± 0.021"


def test_a_single_seed_has_no_interval():
    assert "±" not in markdown(compare(runs(full=FULL[:1]), "full"), (0,), "variant").splitlines()[2]


def test_the_picture_has_a_panel_per_task_and_every_seed():
    figure = interval_figure(compare(runs(full=FULL, worse=WORSE), "full"), "x")
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == ["a (test)", "b (test)", "mean (test)"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["full", "worse"]
    drawn = np.concatenate([line.get_xdata() for line in panels[0].lines])
    assert set(FULL + WORSE) <= set(drawn)
