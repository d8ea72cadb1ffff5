"""How a sweep ends: a table, best.yaml, pictures, and the best recipe trained over seeds for the test split."""

import io
import json
import shlex
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from features.files import open_fs, resolve, write_atomic, write_text
from infra.head import job
from pipelines.common.cli import to_yaml
from pipelines.common.errors import JobError
from pipelines.tracking import run as tracking
from pipelines.tracking import views
from pipelines.training.learner import Recipe
from tuning.objectives import COST, SCORE, Objective, shown
from tuning.options import SweepConfig
from tuning.pictures import LEAST, write_pictures
from tuning.record import NOTE
from tuning.report import publish
from tuning.runs import SeedRuns, run_all
from tuning.schedulers import chosen
from tuning.space import apply, defaults
from tuning.study import front, ranked, rows

STOPPERS = {"asha": "ASHA", "hyperband": "HyperBand", "median": "the median rule"}
GIVEN = "given"  # the name of the recipe that the sweep started from
Row = Mapping[str, Any]  # a trial, as `study.rows` gives it


def finish(config: SweepConfig, run: tracking.Run, study: optuna.Study) -> tuple[str, Recipe]:
    """Write table, trials.parquet, pictures, and best.yaml last; returns the best trial's name and recipe.

    With several objectives best.yaml has the best of the first, and front/ every recipe of the Pareto front. Raises
    JobError if every trial failed.
    """
    trials = rows(study)
    scored = ranked(trials, config.wanted[0])
    if not scored:
        first = next((f"trial {row['trial']}: {row['error']}" for row in trials), "no trial had the time to end")
        raise JobError(f"all {len(trials)} trials failed, the first is {first}; a further try needs another --out")
    searched = list(config.searched)
    recipes = {row["trial"]: apply(config.recipe, study.trials[row["trial"]].params) for row in scored}
    unbeaten = front(study) if len(config.wanted) > 1 else set()
    # Of several trials with the best value of the first objective, one that no other beats in everything.
    best = next((row for row in scored if row["trial"] in unbeaten), scored[0])
    print_trials(config.wanted, trials, searched, best, unbeaten)
    _write_parquet(config.out, trials)
    if unbeaten:
        _write_front(config.out, {_name(number): recipes[number] for number in unbeaten})
    _write_pictures(config.out, run, study)
    # Named apart from the trials' metrics, so that a comparison does not show the parent as one more trial.
    totals = {goal.metric.replace("best/", "sweep/best_"): best[goal.metric] for goal in config.wanted}
    totals |= {"sweep/trials": len(trials), "sweep/epochs": sum(row["epochs"] for row in trials)}
    run.log_metrics(totals, step=len(trials))  # a later start with more trials continues the curve
    run.set_tag("best", json.dumps({"run_id": best["run_id"], "trial": best["trial"]}))
    run.set_tag(NOTE, describe(config, run, trials, best, searched))
    text = to_yaml(recipes[best["trial"]])
    run.log_text(text, "best.yaml")
    run.flush()  # a comparison takes the sweep for ended once best.yaml is there
    write_text(config.out, "best.yaml", text)
    print(summary(config, trials))
    file = resolve("best.yaml", config.out)
    options = f"--config {shlex.quote(file)} --store {shlex.quote(config.store)} --out ..."
    given = (
        "" if _differs(config.recipe, recipes[best["trial"]]) else " (the recipe as given: nothing tried was better)"
    )
    print(f"best: trial {best['trial']}{given}; {' '.join(job('pipelines/train.py'))} {options}")
    return _name(best["trial"]), recipes[best["trial"]]


def _write_front(out: str, recipes: Mapping[str, Recipe]) -> None:
    """The recipes of the Pareto front, one file each; replaces the front of an earlier start."""
    folder = resolve("front", out)
    open_fs(out)[0].delete_dir_contents(_create(folder))
    for name, recipe in recipes.items():
        write_text(folder, f"{name}.yaml", to_yaml(recipe))


def _write_pictures(out: str, run: tracking.Run, study: optuna.Study) -> None:
    """Pictures of the search, in the output folder and in MLflow; none where there is nothing to show."""
    with tempfile.TemporaryDirectory() as folder:
        if write_pictures(study, folder):
            run.log_folder(folder, "pictures")
            target = _create(resolve("pictures", out))
            pafs.copy_files(folder, target, destination_filesystem=open_fs(out)[0])
        else:
            print(f"no pictures: they take {LEAST} finished trials or more that differ in two options and in score")


def train_final(config: SweepConfig, run: tracking.Run, name: str, best: Recipe) -> None:
    """Train the best and the given recipe with the same seeds, and score them on the test split for the first time.

    Runs of an earlier start are kept: each is named after its trial, and more trials may find a better one.
    """
    recipes = {GIVEN: config.recipe}
    if _differs(config.recipe, best):
        recipes[name] = best
    first = config.recipe.seed + 1  # the best was chosen for what it did with the seed before
    seeds = tuple(range(first, first + config.final_seeds))
    also = "" if name in recipes else " (nothing tried was better than the recipe as given)"
    print(f"test split: {' and '.join(recipes)} with seeds {', '.join(map(str, seeds))}{also}", flush=True)
    folder = resolve("final", config.out)
    _create(folder)
    runs = SeedRuns(
        config.store, folder, recipes, seeds, config.experiment, run, config.cpus_per_trial, config.gpus_per_trial
    )
    publish(config.out, run, run_all(runs), "final")


