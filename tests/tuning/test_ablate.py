"""A real ablation: Ray tasks, MLflow, the table; resumed with more seeds and variants."""

import json

import pytest
from inprocess import run_here
from mlflow.tracking import MlflowClient

from clcr.config import CLCRConfig
from pipelines.common.cli import flatten
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.ablate import FULL, VARIANTS, AblateConfig, ablate

SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "8", "--epochs", "2", "--tasks", "label"]
SMALL += ["--cpus-per-run", "2"]  # all of Ray's: one process for all runs, since its imports take longer than they


def test_every_variant_is_a_valid_recipe_that_differs_from_the_full_model():
    recipes = AblateConfig(store="s", out="o").recipes()
    assert list(recipes) == list(VARIANTS) and recipes[FULL] == Recipe()
    assert len({json.dumps(flatten(recipe), default=str) for recipe in recipes.values()}) == len(VARIANTS)
    assert all(isinstance(recipe.network, CLCRConfig) for recipe in recipes.values())


def test_the_full_model_is_always_there_and_first():
    recipes = AblateConfig(store="s", out="o", variants=("no-exchange",), beside=("concat",)).recipes()
    assert list(recipes) == [FULL, "no-exchange", "concat"]
    assert recipes["concat"].architecture == "concat"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("no-brain",)}, "--variants no-brain: known are full, no-hierarchy"),
        ({"recipe": Recipe(architecture="concat")}, "--architecture concat: only clcr has parts"),
        ({"seeds": 0}, "--seeds 0"),
    ],
)
def test_what_cannot_be_ablated_is_named(options, message):
    with pytest.raises(JobError, match=message):
        AblateConfig(store="s", out="o", **options)


@pytest.mark.slow
def test_a_run_that_no_node_has_room_for_is_refused(store, tmp_path, shared_ray):
    done = run(store, tmp_path, "--seeds", "1", "--variants", "no-exchange", "--cpus-per-run", "999")
    assert done.returncode == 1 and "error: --cpus-per-run 999" in done.stderr and "Traceback" not in done.stderr


def run(store, folder, *options):
    return run_here(ablate, AblateConfig, "--store", store.uri, "--out", folder / "ablation", *SMALL, *options)


@pytest.fixture(scope="module")
def ablated(store, tmp_path_factory, shared_ray):
    """First a small one; then more seeds and more variants are asked for, into the same folder."""
    folder = tmp_path_factory.mktemp("ablate")
    first = run(store, folder, "--seeds", "1", "--variants", "no-exchange")
    assert first.returncode == 0, first.stderr
    kept = folder / "ablation" / "full-seed0" / "metrics.json"
    before = kept.stat().st_mtime_ns
    done = run(store, folder, "--seeds", "2", "--variants", "no-exchange,mean-pooling", "--beside", "concat")
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == before, "a run that had ended was trained again"
    return folder, done.stdout


@pytest.mark.slow
def test_the_table_has_every_recipe_over_every_seed(ablated):
    folder, said = ablated
    table = (folder / "ablation" / "ablation.md").read_text()
    assert table in said and (folder / "ablation" / "ablation.png").stat().st_size > 10_000
    rows = [row.split("|")[1].strip() for row in table.splitlines()[2:6]]
    assert rows == ["full", "no-exchange", "mean-pooling", "concat"] and "seeds 0, 1" in table
    runs = [json.loads((folder / "ablation" / f"full-seed{s}" / "metrics.json").read_text()) for s in (0, 1)]
    mean = sum(run["label"]["accuracy"] for run in runs) / 2
    assert f"| full | {mean:.3f}" in table


@pytest.mark.slow
def test_mlflow_holds_one_parent_with_a_child_per_training(ablated):
    folder, _ = ablated
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r is not parent]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert len(children) == 8 and all(r.info.status == "FINISHED" for r in runs)
    assert {r.data.params["model.exchange"] for r in children if r.data.tags["variant"] == "no-exchange"} == {"none"}
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {
        "ablation.md",
        "ablation.png",
        "ablation-metrics.md",
        "config.yaml",
    }
    assert f"test/full/{'label'}" in parent.data.metrics


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(ablated, store):
    done = run(store, ablated[0], "--seeds", "2", "--epochs", "3")
    assert done.returncode == 1 and "holds another run (epochs" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
