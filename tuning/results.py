"""What a sweep ends with: a table, best.yaml, pictures, and the best recipe over seeds on the test split."""

import io
import json
import tempfile
from typing import Any
from urllib.parse import quote

import optuna
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from features.files import open_fs, resolve, write_atomic, write_text
from pipelines.common.cli import JobError, to_yaml
from pipelines.tracking import run as tracking
from pipelines.training.learner import Recipe
from tuning.options import SweepConfig
from tuning.pictures import write_pictures
from tuning.record import NOTE
from tuning.report import publish
from tuning.runs import SeedRuns, run_all
from tuning.space import apply, defaults
from tuning.study import COST, OBJECTIVES, SCORE, objectives_of, ranked, rows

GIVEN = "given"  # the recipe that the sweep started from


def finish(config: SweepConfig, run: tracking.Run, study: optuna.Study) -> tuple[str, Recipe]:
    """Table, trials.parquet, pictures, and best.yaml last; returns the best trial's name and recipe.

    With two objectives best.yaml has the best score, and front/ every recipe of the Pareto front. Raises JobError when
    every trial failed.
    """
    trials = rows(study)
    scored = ranked(trials)
    if not scored:
        first = next((f"trial {row['trial']}: {row['error']}" for row in trials), "no trial had the time to end")
        raise JobError(f"all {len(trials)} trials failed, the first is {first}; a further try needs another --out")
    front = {trial.number for trial in study.best_trials} if len(study.directions) > 1 else set()
    best = scored[0]
    searched = list(study.trials[best["trial"]].params)
    print_trials(trials, searched, best, front)
    _write_parquet(config.out, trials)
    recipes = {row["trial"]: apply(config.recipe, {n: row[n] for n in searched}) for row in scored}
    if front:
        open_fs(config.out)[0].delete_dir_contents(_create(resolve("front", config.out)))  # of an earlier start
    for number in front:
        write_text(resolve("front", config.out), f"{_name(number)}.yaml", to_yaml(recipes[number]))
    with tempfile.TemporaryDirectory() as folder:
        if write_pictures(study, folder):
            run.log_folder(folder, "pictures")
            pafs.copy_files(
                folder, _create(resolve("pictures", config.out)), destination_filesystem=open_fs(config.out)[0]
            )
    # Named apart from the trials' metrics: in a comparison the parent is not one more of them.
    found = {metric.replace("best/", "sweep/best_"): best[metric] for metric in objectives_of(study)}
    found |= {"sweep/trials": len(trials), "sweep/epochs": sum(row["epochs"] for row in trials)}
    run.log_metrics(found, step=len(trials))  # a later start with more of them goes on from here
    run.set_tag("best", json.dumps({"run_id": best["run_id"], "trial": best["trial"]}))
    run.set_tag(NOTE, describe(config, run, trials, best))
    text = to_yaml(recipes[best["trial"]])
    run.log_text(text, "best.yaml")
    write_text(config.out, "best.yaml", text)
    print(summary(config, trials))
    file = resolve("best.yaml", config.out)
    print(f"best: trial {best['trial']}; python pipelines/train.py --config {file} --store ... --out ...")
    return _name(best["trial"]), recipes[best["trial"]]


def train_final(config: SweepConfig, run: tracking.Run, name: str, best: Recipe) -> None:
    """Train the best and the given recipe with the same seeds, and only now score on the test split.

    What lies there from an earlier start is kept: runs are named after the trial, which more trials may replace.
    """
    spelled = [apply(recipe, defaults(recipe)) for recipe in (config.recipe, best)]  # a budget for each level
    recipes = {GIVEN: config.recipe} | ({name: best} if spelled[0] != spelled[1] else {})
    seeds = tuple(range(config.recipe.seed, config.recipe.seed + config.final_seeds))
    also = "" if name in recipes else " (nothing tried was better than the recipe as given)"
    print(f"test split: {' and '.join(recipes)} with seeds {', '.join(map(str, seeds))}{also}", flush=True)
    folder = resolve("final", config.out)
    _create(folder)
    runs = SeedRuns(
        config.store, folder, recipes, seeds, config.experiment, run, config.cpus_per_trial, config.gpus_per_trial
    )
    publish(config.out, run, run_all(runs), "final")


def compare_hint(run: tracking.Run, study: optuna.Study) -> str:
    """Where MLflow compares the trials: an address on a server, a command and an address for an embedded file."""
    ids = [row["run_id"] for row in rows(study) if row["status"] != "FAILED" and row["run_id"]]
    page = f"/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([run.experiment_id()]))}"
    if run.uri.startswith("http"):
        return f"compare the trials: {run.uri.rstrip('/')}{page}"
    serve = f"mlflow ui --backend-store-uri {run.uri}"
    return f"compare the trials: {serve}   and then open   http://127.0.0.1:5000{page}"


def print_trials(trials: list[dict[str, Any]], searched: list[str], best: dict[str, Any], front: set[int]) -> None:
    """The ten best trials, best first; with two objectives the whole front, marked by a star, before the others."""
    heads = ["exchanged"] if COST in best else []
    short = [name.replace("budget.", "b.").replace("loss.", "l.").replace("model.", "") for name in searched]
    table = Table("trial", "val score", *heads, "epochs", *short)
    order = sorted(trials, key=lambda r: (r["status"] == "FAILED", r["trial"] not in front, -(r[SCORE] or 0)))
    for row in order[: max(10, len(front))]:
        metrics = [f"{row[m]:.3f}" if row[m] is not None else "failed" for m in (SCORE, COST) if m in row]
        star = " *" if row["trial"] in front else ""
        values = [f"{row[name]:.3g}" if name in row else "" for name in searched]
        epochs = f"{row['epochs']}{' stopped' if row['status'] == 'STOPPED' else ''}"
        table.add_row(f"{row['trial']}{star}", *metrics, epochs, *values, style="bold" if row is best else "")
    Console(width=max(160, 12 * len(table.columns))).print(table)


def summary(config: SweepConfig, trials: list[dict[str, Any]]) -> str:
    """What ASHA saved, and what failed."""
    stopped = [row for row in trials if row["status"] == "STOPPED"]
    saved = sum(config.recipe.optim.epochs - row["epochs"] for row in stopped)
    failed = sum(row["status"] == "FAILED" for row in trials)
    return f"ASHA stopped {len(stopped)} of {len(trials)} trials and saved {saved} epochs; {failed} failed"


def describe(config: SweepConfig, run: tracking.Run, trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """The parent run's description, as MLflow shows it."""
    what = " and ".join(f"`{OBJECTIVES[name][0]}` ({OBJECTIVES[name][1][:3]}.)" for name in config.objectives)
    return (
        f"Sweep of `{config.recipe.architecture}` on `{config.store}`, over {what}, on the validation split.\n\n"
        f"{summary(config, trials)}. Best: trial {best['trial']}, score {best[SCORE]:.3f} (`best.yaml`).\n\n"
        f"To compare: filter the runs by `tags.mlflow.parentRunId = '{run.run_id}' and tags.trial != ''`, select all, "
        f"press *Compare*; take the searched options as parameters and `{SCORE}` as the metric. "
        "Pictures of the search are among the artifacts."
    )


def _write_parquet(out: str, trials: list[dict[str, Any]]) -> None:
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
