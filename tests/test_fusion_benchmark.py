"""The table of `tests.benchmarks.fusion`: recipes are compared by the runs of the same fold and seed."""

import csv

import numpy as np
import pytest

from tests.benchmarks.answers import packed, unpacked
from tests.benchmarks.curve import curves_of
from tests.benchmarks.fusion import bootstrap, main, rows_of, summary
from tests.benchmarks.recipes import divisions, relayered


def run(recipe, fold, seed, answers, corpus="one", folds="outer"):
    bits = packed(np.array(answers, bool)[:, None])
    return {
        "corpus": corpus,
        "folds": folds,
        "recipe": recipe,
        "fold": fold,
        "seed": str(seed),
        "test": np.mean(answers),
        "last": "",
        "right": bits,
    }


@pytest.fixture
def runs():
    """`a` with two seeds in two folds, `b` with the first seed alone: there they differ by .25."""
    good, bad = [1, 1, 1, 1], [0, 0, 0, 0]
    rows = [run("a", fold, 1, [1, 1, 1, 0]) for fold in "xy"] + [run("a", fold, 2, bad) for fold in "xy"]
    return rows + [run("b", fold, 1, good) for fold in "xy"]


def written(runs, path):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(runs[0]))
        table.writeheader()
        table.writerows(runs)
    return path


def test_a_recipe_of_fewer_seeds_is_compared_by_those_that_both_have(runs, tmp_path, capsys):
    summary(written(runs, tmp_path / "runs.csv"), "a")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1.000 (folds sd 0.000, 2 runs)  +0.250 sd 0.000") and first.endswith("  b")
    assert second.startswith("0.375 (folds sd 0.000, 4 runs)  +0.000") and second.endswith("  a")


def test_corpora_and_kinds_of_folds_of_one_file_are_summed_up_apart(runs, tmp_path, capsys):
    other = [run("a", fold, 1, [0, 0, 0, 1], "two") for fold in "xy"]
    inner = [run("a", fold, 1, [1, 1, 0, 0], folds="inner") | {"test": "", "last": "0.5"} for fold in "st"]
    summary(written(runs + other + inner, tmp_path / "runs.csv"), "a")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["one, outer:", "two, outer:", "one, inner:"]
    assert [line[:5] for line in lines if line.endswith("  a")] == ["0.375", "0.250", "0.500"]


def test_a_recipe_is_named_by_how_it_begins(runs, tmp_path, capsys):
    tried = [{**row, "recipe": f"{row['recipe']} lr=1"} for row in runs] + [run("a lr=9", "x", 1, [0, 0, 0, 0])]
    summary(written(tried, tmp_path / "runs.csv"), "a")
    of_base = [line for line in capsys.readouterr().out.splitlines() if "+0.000 sd 0.000" in line]
    assert len(of_base) == 1 and of_base[0].endswith("  a lr=1")


def test_the_interval_is_of_the_same_runs(runs):
    low, high = bootstrap(runs, "b", "a")
    assert 0 <= low <= 0.25 <= high < 0.8, "with seed 2, whose answers are all wrong, it would reach 1"
    assert np.isnan(bootstrap(runs, "b", "c")).all()
    without = [row | {"right": ""} if row["recipe"] == "a" else row for row in runs]
    assert np.isnan(bootstrap(without, "b", "a")).all(), "a run whose answers were not kept has no interval"


def test_answers_of_several_tasks_are_read_as_a_share_of_each_clip():
    right = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
    assert packed(right).startswith("3x3:") and packed(right[:, :1]).startswith("3:")
    assert unpacked(packed(right)).tolist() == [1, 1 / 3, 0]
    assert unpacked(packed(right[:, :1])).tolist() == [1, 0, 0] and unpacked("").size == 0


def test_layers_of_a_token_are_one_level_each_or_the_last_or_one_vector():
    text, face = np.arange(24).reshape(2, 3, 4), np.zeros((5, 6))
    sample = {"clip_id": "a", "features": {"text": text, "face": face}}
    last = relayered(sample, {"text", "voice"}, "last")["features"]
    flat = relayered(sample, {"text", "voice"}, "flat")["features"]
    assert last["text"].tolist() == text[:, 2].tolist() and flat["text"].tolist() == text.reshape(2, 12).tolist()
    assert last["face"] is flat["face"] is face and sample["features"]["text"] is text


def test_a_curve_is_of_the_runs_that_every_value_has():
    def row(recipe, fold, test, corpus="one"):
        run = {"corpus": corpus, "folds": "outer", "recipe": recipe, "fold": fold, "seed": "1"}
        return run | {"test": test, "participation": "0.3"}

    runs = [row("a", "x", ".7"), row("a g=.5", "x", ".5"), row("a g=.5", "y", ".1"), row("a g=.5", "x", ".2", "two")]
    alone = [row("b", "x", ".7"), row("b g=.5", "y", ".5"), row("c", "x", ".9")]
    assert curves_of(runs + alone, "g", 1) == {"a": {0.5: [(0.5, 0.3)], 1: [(0.7, 0.3)]}}


def test_a_corpus_without_folds_is_divided_by_its_groups():
    rows = [{"fold": None, "group": f"g{n // 4}", "split": "train"} for n in range(40)]
    parts = dict(divisions(rows, "outer"))
    assert len(parts) == 5
    for of_clip in parts.values():
        assert {*of_clip} == {"train", "val", "test"}
        assert all(len({*of_clip[first : first + 4]}) == 1 for first in range(0, 40, 4))
    alone = [{**row, "group": None} for row in rows]
    assert sorted(part.count("test") for part in dict(divisions(alone, "outer")).values()) == [8] * 5
    given = dict(divisions([{**row, "fold": n % 3} for n, row in enumerate(rows)], "outer"))
    assert list(given) == ["0", "1", "2"] and given["0"][0] == "test" and given["2"][0] == "val"


def test_choose_tries_every_value_on_the_first_fold_and_goes_on_with_the_best(store, tmp_path, monkeypatch, capsys):
    common = "epochs=2 model.width=8 tasks=label loader.cache_gb=0"
    path = tmp_path / "runs.csv"
    arguments = ["fusion", "--store", store.uri, "--out", str(path), "--folds", "parts", "--common", common]
    monkeypatch.setattr("sys.argv", [*arguments, "--choose", "lr=1e-9,1e-2", "--only", "0,1", "--seeds", "3", "audio"])
    assert main() == 0
    rows = {(row["recipe"], row["fold"]): float(row["val"]) for row in rows_of(path)}
    first = {recipe: val for (recipe, fold), val in rows.items() if fold == "0"}
    assert first.keys() == {"audio lr=1e-9", "audio lr=1e-2"}
    best = max(first, key=first.__getitem__)
    assert rows.keys() - {(recipe, "0") for recipe in first} == {(best, "1")}
    capsys.readouterr()
    assert main() == 0 and capsys.readouterr().out == "", "what the file holds is not trained again"
