#!/usr/bin/env python
"""Sweep: search token budgets, loss weights and the learning rate of a model (Ray Tune, Optuna, ASHA).

Each trial runs the function that `pipelines/train.py` runs, on the training and validation splits only. One MLflow run
holds the sweep, with a child run for every trial. It ends with `best.yaml`, which `pipelines/train.py --config` takes.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Annotated, Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import tyro
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.table import Table

from features.files import open_fs, read_text, write_text
from pipelines import tracking
from pipelines.cli import JobError, Progress, flatten, main, require_at_least, resolve_uri, to_yaml
from pipelines.train import Learner, Recipe, check, prepare
from tuning.space import apply, defaults, space

METRIC = "val/best_score"  # the best epoch's: a trial is worth what its best checkpoint is worth


@dataclass(frozen=True)
class SweepConfig:
    """Options of the sweep job."""

    store: str
    """feature store; path or URI"""
    out: str
    """folder of this sweep; path or URI"""
    trials: int = 20
    """configurations to try; the first is the recipe as given"""
    concurrency: int = 0
    """trials at a time; 0 = as many as the cluster's CPUs (GPUs, where there are any) allow"""
    cpus_per_trial: int = 1
    """CPUs of each trial"""
    grace_epochs: int = 5
    """epochs that every trial may run before ASHA can stop it"""
    reduction: int = 3
    """ASHA lets one of so many trials go on at each rung"""
    experiment: str = "clcr"
    """MLflow experiment"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        least = {"trials": 1, "concurrency": 0, "cpus_per_trial": 1, "grace_epochs": 1, "reduction": 2}
        require_at_least(self, least)


def sweep(config: SweepConfig) -> None:
    """The job: check, claim the output folder, search, write best.yaml and trials.parquet."""
    config = replaced(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    check(config.store, config.recipe)
    if read_text(config.out, "best.yaml") is not None:
        raise JobError(f"--out {config.out} holds a finished sweep (best.yaml): give another --out, or use that one")
    uri = prepare(config.out)
    fs, path = open_fs(config.out)
    fs.create_dir(path, recursive=True)
    name = f"sweep-{config.recipe.architecture}"
    run = tracking.start_run(uri, config.experiment, name, flatten(config), {"model": config.recipe.architecture})
    print(f"sweep of {config.trials} trials; MLflow run {run.run_id} at {uri}", flush=True)
    log = TrialLog(run, config)
    try:
        search(config, log)
        finish(config, run, log)
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def search(config: SweepConfig, log: "TrialLog") -> None:
    """Run the trials on the cluster; `log` sees every result."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    fitting = int(resources["CPU"]) // config.cpus_per_trial
    concurrency = config.concurrency or (min(gpus, fitting) if gpus else fitting)
    if concurrency < 1 or config.cpus_per_trial * concurrency > resources["CPU"]:
        raise JobError(
            f"{max(concurrency, 1)} trials with --cpus-per-trial {config.cpus_per_trial} do not fit into "
            f"the cluster's {resources['CPU']:g} CPUs"
        )
    need = {"CPU": config.cpus_per_trial} | ({"GPU": min(1.0, gpus / concurrency)} if gpus else {})
    epochs = config.recipe.optim.epochs
    sampler = optuna.samplers.TPESampler(
        seed=config.recipe.seed, multivariate=True, constant_liar=True, n_startup_trials=min(10, config.trials // 2)
    )
    searcher = OptunaSearch(
        space(config.recipe),
        metric=METRIC,
        mode="max",
        sampler=sampler,
        points_to_evaluate=[defaults(config.recipe)],
    )
    trainable = tune.with_parameters(run_trial, store=config.store, recipe=config.recipe, cpus=config.cpus_per_trial)
    tuner = tune.Tuner(
        tune.with_resources(trainable, need),
        tune_config=tune.TuneConfig(
            num_samples=config.trials,
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=concurrency),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                metric=METRIC,
                mode="max",
                max_t=epochs,
                grace_period=min(config.grace_epochs, epochs),
                reduction_factor=config.reduction,
            ),
        ),
        run_config=tune.RunConfig(name="trials", storage_path=config.out, callbacks=[log], verbose=0),
    )
    tuner.fit()


