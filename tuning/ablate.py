#!/usr/bin/env python
"""Ablate: how much each part of CLCR contributes on a feature store, over seeds, on the test split.

Every variant is the given recipe with one part switched off or replaced. The job ends with a Markdown table, a picture
of the intervals and one MLflow run with a child run per training. Run again, it trains only what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Annotated, Any

import tyro

from pipelines.common.cli import main, override, require_at_least, resolve_uri
from pipelines.common.errors import JobError
from pipelines.training.inputs import check
from pipelines.training.learner import Recipe
from pipelines.training.run_folder import as_begun, claim, open_run, prepare, sole_owner
from tuning.report import publish
from tuning.runs import SeedRuns, run_all

# What may differ from one start to the next: how much is trained, and what it runs on.
CHANGEABLE = ("seeds", "variants", "beside", "cpus_per_run", "gpus_per_run")
FULL = "full"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    # the paper's table, each with as much for the heads to read as the full model has
    "no-hierarchy": {"model.hierarchy": "repeated"},
    "full-mix": {"model.hierarchy": "mixed"},
    "no-intraced": {"model.exchange": "dense", "model.space": "tokens"},
    "no-intercad": {"model.aggregation": "mean"},
    "no-regularisers": {"loss.lambda_intra": 0.0, "loss.lambda_inter": 0.0},
    # one decision of the paper's at a time
    "no-exchange": {"model.exchange": "none"},
    "dense-budget": {"model.exchange": "dense"},
    "whole-tokens": {"model.space": "tokens"},
    "fixed-budget": {"budget.kind": "fixed"},
    "even-levels": {"model.aggregation": "even_levels"},
    "no-intra-loss": {"loss.lambda_intra": 0.0},
    "no-inter-loss": {"loss.lambda_inter": 0.0},
    "whitened-correlation": {"loss.correlation": "whitened"},
    "mean-pooling": {"model.pooling": "mean"},
    # and one of ours
    "full-width": {"model.space": "lifted"},
    "both-halves": {"model.private_share": 0.5},
    "quarter-private": {"model.private_share": 0.25},
    "no-null": {"model.null_key": False},
    "slow-scalars": {"budget.lr_scale": 1.0},
    "steep-budget": {"budget.scale": 4.0, "budget.threshold": -1.0},
    "blind-head": {"model.farthest": 0.0},
    "random-content": {"model.alike": False},
    "content-evidence": {"budget.evidence": "content"},
    "reweighted": {"model.absent": "reweighted"},
    "no-places": {"model.by_index": False},
    "synchronised": {"model.synchronise": True},
    "regularised-means": {"loss.regularised": "means"},
    "aligned": {"loss.align": 0.1},
    "dropped-answers": {"model.drop_answer": 0.3},
}


@dataclass(frozen=True)
class AblateConfig:
    """Options of the ablate job."""

    store: str
    """feature store, or a YAML file of several and their weights; path or URI"""
    out: str
    """folder of the comparison; path or URI"""
    seeds: int = 5
    """number of trainings of each variant, with the seeds --seed, --seed + 1, ..."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """variants to compare with the full model"""
    beside: Annotated[tuple[str, ...], tyro.conf.arg(name="alongside", aliases=("--beside",))] = ()
    """other models to train alongside with the same options: concat, mult, or the name of a modality"""
    cpus_per_run: int = 1
    """CPU cores of each training"""
    gpus_per_run: float = 1.0
    """GPUs of each training, on a cluster that has any; with a fraction, several share a GPU"""
    experiment: str = "clcr"
    """MLflow experiment"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        require_at_least(self, {"seeds": 1, "cpus_per_run": 1, "gpus_per_run": 0})
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise JobError(f"--variants {unknown[0]}: known are {', '.join(VARIANTS)}")
        if self.recipe.architecture != "clcr":
            name = self.recipe.architecture
            raise JobError(f"--architecture {name}: only clcr has parts to ablate; --alongside adds others")

    def recipes(self) -> dict[str, Recipe]:
        """The recipes to train, by name, the full model first. Raises ConfigError for one that cannot be built."""
        variants = {name: override(self.recipe, VARIANTS[name]) for name in dict.fromkeys((FULL, *self.variants))}
        return variants | {model: replaced(self.recipe, architecture=model) for model in self.beside}


def ablate(config: AblateConfig) -> None:
    """The job: check the options, claim the output folder, train what is missing, report."""
    config = replaced(config, store=resolve_uri("--store", config.store), out=resolve_uri("--out", config.out))
    config = as_begun(config)
    recipes = config.recipes()
    for recipe in recipes.values():
        check(config.store, recipe)
    with sole_owner(config.out):
        train_variants(config, recipes)


def train_variants(config: AblateConfig, recipes: Mapping[str, Recipe]) -> None:
    """The ablation in its folder, which no other job writes to meanwhile."""
    started = claim(config, may_differ=CHANGEABLE)
    uri = prepare(config.out)
    run = open_run(config, started, uri, "ablation", {"model": "clcr"})
    seeds = tuple(range(config.recipe.seed, config.recipe.seed + config.seeds))
    print(f"{len(recipes)} recipes x {len(seeds)} seeds; MLflow run {run.run_id} at {run.uri}", flush=True)
    with run.ending():
        runs = SeedRuns(
            config.store, config.out, recipes, seeds, config.experiment, run, config.cpus_per_run, config.gpus_per_run
        )
        publish(config.out, run, run_all(runs), "ablation")


if __name__ == "__main__":
    main(ablate, AblateConfig, "How much each part of CLCR contributes: variants over seeds, on the test split.")
