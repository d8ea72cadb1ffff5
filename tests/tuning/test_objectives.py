"""Objectives of any metric: how they are named, what a trial reports of them, and how a study remembers them."""

from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from clcr.training import OptimConfig
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.objectives import COST, SCORE, kept, read_objectives, shown
from tuning.options import SweepConfig
from tuning.pictures import front_figure, write_pictures
from tuning.space import Space, space
from tuning.study import FROM, REACHED, StudyFile, StudySearch, objectives_of, outcome, ranked, rows, tell
from tuning.study import finished as complete
from tuning.warm_start import lend

THREE = ("score", "diag/participation/audio:min", "val/label/accuracy:max")


def test_the_names_of_before_mean_what_they_meant():
    assert read_objectives(("score", "participation")) == [(SCORE, "maximize"), (COST, "minimize")]
    assert read_objectives(("val/score:max",)) == read_objectives(("score",))


@pytest.mark.parametrize("text", ["val/score", "val/score:up", "train/loss:min", "best/score:max", ""])
def test_what_is_no_objective_is_named(text):
    with pytest.raises(JobError, match=f"--objectives {text}: choose score"):
        read_objectives((text,))


def test_a_trial_reports_the_metrics_of_the_epoch_that_it_keeps_and_names_those_it_has():
    metrics = {"val/score": 0.4, "diag/participation/audio": 0.3, "val/label/accuracy": 0.7, "train/loss": 1.0}
    assert kept(read_objectives(THREE), metrics) == {
        "best/diag/participation/audio": 0.3,
        "best/val/label/accuracy": 0.7,
    }
    with pytest.raises(JobError, match=r"diag/audio: this model reports diag/participation/audio$"):
        kept(read_objectives(("diag/audio:min",)), metrics)


def finished(folder, objectives, values):
    """A study of trials that ended with these values of all objectives."""
    study = StudyFile(str(folder)).open(read_objectives(objectives))
    names = [objective.metric for objective in objectives_of(study)]
    searched = Space(space(Recipe(), ("lr", "model.dropout")))
    for each in values:
        trial = study.ask(searched)
        trial.set_user_attr(REACHED, {"epoch": 2, SCORE: 0.0, **dict(zip(names, each, strict=True))})
        tell(study, trial, outcome(study, trial, 2))
    return study


def test_another_start_knows_the_objectives_and_ranks_by_the_first(tmp_path):
    finished(tmp_path, ("diag/a:min", "score"), [(0.3, 0.5), (0.1, 0.2), (0.2, 0.9)])
    study = StudyFile(str(tmp_path)).open(read_objectives(("diag/a:min", "score")))
    assert objectives_of(study) == read_objectives(("diag/a:min", "score"))
    assert [row["trial"] for row in ranked(rows(study), objectives_of(study)[0])] == [1, 2, 0]
    assert {trial.number for trial in study.best_trials} == {1, 2}


def test_a_study_of_before_optimises_the_score_and_the_participation():
    assert objectives_of(optuna.create_study(direction="maximize")) == read_objectives(("score",))
    both = optuna.create_study(directions=["maximize", "minimize"])
    assert objectives_of(both) == read_objectives(("score", "participation"))


def test_three_objectives_are_drawn_and_options_of_a_condition_disturb_no_picture(tmp_path):
    values = [(number / 10, (number * 7 % 5) / 5, number * 3 % 4) for number in range(8)]
    study = finished(tmp_path, THREE, values)
    trial = study.ask(Space(space(Recipe(), ("lr", "model.dropout", "weight_decay"))))
    trial.set_user_attr(REACHED, {"epoch": 2, SCORE: 0.7, **{o.metric: 0.5 for o in objectives_of(study)}})
    tell(study, trial, outcome(study, trial, 2))
    (tmp_path / "pictures").mkdir()
    names = write_pictures(study, tmp_path / "pictures")
    assert {"pareto.png", "importance.png", "scatter.png"} <= set(names) and "curves.png" not in names
    figure = front_figure(complete(study), objectives_of(study))
    assert [panel.get_xlabel().split(" (")[0] for panel in figure.axes] == [
        "score",
        "score",
        "diag/participation/audio",
    ]
    assert all(len(panel.collections[1].get_offsets()) == len(study.best_trials) for panel in figure.axes)


def other_sweep(folder, objectives=("score",)):
    folder.mkdir()
    finished(folder, objectives, [(number / 10, 0.5)[: len(objectives)] for number in range(6)])
    (folder / "config.yaml").write_text("version: 3\nstore: s\nout: o\ntrials: 6\nweight_decay: 0.02\n")
    return str(folder)


def warm(tmp_path, **options):
    (tmp_path / "new").mkdir(exist_ok=True)
    config = SweepConfig(store="s", out=str(tmp_path / "new"), **options)
    return config, StudyFile(config.out).open(config.wanted)


def test_another_sweeps_trials_teach_the_sampler_and_are_no_trials_of_this_one(tmp_path):
    folder = other_sweep(tmp_path / "other")
    config, study = warm(tmp_path, search=("lr", "model.dropout", "weight_decay"), trials=2)
    assert lend(study, folder, config).endswith("6 of the 6 finished trials of " + folder + " teach the sampler")
    longer, fresh = replace(config, recipe=Recipe(optim=OptimConfig(epochs=99))), optuna.create_study()
    assert lend(fresh, folder, longer).endswith("with scores of another kind (epochs 30 not 99)")
    lend(study, folder, config)  # as a start after a kill does
    assert len(study.trials) == 6 and rows(study) == []
    assert {trial.params["weight_decay"] for trial in study.trials} == {0.02}, "what its recipe gave"
    assert all(trial.state == TrialState.COMPLETE and FROM in trial.user_attrs for trial in study.trials)
    search = StudySearch(study, config.searched, config.limit, 0)
    assert [search.suggest("a").keys(), search.suggest("b").keys()] == [config.searched.keys()] * 2
    assert search.suggest("c") == "FINISHED"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ("perf/epoch_s:min",)}, "none of its 6 finished trials fits: they did not measure best/perf"),
        ({"space": "far.yaml"}, "none of its 6 finished trials fits: lr lies outside"),
    ],
)
def test_a_sweep_that_teaches_nothing_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far.yaml").write_text("lr: {low: 1, high: 2}\n")
    config, study = warm(tmp_path, **options)
    with pytest.raises(JobError, match=message):
        lend(study, other_sweep(tmp_path / "other"), config)
    with pytest.raises(JobError, match=r"--warm-start .*: holds no sweep"):
        lend(study, str(tmp_path / "new"), config)


def test_numbers_words_and_switches_are_shown_in_a_table():
    assert [shown(value) for value in (0.123456, 12, "clcr", True, None)] == ["0.1235", "12", "clcr", "True", "None"]
