"""Many recipes, each trained with many seeds and scored on the test split: what a comparison is made of.

One Ray task per run, as many at a time as the cluster has room for. A run that ended lies in OUT/NAME-SEED as
`pipelines/train.py` leaves one, so a comparison that was interrupted goes on with what is missing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean

import ray
import torch

from features.files import open_fs, read_json, resolve, write_text
from pipelines.common.cli import JobError, Progress, flatten, to_yaml
from pipelines.common.cluster import room
from pipelines.tracking import run as tracking
from pipelines.training.learner import Learner, Recipe
from pipelines.training.run_folder import finish

Metrics = dict[str, dict[str, float]]
VALIDATION = "val_score"  # in a run's run.json: what its best epoch was worth


@dataclass(frozen=True)
class SeedRuns:
    """What is to be run and where. recipes: by name; seeds: of each; out: folder or URI; parent: the MLflow run."""

    store: str
    out: str
    recipes: Mapping[str, Recipe]
    seeds: tuple[int, ...]
    experiment: str
    parent: tracking.Run
    cpus_per_run: int
    gpus_per_run: float

    def folder(self, name: str, seed: int) -> str:
        """Where one run's result lies."""
        return resolve(f"{name}-seed{seed}", self.out)

    def results(self) -> dict[str, dict[int, Metrics]]:
        """Test metrics of every run that has ended, by name and seed."""
        found = {
            name: {seed: read_json(self.folder(name, seed), "metrics.json") for seed in self.seeds}
            for name in self.recipes
        }
        return {name: {s: m for s, m in runs.items() if m is not None} for name, runs in found.items()}

    def validation(self, name: str) -> float:
        """Mean over the seeds of the best validation score of a recipe's runs, all of which have ended."""
        return mean(read_json(self.folder(name, seed), "run.json")[VALIDATION] for seed in self.seeds)


def run_all(runs: SeedRuns) -> dict[str, dict[int, Metrics]]:
    """Run what has not ended yet; test metrics by name, seed and task.

    A run that raises costs that run: the others go on. Raises JobError at the end, naming the first that failed.
    """
    tracking.abandon_children(runs.parent)  # those that an earlier start left in the middle
    done = runs.results()
    missing = [(name, seed) for seed in runs.seeds for name in runs.recipes if seed not in done[name]]
    total = len(runs.recipes) * len(runs.seeds)
    gpus = runs.gpus_per_run if ray.cluster_resources().get("GPU", 0) else 0
    if room({"CPU": runs.cpus_per_run, "GPU": gpus}) < 1:
        raise JobError(f"--cpus-per-run {runs.cpus_per_run}, --gpus-per-run {gpus:g}: no node has room for such a run")
    progress = Progress("runs", total, done=total - len(missing), unit="runs", interval=0)
    task = train_and_test.options(num_cpus=runs.cpus_per_run, num_gpus=gpus)
    device = "cuda" if gpus else "cpu"  # where it may have no GPU it may still see one
    pending = {task.remote(runs, name, seed, device): (name, seed) for name, seed in missing}
    failed = []
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
            f"{len(failed)} of {total} runs failed, the first is {failed[0]}; run it again to try them again"
        )
    return runs.results()


@ray.remote(max_retries=2)
def train_and_test(runs: SeedRuns, name: str, seed: int, device: str) -> None:
    """One run, from the recipe to its test metrics; a lost worker or node starts it again."""
    torch.set_num_threads(runs.cpus_per_run)
    recipe, out = replace(runs.recipes[name], seed=seed), runs.folder(name, seed)
    tags = {"model": recipe.architecture, "variant": name, "seed": str(seed)}
    title = f"{name}-seed{seed}" + (f"-fold{recipe.loader.fold}" if recipe.loader.fold is not None else "")
    run = tracking.start_run(runs.parent.uri, runs.experiment, title, flatten(recipe), tags, runs.parent.run_id)
    with run.ending():
        learner = Learner(runs.store, recipe, device=device)
        for epoch in learner.fit():
            run.log_metrics(epoch.metrics, epoch.number)
        fs, path = open_fs(out)
        fs.create_dir(path, recursive=True)
        write_text(out, "config.yaml", to_yaml(recipe))
        about = {"run_id": run.run_id, "tracking_uri": run.uri, VALIDATION: learner.trainer.best_score}
        write_text(out, "run.json", json.dumps(about))
        finish(learner, out, run, *learner.test())
