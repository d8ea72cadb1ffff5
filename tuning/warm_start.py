"""What another sweep has learned, lent to a new one: its finished trials teach the sampler from the beginning.

A lent trial is no trial of this sweep: it has no row, no run in MLflow, no place in the front or among the best.
"""

import tempfile
from pathlib import Path

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from clcr.versions import RENAMED
from features.files import read_text
from pipelines.common.cli import flatten, parse, resolve_uri
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.options import SweepConfig
from tuning.space import OPTION_TYPES, apply, values_of
from tuning.space_file import SHARED
from tuning.study import FROM, NAME, own_trials, reached

KNOWN = {"version", *OPTION_TYPES, *RENAMED}  # options of a recipe in a sweep's config.yaml


def lend(study: optuna.Study, folder: str, config: SweepConfig) -> str:
    """Add another sweep's finished trials to a study, those that fit its space and were not added before.

    Options that the other sweep did not search have the values of its recipe. Returns a line that says how many fit;
    raises JobError where there is no sweep, or nothing that fits.
    """
    where = resolve_uri("--warm-start", folder)
    finished, recipe = _read(where)
    known = {trial.user_attrs.get(FROM) for trial in study.get_trials(deepcopy=False)}
    fitting, reason = 0, "no trial has finished"
    for trial in finished:
        point, outside = config.searched.inside(values_of(apply(recipe, trial.params)))
        missing = next((o.metric for o in config.wanted if o.metric not in reached(trial)), "")
        if outside or missing:
            reason = f"{outside} lies outside of what is searched" if outside else f"they did not measure {missing}"
            continue
        fitting += 1
        name = f"{where}#{trial.number}"
        if name not in known:
            study.add_trial(
                create_trial(
                    params=point,
                    distributions={option: config.searched[option] for option in point},
                    values=[reached(trial)[objective.metric] for objective in config.wanted],
                    user_attrs={FROM: name},
                )
            )
    if not fitting:
        raise JobError(f"--warm-start {folder}: none of its {len(finished)} finished trials fits: {reason}")
    theirs, ours = flatten(recipe), flatten(config.recipe)
    unlike = [f"{name} {theirs[name]} not {ours[name]}" for name in SHARED if theirs[name] != ours[name]]
    note = f", with scores of another kind ({', '.join(unlike)})" if unlike else ""
    return f"warm start: {fitting} of the {len(finished)} finished trials of {folder} teach the sampler{note}"


def _read(folder: str) -> tuple[list[FrozenTrial], Recipe]:
    """A sweep's finished trials, from a copy because the sweep may be running, and the recipe that it started from."""
    written, options = read_text(folder, NAME), read_text(folder, "config.yaml")
    if written is None or options is None:
        raise JobError(f"--warm-start {folder}: holds no sweep ({NAME} is missing)")
    of_recipe = {name: value for name, value in yaml.safe_load(options).items() if name in KNOWN}
    with tempfile.TemporaryDirectory() as copy:
        journal, recipe = Path(copy, NAME), Path(copy, "recipe.yaml")
        journal.write_text(written[: written.rfind("\n") + 1])
        recipe.write_text(yaml.safe_dump(of_recipe))
        study = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(journal))))
        return own_trials(study, TrialState.COMPLETE), parse(Recipe, ["--config", str(recipe)])
