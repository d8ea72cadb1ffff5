#!/usr/bin/env python
"""Compare: CLCR and the models that people would use instead, tuned alike, over seeds, on the test split.

Every model gets a sweep with the same number of trials on the validation split. Then its best recipe is trained with
fresh seeds; with --finalists its best few are, and the best mean validation score over those seeds chooses one of them.
The job ends with a Markdown table (mean, 95 % interval, paired test against the first model, size, speed), a picture of
the intervals and one MLflow experiment. Run again, it resumes and trains only what is missing.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from itertools import product
from statistics import mean
from typing import Annotated, NamedTuple

import pyarrow.parquet as pq
import tyro

from clcr.errors import ConfigError
from clcr.versions import renamed
from features.corpus.manifest import SPLITS
from features.files import open_fs, read_json, read_text, resolve
from features.store import Store, open_store
from pipelines.common.cli import main, require_at_least, resolve_uri
from pipelines.common.errors import JobError
from pipelines.tracking.run import Run, children_metrics
from pipelines.training.inputs import check
from pipelines.training.learner import Recipe, build_model, model_names
from pipelines.training.loading import task_specs
from pipelines.training.run_folder import as_begun, claim, open_run, prepare, sole_owner
from tuning.options import SweepConfig
from tuning.report import publish
from tuning.runs import Metrics, SeedRuns, run_all
from tuning.space import apply, known, space
from tuning.study import ranked
from tuning.sweep import sweep

ALL = "all"
# What may differ from one start to the next: how much is asked for, and what it runs on.
CHANGEABLE = ("seeds", "models", "finalists", "cpus_per_run", "gpus_per_run")


@dataclass(frozen=True)
class CompareConfig:
    """Options of the compare job."""

    store: str
    """feature store, or a YAML file of several and their weights; path or URI"""
    out: str
    """folder of the comparison; path or URI"""
    models: tuple[str, ...] = (ALL,)
    """models to compare; the others are tested against the first one; all = every model that can learn these tasks,
    and each modality alone"""
    trials: int = 12
    """number of trials in each model's sweep; 0 = no tuning: train the recipe as given, or the recipes of --tuned-in"""
    tuned_in: str = ""
    """with --trials 0: folder of another comparison, whose sweeps' best points are trained here (for example on noisier
    clips, or with more epochs); path or URI"""
    seeds: int = 5
    """number of trainings of each best recipe, with the seeds that follow --seed (which the sweep used)"""
    finalists: int = 1
    """how many of each sweep's best trials are trained with all seeds; the one with the best mean validation score
    enters the table. Trials that ASHA stopped rank after those that finished. Give more than one where the seed
    changes a score as much as the options do"""
    search: tuple[str, ...] = ()
    """options or groups of options that the sweeps search (lr, model.dropout, budget), for each model those that it
    has; none named = all"""
    folds: bool = False
    """cross-validate: for every fold of the corpus, tune on the other folds and test on it; the table is over folds"""
    grace_epochs: int = 5
    """epochs that every trial runs before ASHA may stop it"""
    cpus_per_run: int = 1
    """CPU cores of each trial and each training"""
    gpus_per_run: float = 1.0
    """GPUs of each trial and each training, on a cluster that has any; with a fraction, several share a GPU"""
    experiment: str = "clcr"
    """MLflow experiment"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        least = {"trials": 0, "seeds": 1, "finalists": 1, "grace_epochs": 1, "cpus_per_run": 1, "gpus_per_run": 0}
        require_at_least(self, least)
        if self.folds and self.recipe.loader.fold is not None:
            raise ValueError("--folds runs every fold, --loader.fold only one: give one of them")
        if self.tuned_in and self.trials:
            raise JobError(f"--trials {self.trials}: --tuned-in takes recipes that are tuned already; give --trials 0")
        if self.search and not self.trials:
            raise JobError(f"--search {','.join(self.search)}: nothing is searched with --trials 0")
        if self.finalists > 1 and not (self.trials or self.tuned_in):
            raise JobError(f"--finalists {self.finalists}: there is one recipe for each model with --trials 0")

    def names(self, store: Store) -> tuple[str, ...]:
        """The models to train. Raises JobError for one that is not known."""
        available = model_names(store)
        named: list[str] = []
        for model in self.models:
            named += available if model == ALL else [model]
        if unknown := [name for name in named if name not in available]:
            raise JobError(f"--models {unknown[0]}: known for this store are all, {', '.join(available)}")
        if not named:
            raise JobError(f"--models: none named; known for this store are all, {', '.join(available)}")
        return tuple(dict.fromkeys(named))


class Entry(NamedTuple):
    """A model's entry in the table: its chosen recipe, the name of its runs, and their test metrics by seed."""

    variant: str
    recipe: Recipe
    results: dict[int, Metrics]


