"""Who stops trials: after a kill each decides as if there had been none, and it judges one objective only."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipelines.common.errors import JobError
from tuning.objectives import BY_SCORE, Objective, read_objectives
from tuning.schedulers import Earlier, chosen, scheduler

EPOCHS = 9


def made(name, trials=(), objective=BY_SCORE):
    return scheduler(name, [objective], EPOCHS, 1, 3, trials, number_of=int)


class Running:
    """A trial of this start, as schedulers see it; Tune's id is its number here."""

    def __init__(self, number):
        self.trial_id = str(number)


def curve(number):
    return np.maximum.accumulate(np.random.default_rng(number).random(EPOCHS)).tolist()


def decisions(judge, number, values):
    """What a scheduler says of a trial's epochs, until it stops it."""
    trial, said = Running(number), []
    judge.on_trial_add(SimpleNamespace(get_live_trials=list), trial)
    for epoch, value in enumerate(values, start=1):
        said.append(judge.on_trial_result(None, trial, {"epoch": epoch, BY_SCORE.metric: value}))
        if said[-1] == TrialScheduler.STOP:
            break
    judge.on_trial_complete(None, trial, {"epoch": len(said), BY_SCORE.metric: values[len(said) - 1]})
    return said


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_restart_changes_no_decision(name):
    lived, before = made(name), []
    for number in range(20):
        stopped = len(decisions(lived, number, curve(number)))
        seen = dict(enumerate(curve(number)[:stopped], start=1))
        before.append(SimpleNamespace(number=number, intermediate_values=seen))
    restarted = made(name, before)
    after = [decisions(restarted, number, curve(number)) for number in range(20, 40)]
    assert after == [decisions(lived, number, curve(number)) for number in range(20, 40)]
    assert any(TrialScheduler.STOP in said[:-1] or len(said) < EPOCHS for said in after)
    assert all(said != TrialScheduler.PAUSE for each in after for said in each), "a trial that waits would begin anew"


def test_hyperband_gives_brackets_of_fewer_rungs_to_fewer_trials():
    judge = made("hyperband")
    for number in range(90):
        judge.on_trial_add(None, Earlier(number))
    rungs = [len(bracket._rungs) for bracket in judge._trial_info.values()]
    counts = [rungs.count(size) for size in (3, 2, 1)]
    assert sum(counts) == 90 and counts == sorted(counts, reverse=True) and min(counts) > 0


def test_where_less_is_better_the_larger_is_stopped():
    less = Objective("best/perf/epoch_s", "minimize")
    judge = made("asha", objective=less)
    said = []
    for number, value in enumerate([1.0, 1.0, 1.0, 5.0]):
        trial = Running(number)
        judge.on_trial_add(None, trial)
        said.append(judge.on_trial_result(None, trial, {"epoch": 1, less.metric: value}))
    assert said[-1] == TrialScheduler.STOP and TrialScheduler.STOP not in said[:-1]


def test_a_failed_trial_whose_last_result_has_no_epoch_harms_no_median():
    judge = made("median")
    for number in range(4):
        decisions(judge, number, curve(number))
    failed = Running(9)
    judge.on_trial_add(None, failed)
    judge.on_trial_result(None, failed, {"error": "x", BY_SCORE.metric: math.nan})
    judge.on_trial_complete(None, failed, {"error": "x", BY_SCORE.metric: math.nan})
    assert decisions(judge, 10, [0.0] * EPOCHS)[-1] == TrialScheduler.STOP


def test_auto_is_none_where_several_objectives_or_the_sampler_have_no_use_of_stopped_trials():
    two = read_objectives(("score", "perf/epoch_s:min"))
    assert chosen("auto", "tpe", [BY_SCORE]) == "asha" and chosen("auto", "gp", [BY_SCORE]) == "none"
    assert chosen("auto", "tpe", two) == "none" and isinstance(made("none"), FIFOScheduler)
    with pytest.raises(JobError, match="--scheduler median: stops trials by one objective, --objectives names 2"):
        chosen("median", "tpe", two)
