"""Several recipes, each trained with several seeds and scored on the test split: the runs of a comparison.

Each run is a Ray task, and as many run at a time as the cluster has room for. A run that ended is in OUT/NAME-seedN, in
the form that `pipelines/train.py` writes, so a comparison that was interrupted resumes with the missing runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean

import ray
import torch

from features.files import open_fs, read_json, resolve, write_text
from features.store import open_store
from pipelines.common.cli import Progress, flatten, to_yaml
from pipelines.common.cluster import count_slots
from pipelines.common.errors import JobError
from pipelines.tracking import run as tracking
from pipelines.training.learner import Learner, Recipe
from pipelines.training.loading import task_specs
from pipelines.training.run_folder import description, finish, name_of, title, track_finished

Metrics = dict[str, dict[str, float]]
VALIDATION = "val_score"  # in a run's run.json: the validation score of its best epoch


@dataclass(frozen=True)
class SeedRuns:
    """What to run and where. recipes: by name. seeds: of each recipe. out: folder or URI. parent: the MLflow run."""

    store: str
    out: str
    recipes: Mapping[str, Recipe]
    seeds: tuple[int, ...]
    experiment: str
    parent: tracking.Run
    cpus_per_run: int
    gpus_per_run: float

    def folder(self, name: str, seed: int) -> str:
        """The folder of one run's result."""
        return resolve(f"{name}-seed{seed}", self.out)

    def results(self) -> dict[str, dict[int, Metrics]]:
        """Test metrics of every run that has ended, by name and seed."""
        results: dict[str, dict[int, Metrics]] = {name: {} for name in self.recipes}
        for name, by_seed in results.items():
            for seed in self.seeds:
                metrics = read_json(self.folder(name, seed), "metrics.json")
                if metrics is not None:
                    by_seed[seed] = metrics
        return results

    def validation(self, name: str) -> float:
        """Mean over the seeds of the best validation scores of a recipe's runs, all of which must have ended."""
        return mean(read_json(self.folder(name, seed), "run.json")[VALIDATION] for seed in self.seeds)


def run_all(runs: SeedRuns) -> dict[str, dict[int, Metrics]]:
    """Run what has not ended yet; returns test metrics by name, seed and task.

    A run that raises does not stop the others. Raises JobError at the end, naming the first that failed.
    """
    tracking.abandon_children(runs.parent)  # those that an earlier start left unfinished
    done = runs.results()
    failed = []
    for name, seed in [(name, seed) for name, by_seed in done.items() for seed in by_seed]:
        try:
            track_ended(runs, name, seed, done[name][seed])
        except JobError as error:
            failed.append(f"{name} seed {seed}: {error}")
    missing = [(name, seed) for seed in runs.seeds for name in runs.recipes if seed not in done[name]]
    total = len(runs.recipes) * len(runs.seeds)
    gpus = runs.gpus_per_run if ray.cluster_resources().get("GPU", 0) else 0
    if count_slots({"CPU": runs.cpus_per_run, "GPU": gpus}) < 1:
        raise JobError(f"--cpus-per-run {runs.cpus_per_run}, --gpus-per-run {gpus:g}: no node has room for such a run")
    progress = Progress("runs", total, done=total - len(missing), unit="runs", interval=0)
    task = train_and_test.options(num_cpus=runs.cpus_per_run, num_gpus=gpus)
    device = "cuda" if gpus else "cpu"  # said explicitly: a task without a GPU of its own may still see one
    pending = {task.remote(runs, name, seed, device): (name, seed) for name, seed in missing}
    while pending:
        ready, _ = ray.wait(list(pending))
        name, seed = pending.pop(ready[0])
        try:
            ray.get(ready[0])
            progress.update(1, f"{name} seed {seed} finished")
        except ray.exceptions.RayError as error:
            failed.append(f"{name} seed {seed}: {str(error).strip().splitlines()[-1]}")
            progress.update(1, f"{name} seed {seed} failed")
    if failed:
        raise JobError(
            f"{len(failed)} of {total} runs failed, the first is {failed[0]}; fix the cause, then rerun to resume"
        )
    return runs.results()


def track_ended(runs: SeedRuns, name: str, seed: int, metrics: Metrics) -> None:
    """Give MLflow what it lacks of a run that has ended."""
    folder = runs.folder(name, seed)
    if (started := read_json(folder, "run.json")) is not None:  # version 1 wrote none
        track_finished(folder, started, metrics, runs.recipes[name].optim)


@ray.remote(max_retries=2)
def train_and_test(runs: SeedRuns, name: str, seed: int, device: str) -> None:
    """One run, from the recipe to its test metrics. If its worker or node is lost, Ray starts it again."""
    torch.set_num_threads(runs.cpus_per_run)
    recipe, out = replace(runs.recipes[name], seed=seed), runs.folder(name, seed)
    if (metrics := read_json(out, "metrics.json")) is not None:  # its worker was lost while it waited for MLflow
        return track_ended(runs, name, seed, metrics)
    tasks = task_specs(open_store(runs.store), recipe.tasks)
    tags = {"model": recipe.architecture, "variant": name, "seed": str(seed), "tasks": ", ".join(tasks)}
    tags |= {"store": name_of(runs.store), tracking.NOTE: description(runs.store, recipe, tasks)}
    called = title(runs.store, recipe, name)
    run = tracking.start_run(runs.parent.uri, runs.experiment, called, flatten(recipe), tags, runs.parent.run_id)
    with run.ending():
        learner = Learner(runs.store, recipe, device=device)
        for epoch in learner.fit():
            run.log_metrics({"best/score": learner.trainer.best_score} | epoch.metrics, epoch.number)
        fs, path = open_fs(out)
        fs.create_dir(path, recursive=True)
        write_text(out, "config.yaml", to_yaml(recipe))
        about = {"run_id": run.run_id, "tracking_uri": run.uri, VALIDATION: learner.trainer.best_score}
        write_text(out, "run.json", json.dumps(about))
        finish(learner, out, run, *learner.test())