def compare(config: CompareConfig) -> None:
    """The job: check, claim the output folder, tune every model, train the best of each over seeds, report."""
    config = replaced(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    if config.tuned_in:
        config = replaced(config, tuned_in=resolve_uri("--tuned-in", config.tuned_in))
    config = as_begun(config)
    store = open_store(config.store)
    names = able(config, config.names(store))
    require_searched(config, names)
    folds: Sequence[int | None] = store.folds() if config.folds else [config.recipe.loader.fold]
    require_labels(store, config.recipe.tasks, folds)
    require_tuned(config, names, folds)
    with sole_owner(config.out):
        tune_and_train(config, store, names, folds)


def tune_and_train(config: CompareConfig, store: Store, names: tuple[str, ...], folds: Sequence[int | None]) -> None:
    """The comparison in its folder, which no other job writes to meanwhile."""
    started = claim(config, may_differ=CHANGEABLE)
    uri = prepare(config.out)
    os.environ["MLFLOW_TRACKING_URI"] = uri  # the sweeps' runs go to the same server
    run = open_run(config, started, uri, "comparison", {"model": ",".join(names)})
    print(
        f"{len(names)} models, {config.trials} trials and {config.seeds} seeds each; MLflow run {run.run_id} at {uri}"
    )
    with run.ending():
        if config.folds:
            compare_over_folds(config, store, names, run)
        else:
            entries = train_finalists(config, names, run)
            results = {name: entry.results for name, entry in entries.items()}
            publish(config.out, run, results, "comparison", costs(store, run, [entries]))


def compare_over_folds(config: CompareConfig, store: Store, names: tuple[str, ...], run: Run) -> None:
    """Tune and train anew for every fold, and publish each model's mean over the seeds of every fold."""
    entries = {fold: train_finalists(of_fold(config, fold), names, run) for fold in store.folds()}
    results = {name: {fold: averaged(of[name].results) for fold, of in entries.items()} for name in names}
    publish(config.out, run, results, "comparison", costs(store, run, [*entries.values()]), "folds")


def able(config: CompareConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that can learn the tasks. Raises ConfigError for one that cannot and was asked for by name."""
    can_learn = []
    for name in names:
        try:
            check(config.store, replaced(config.recipe, architecture=name))
        except ConfigError as error:
            if name in config.models:
                raise
            print(f"{name} is left out: {error}", flush=True)
        else:
            can_learn.append(name)
    return tuple(can_learn)


def require_searched(config: CompareConfig, names: Collection[str]) -> None:
    """Raise JobError if --search names what no model has, or leaves a model untuned: all must be tuned alike."""
    if not config.search:
        return
    recipes = {name: replaced(config.recipe, architecture=name) for name in names}
    searched: set[str] = set()
    for name, recipe in recipes.items():
        own = known(recipe, config.search)
        if not own:
            has = ", ".join(space(recipe))
            raise JobError(f"--search {','.join(config.search)}: {name} has none of it; it has {has}")
        searched.update(own)
    if unknown := [option for option in config.search if option not in searched]:
        has = ", ".join(dict.fromkeys(option for recipe in recipes.values() for option in space(recipe)))
        raise JobError(f"--search {unknown[0]}: none of the models has it; they have {has}")


def require_tuned(config: CompareConfig, names: Collection[str], folds: Collection[int | None]) -> None:
    """Raise JobError if the folder of --tuned-in lacks a model's best recipe."""
    if not config.tuned_in:
        return
    for fold, name in product(folds, names):
        folder = sweep_folder(of_fold(config, fold) if config.folds else config, name)
        if read_text(folder, "best.yaml") is None:
            raise JobError(f"--tuned-in {config.tuned_in}: {folder} holds no sweep that ended")


def require_labels(store: Store, tasks: Sequence[str], folds: Collection[int | None]) -> None:
    """Raise JobError for a task that has no label at all in some split: no run could be scored by it."""
    columns = {f"label_{task}": task for task in task_specs(store, tasks)}
    for fold, split in product(folds, SPLITS):
        labels = store.index(split, list(columns), fold)
        for column, task in columns.items():
            if labels[column].null_count == len(labels):
                where = f"split {split}" if fold is None else f"the {split} split of fold {fold}"
                raise JobError(f"--tasks {task}: no clip in {where} has a label of it; leave that task out")


def of_fold(config: CompareConfig, fold: int | None) -> CompareConfig:
    """The comparison of one fold, with its own output folder."""
    recipe = replaced(config.recipe, loader=replaced(config.recipe.loader, fold=fold))
    tuned_in = config.tuned_in and resolve(f"fold{fold}", config.tuned_in)
    return replaced(config, out=resolve(f"fold{fold}", config.out), tuned_in=tuned_in, recipe=recipe, folds=False)


def averaged(runs: Mapping[int, Metrics]) -> Metrics:
    """The mean of each task's metrics over the seeds."""
    first = next(iter(runs.values()))
    return {task: {name: mean(run[task][name] for run in runs.values()) for name in first[task]} for task in first}


def train_finalists(config: CompareConfig, names: tuple[str, ...], run: Run) -> dict[str, Entry]:
    """Tune every model and train its finalists over seeds; returns each model's best finalist by validation score."""
    if (fold := config.recipe.loader.fold) is not None:
        print(f"fold {fold}", flush=True)
    recipes = {name: finalists(config, name) for name in names}
    seeds = tuple(range(config.recipe.seed + 1, config.recipe.seed + 1 + config.seeds))
    runs = SeedRuns(
        config.store,
        config.out,
        {variant: recipe for own in recipes.values() for variant, recipe in own.items()},
        seeds,
        config.experiment,
        run,
        config.cpus_per_run,
        config.gpus_per_run,
    )
    results = run_all(runs)
    best = {name: winner(runs, own) for name, own in recipes.items()}
    return {name: Entry(variant, runs.recipes[variant], results[variant]) for name, variant in best.items()}


def winner(runs: SeedRuns, variants: Collection[str]) -> str:
    """The one of a model's finalists that has the best mean validation score over the seeds."""
    if len(variants) == 1:
        return next(iter(variants))
    scores = {variant: runs.validation(variant) for variant in variants}
    best = max(scores, key=scores.__getitem__)
    each = ", ".join(f"{variant} {score:.3f}" for variant, score in scores.items())
    print(f"mean validation scores: {each}; {best} counts", flush=True)
    return best


def sweep_folder(config: CompareConfig, name: str) -> str:
    """The folder of a model's sweep, in this comparison or in the one that --tuned-in names."""
    return resolve(f"sweep-{name}", config.tuned_in or config.out)


def finalists(config: CompareConfig, name: str) -> dict[str, Recipe]:
    """A model's recipes to train over the seeds, by the names of their runs (`clcr`, `clcr.2`, ...), best trial first.

    Runs the model's sweep unless it has ended before. Options that the sweep searched come from its trials, all others
    (tasks, fold, epochs) from this comparison.
    """
    recipe, folder = replaced(config.recipe, architecture=name), sweep_folder(config, name)
    if not config.trials and not config.tuned_in:
        return {name: recipe}
    if read_text(folder, "best.yaml") is None:
        print(f"tuning {name}", flush=True)
        search(config, recipe, folder)
    elif not config.tuned_in and (ended := read_json(folder, "run.json")):
        Run(ended["tracking_uri"], ended["run_id"]).mark_finished()
    recipes: list[Recipe] = []
    fs, path = open_fs(folder)
    for trial in map(renamed, ranked(pq.read_table(f"{path}/trials.parquet", filesystem=fs).to_pylist())):
        candidate = apply(recipe, {option: trial[option] for option in space(recipe) if option in trial})
        if candidate not in recipes:  # a search over few values can try the same ones twice
            recipes.append(candidate)
    if len(recipes) < config.finalists:
        print(f"{name} has {len(recipes)} finalists: its sweep found no other recipes", flush=True)
    variants = [name, *(f"{name}.{place}" for place in range(2, config.finalists + 1))]
    return dict(zip(variants, recipes, strict=False))


def search(config: CompareConfig, recipe: Recipe, folder: str) -> None:
    """Run the sweep of one model, with its own output folder."""
    sweep(
        SweepConfig(
            config.store,
            folder,
            trials=config.trials,
            search=known(recipe, config.search),
            final_seeds=0,
            cpus_per_trial=config.cpus_per_run,
            gpus_per_trial=config.gpus_per_run,
            grace_epochs=config.grace_epochs,
            experiment=config.experiment,
            recipe=recipe,
        )
    )


def costs(store: Store, run: Run, rounds: Sequence[Mapping[str, Entry]]) -> dict[str, dict[str, str]]:
    """Size and speed of every model: parameters, and training clips per second as its runs logged them."""
    columns: dict[str, dict[str, str]] = {}
    for name in rounds[0]:
        sizes = sorted({parameters(store, entries[name].recipe) for entries in rounds})
        paces = [
            metrics["perf/samples_per_s"]
            for variant in {entries[name].variant for entries in rounds}
            for metrics in children_metrics(run, "variant", variant)
            if "perf/samples_per_s" in metrics
        ]
        columns[name] = {
            "parameters": " to ".join(dict.fromkeys(f"{size / 1e6:.2f} M" for size in (sizes[0], sizes[-1]))),
            "clips/s": f"{sum(paces) / max(1, len(paces)):.0f}",
        }
    return columns


def parameters(store: Store, recipe: Recipe) -> int:
    """The number of a recipe's model parameters."""
    return sum(parameter.numel() for parameter in build_model(store, recipe).parameters())


if __name__ == "__main__":
    main(
        compare,
        CompareConfig,
        "Tune every model alike, train each over seeds, and compare them on the test split in one table.",
    )