def _differs(given: Recipe, best: Recipe) -> bool:
    """Whether two recipes differ, both with a budget for each level, as `apply` writes it."""
    return apply(given, defaults(given)) != apply(best, defaults(best))


def compare_hint(run: tracking.Run, study: optuna.Study) -> str:
    """Where MLflow compares the trials: an address on a server, a command and an address for an embedded file."""
    return f"compare the trials: {views.page(run.uri, comparison(run, rows(study)))}"


def comparison(run: tracking.Run, trials: Sequence[Row]) -> str:
    """The path of MLflow's comparison of the trials that did not fail."""
    ids = [row["run_id"] for row in trials if row["status"] != "FAILED" and row["run_id"]]
    return views.comparison_path(ids, run.experiment_id())


def save_view(run: tracking.Run, searched: Collection[str], objectives: Sequence[Objective]) -> str:
    """Keep a view of the trials in MLflow, best first, with what was searched as columns; its path."""
    columns = [f"params.`{name}`" for name in searched]
    metrics = [*dict.fromkeys([SCORE, COST, *(objective.metric for objective in objectives)])]
    state = views.view(columns, metrics, f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    experiment, key = run.experiment_id(), run.run_id[:12]
    run.ask(lambda client: client.set_experiment_tag(experiment, views.SHARED + key, state))
    return views.runs_path(experiment, key)


def print_trials(
    objectives: Sequence[Objective], trials: Sequence[Row], searched: Sequence[str], best: Row, front: Collection[int]
) -> None:
    """Print the ten best trials, best first; with several objectives the whole front comes first, marked by stars."""
    names, (first, *_) = {SCORE: "val score", COST: "exchanged"}, objectives
    heads = [names.get(objective.metric, objective.metric.removeprefix("best/")) for objective in objectives]
    short = [name.replace("budget.", "b.").replace("loss.", "l.").replace("model.", "") for name in searched]
    table = Table("trial", *heads, "epochs", *short)
    order = sorted(
        trials,
        key=lambda r: (r["status"] == "FAILED", r["trial"] not in front, -first.sign * (r[first.metric] or 0)),
    )
    for row in order[: max(10, len(front))]:
        metrics = [f"{row[o.metric]:.3f}" if row[o.metric] is not None else "failed" for o in objectives]
        star = " *" if row["trial"] in front else ""
        values = [shown(row[name]) if name in row else "" for name in searched]
        epochs = f"{row['epochs']}{' stopped' if row['status'] == 'STOPPED' else ''}"
        table.add_row(f"{row['trial']}{star}", *metrics, epochs, *values, style="bold" if row is best else "")
    Console(width=max(160, 12 * len(table.columns))).print(table)
    if short != list(searched):
        print("sweep's options in short: b. is budget., l. is loss., and model. is left out")


def summary(config: SweepConfig, trials: Sequence[Row]) -> str:
    """One line: how much the scheduler saved, and how many trials failed."""
    scheduler = chosen(config.scheduler, config.sampler, config.wanted)
    stopped = [row for row in trials if row["status"] == "STOPPED"]
    saved = sum(config.recipe.optim.epochs - row["epochs"] for row in stopped)
    failed = sum(row["status"] == "FAILED" for row in trials)
    if scheduler == "none":
        return f"{len(trials)} trials, none was to be stopped early; {failed} failed"
    who = STOPPERS[scheduler]
    return f"{who} stopped {len(stopped)} of {len(trials)} trials and saved {saved} epochs; {failed} failed"


def describe(
    config: SweepConfig, run: tracking.Run, trials: Sequence[Row], best: Row, searched: Collection[str]
) -> str:
    """The parent run's description, as MLflow shows it."""
    table = save_view(run, searched, config.wanted)[1:]
    what = " and ".join(f"`{objective.metric}` ({objective.direction[:3]}.)" for objective in config.wanted)
    return (
        f"Sweep of `{config.recipe.architecture}` on `{config.store}`, over {what}, on the validation split.\n\n"
        f"{summary(config, trials)}. Best: trial {best['trial']}, score {best[SCORE]:.3f} (`best.yaml`).\n\n"
        f"[Compare the trials]({comparison(run, trials)[1:]}) (parallel coordinates: take the searched options as "
        f"parameters and `{SCORE}` as the metric), or [see the table, best first]({table}). "
        "Pictures of the search are among the artifacts."
    )


def _write_parquet(out: str, trials: Sequence[Row]) -> None:
    names = dict.fromkeys(name for row in trials for name in row)
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in trials] for name in names}), buffer)
    fs, path = open_fs(out)
    write_atomic(fs, f"{path}/trials.parquet", buffer.getvalue())


def _name(trial: int) -> str:
    return f"trial-{trial:03d}"


def _create(folder: str) -> str:
    fs, path = open_fs(folder)
    fs.create_dir(path, recursive=True)
    return path