def run_trial(point: Mapping[str, Any], store: str, recipe: Recipe, cpus: int) -> None:
    """What each trial runs: the recipe at one point of its space, reporting every epoch. Never opens the test split."""
    torch.set_num_threads(cpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner = Learner(store, apply(recipe, point), device=device)
    for epoch in learner.fit():
        tune.report({**epoch.metrics, METRIC: learner.trainer.best_score, "epoch": epoch.number + 1})


class TrialLog(tune.Callback):
    """Writes every trial to MLflow as a child run, and keeps what the report needs. Runs in the driver only."""

    def __init__(self, run: tracking.Run, config: SweepConfig) -> None:
        self.run, self.config = run, config
        self.runs: dict[str, tracking.Run] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.progress = Progress("sweep", config.trials, unit="trials", interval=0)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A child run with the trial's whole recipe as parameters."""
        recipe = self.config.recipe
        name, number = f"trial-{len(self.runs):03d}", len(self.runs)
        tags = {"model": recipe.architecture, "trial": str(number)}
        params = flatten(apply(recipe, trial.config)) | dict(trial.config)
        self.runs[trial.trial_id] = tracking.start_run(
            self.run.uri, self.config.experiment, name, params, tags, self.run.run_id
        )
        self.rows[trial.trial_id] = {
            "trial": number,
            "run_id": self.runs[trial.trial_id].run_id,
            "status": "RUNNING",
            "epochs": 0,
            METRIC: None,
            **trial.config,
        }

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """One epoch's metrics, in one call."""
        metrics = {k: v for k, v in result.items() if k.startswith(("train/", "val/", "diag/", "perf/"))}
        self.runs[trial.trial_id].log_metrics(metrics, result["epoch"] - 1)
        self.rows[trial.trial_id] |= {"epochs": result["epoch"], METRIC: result[METRIC]}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Finished, or stopped early by ASHA."""
        row = self.rows[trial.trial_id]
        stopped = row["epochs"] < self.config.recipe.optim.epochs
        row["status"] = "STOPPED" if stopped else "FINISHED"
        self.runs[trial.trial_id].finish()
        scores = [r[METRIC] for r in self.rows.values() if r[METRIC] is not None]
        self.progress.update(1, f"trial {row['trial']} {row['status'].lower()}, best val score {max(scores):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial that raised costs that trial."""
        self.rows[trial.trial_id] |= {"status": "FAILED", "error": str(trial.get_error()).strip().splitlines()[-1]}
        self.runs[trial.trial_id].finish("FAILED")
        self.progress.update(1, f"trial {self.rows[trial.trial_id]['trial']} failed")


def finish(config: SweepConfig, run: tracking.Run, log: TrialLog) -> None:
    """The table, trials.parquet, and best.yaml last. Raises JobError when every trial failed."""
    rows = sorted(log.rows.values(), key=lambda row: row["trial"])
    scored = [row for row in rows if row[METRIC] is not None and row["status"] != "FAILED"]
    if not scored:
        raise JobError(f"all {len(rows)} trials failed, the first with: {rows[0].get('error') if rows else 'no trial'}")
    best = max(scored, key=lambda row: row[METRIC])
    point = {name: best[name] for name in space(config.recipe)}
    print_trials(config, rows, best)
    fs, path = open_fs(config.out)
    buffer = io.BytesIO()
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(k for row in rows for k in row)}
    pq.write_table(pa.table(columns), buffer)
    with fs.open_output_stream(f"{path}/trials.parquet") as f:
        f.write(buffer.getvalue())
    run.log_metrics({METRIC: best[METRIC], "sweep/epochs": sum(row["epochs"] for row in rows)})
    run.client.set_tag(run.run_id, "best", json.dumps({"run_id": best["run_id"], "point": point}))
    text = to_yaml(apply(config.recipe, point))
    run.client.log_text(run.run_id, text, "best.yaml")
    write_text(config.out, "best.yaml", text)
    stopped = [row for row in rows if row["status"] == "STOPPED"]
    saved = sum(config.recipe.optim.epochs - row["epochs"] for row in stopped)
    failed = sum(row["status"] == "FAILED" for row in rows)
    print(f"ASHA stopped {len(stopped)} of {len(rows)} trials and saved {saved} epochs; {failed} failed")
    print(
        f"best: trial {best['trial']}; python pipelines/train.py --config {config.out}/best.yaml --store ... --out ..."
    )


def print_trials(config: SweepConfig, rows: list[dict[str, Any]], best: Mapping[str, Any]) -> None:
    """Trials as a table, best first."""
    names = list(space(config.recipe))
    table = Table("trial", "val score", "epochs", *(n.replace("budget.", "b.").replace("loss.", "l.") for n in names))
    for row in sorted(rows, key=lambda r: -(r[METRIC] or 0))[:10]:
        values = [f"{row[name]:.3g}" for name in names]
        score = "failed" if row[METRIC] is None else f"{row[METRIC]:.3f}"
        table.add_row(str(row["trial"]), score, str(row["epochs"]), *values, style="bold" if row is best else "")
    Console(width=160).print(table)


if __name__ == "__main__":
    main(sweep, SweepConfig, "Search budgets and loss weights on the validation split; ends with best.yaml.")
