"""A real comparison: a sweep per model, the best of each over seeds, one table; resumed when asked for more."""

import json
from dataclasses import replace
from statistics import mean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from inprocess import run_here
from mlflow.tracking import MlflowClient
from storefiles import make_clips, write_store

from clcr.registry import MODELS
from clcr.training import OptimConfig
from features.store import Store
from pipelines.common.cli import to_yaml
from pipelines.common.errors import JobError
from pipelines.explain import fold_of
from pipelines.training.learner import Recipe
from pipelines.training.loading import LoaderConfig
from tuning.compare import CompareConfig, able, compare, finalists, require_labels, require_searched, require_tuned
from tuning.space import known

SMALL = ["--model.width", "16", "--model.heads", "2", "--batch-size", "8", "--epochs", "2", "--tasks", "label"]
SMALL += ["--cpus-per-run", "2"]  # all of Ray's: one process for all runs, since its imports take longer than they


def run(store, folder, *options):
    return run_here(compare, CompareConfig, "--store", store.uri, "--out", folder / "comparison", *SMALL, *options)


def test_all_means_every_model_and_each_modality_alone(store):
    opened = Store(store.uri)
    assert CompareConfig("s", "o").names(opened) == (*MODELS, *opened.spec.features)
    assert CompareConfig("s", "o", models=("audio", "all")).names(opened)[0] == "audio"
    with pytest.raises(JobError, match="--models brain: known for this store are all, clcr"):
        CompareConfig("s", "o", models=("brain",)).names(opened)
    with pytest.raises(JobError, match="--models: none named; known for this store are all, clcr"):
        CompareConfig("s", "o", models=()).names(opened)


def test_all_leaves_out_what_cannot_learn_the_tasks_and_a_name_that_cannot_is_refused(store, tmp_path, capsys):
    config = CompareConfig(store.uri, "o", recipe=Recipe(tasks=("mood",)))  # a number, no classes
    names = config.names(store)
    assert able(config, names) == tuple(name for name in names if name != "ogm_ge")
    assert "ogm_ge is left out: ogm_ge measures modalities by the probability" in capsys.readouterr().out
    done = run(store, tmp_path, "--models", "clcr,ogm_ge", "--tasks", "mood")
    assert done.returncode == 1 and done.stderr.startswith("error: ogm_ge measures modalities by the probability")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "comparison").exists()


def test_each_model_searches_what_it_has_of_the_options_named(store):
    config = CompareConfig(store.uri, "o", search=("lr", "budget", "mult.depth"))
    require_searched(config, ("clcr", "concat", "mult"))
    has = {name: known(Recipe(architecture=name), config.search) for name in ("clcr", "concat", "mult")}
    assert has == {"clcr": ("lr", "budget"), "concat": ("lr",), "mult": ("lr", "mult.depth")}
    with pytest.raises(JobError, match="--search budget: concat has none of it; it has lr, weight_decay"):
        require_searched(replace(config, search=("budget",)), ("clcr", "concat"))
    with pytest.raises(JobError, match=r"--search model.droput: none of the models has it; they have .*model.dropout"):
        require_searched(replace(config, search=("lr", "model.droput")), ("clcr", "concat"))
    with pytest.raises(JobError, match="--search lr: nothing is searched with --trials 0"):
        CompareConfig("s", "o", search=("lr",), trials=0)
    with pytest.raises(JobError, match="--finalists 2: there is one recipe for each model with --trials 0"):
        CompareConfig("s", "o", finalists=2, trials=0)


def write_sweep(folder, best, trials):
    """What a sweep of the learning rate leaves: best.yaml, and (status, score, lr) of its trials."""
    folder.mkdir()
    (folder / "best.yaml").write_text(to_yaml(best))
    table = [{"trial": n, "status": s, "best/score": score, "lr": lr} for n, (s, score, lr) in enumerate(trials)]
    pq.write_table(pa.Table.from_pylist(table), folder / "trials.parquet")


def test_every_model_has_as_many_finalists_unless_its_sweep_found_no_other_recipes(store, tmp_path, capsys):
    trials = [("STOPPED", 0.6, 3e-3), ("FINISHED", 0.5, 1e-3), ("FAILED", None, 4e-3), ("FINISHED", 0.7, 2e-3)]
    trials += [("FINISHED", 0.6, 2e-3), ("STOPPED", 0.65, 5e-3)]  # one is the best one's again
    write_sweep(tmp_path / "sweep-concat", Recipe(architecture="concat"), trials)
    config = CompareConfig(store.uri, "o", trials=0, tuned_in=str(tmp_path), finalists=3)
    found = finalists(config, "concat")
    assert {name: recipe.optim.lr for name, recipe in found.items()} == {
        "concat": 2e-3,
        "concat.2": 1e-3,
        "concat.3": 5e-3,
    }
    assert capsys.readouterr().out == ""
    assert len(finalists(replace(config, finalists=5), "concat")) == 4
    assert "concat has 4 finalists: its sweep found no other recipes" in capsys.readouterr().out


def test_of_another_comparisons_recipe_only_what_was_searched_is_taken(store, tmp_path):
    best = Recipe(architecture="concat", tasks=("label",), optim=OptimConfig(epochs=2, lr=0.004))
    write_sweep(tmp_path / "sweep-concat", best, [("FINISHED", 0.5, 0.004)])
    mine = Recipe(tasks=("mood",), optim=OptimConfig(epochs=9, weight_decay=0.5), loader=LoaderConfig(fold=2))
    config = CompareConfig(store.uri, "o", trials=0, tuned_in=str(tmp_path), recipe=mine)
    require_tuned(config, ("concat",), [2])
    (found,) = finalists(config, "concat").values()
    assert (found.architecture, found.optim.lr, found.optim.weight_decay) == ("concat", 0.004, 0.5)
    assert (found.tasks, found.optim.epochs, found.loader.fold) == (("mood",), 9, 2)
    with pytest.raises(JobError, match=r"--tuned-in .*/sweep-late holds no sweep that ended"):
        require_tuned(config, ("concat", "late"), [2])


def test_a_task_that_a_fold_cannot_be_scored_by_is_refused_before_anything_runs(tmp_path):
    clips = [
        replace(clip, fold=n % 4, labels=clip.labels | ({"mood": None} if n % 4 == 2 else {}))
        for n, clip in enumerate(make_clips(24, 3, 3))
    ]
    store = write_store(tmp_path / "store", clips)
    require_labels(store, ("label", "mood"), [None])
    require_labels(store, ("label",), store.folds())
    with pytest.raises(JobError, match="--tasks mood: no clip in the val split of fold 1 has a label"):
        require_labels(store, (), store.folds())


@pytest.fixture(scope="module")
def compared(store, tmp_path_factory, shared_ray):
    """First two models with one seed; then another model, another seed and the next best recipes are asked for."""
    folder = tmp_path_factory.mktemp("compare")
    first = run(store, folder, "--models", "clcr,concat", "--trials", "2", "--seeds", "1", "--search", "lr,budget")
    assert first.returncode == 0, first.stderr
    kept = [folder / "comparison" / name for name in ("sweep-concat/best.yaml", "concat-seed1/metrics.json")]
    before = [path.stat().st_mtime_ns for path in kept]
    more = ["--models", "clcr,concat,audio", "--seeds", "2", "--finalists", "2", "--gpus-per-run", "0"]
    done = run(store, folder, *more, "--trials", "2", "--search", "lr,budget")
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before, "what had ended was run again"
    return folder, done.stdout


@pytest.mark.slow
def test_the_table_has_every_model_with_its_size_and_speed(compared):
    folder, said = compared
    table = (folder / "comparison" / "comparison.md").read_text()
    assert table in said and (folder / "comparison" / "comparison.png").stat().st_size > 10_000
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert cells[0] == ["comparison", "label", "mean", "parameters", "clips/s"]
    assert [row[0] for row in cells[2:5]] == ["clcr", "concat", "audio"]
    assert all(float(row[3].split()[0]) > 0 and float(row[4]) > 0 for row in cells[2:5])


@pytest.mark.slow
def test_each_model_is_trained_with_what_its_own_sweep_found_and_fresh_seeds(compared):
    folder = compared[0] / "comparison"
    client = MlflowClient(f"sqlite:///{compared[0]}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for model in ("clcr", "concat", "audio"):
        best = yaml.safe_load((folder / f"sweep-{model}" / "best.yaml").read_text())
        own = [r.data.params for r in runs if r.data.tags.get("variant") == model]
        assert sorted(p["seed"] for p in own) == ["1", "2"]
        assert all(p["model"] == best["model"] == model and float(p["lr"]) == best["lr"] for p in own)
        searched = [set(r.data.params) for r in runs if r.data.tags.get("trial") and r.data.tags["model"] == model]
        assert len(searched) == 2 and all("lr" in names and "model.dropout" not in names for names in searched)
        assert json.loads((folder / f"{model}-seed1" / "metrics.json").read_text())["label"]["n"] > 0


@pytest.mark.slow
def test_of_two_finalists_the_mean_validation_score_over_the_seeds_chooses(compared):
    folder, said = compared[0] / "comparison", compared[1]
    client = MlflowClient(f"sqlite:///{compared[0]}/mlflow.db")
    rows = {row.split("|")[1].strip(): row.split("|")[2].split()[0] for row in said.splitlines() if row.startswith("|")}
    tracked = client.get_run(json.loads((folder / "run.json").read_text())["run_id"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["finalists"] == 2
    for model in ("clcr", "concat", "audio"):
        trials = pq.read_table(folder / f"sweep-{model}/trials.parquet").to_pylist()
        rates = [trial["lr"] for trial in sorted(trials, key=lambda trial: -trial["best/score"])]
        found = {}
        for place, variant in enumerate((model, f"{model}.2")):
            runs = [folder / f"{variant}-seed{seed}" for seed in (1, 2)]
            assert {yaml.safe_load((run / "config.yaml").read_text())["lr"] for run in runs} == {rates[place]}
            about = [json.loads((run / "run.json").read_text()) for run in runs]
            scores = [run["val_score"] for run in about]
            seen = [[m.value for m in client.get_metric_history(run["run_id"], "val/score")] for run in about]
            assert scores == list(map(max, seen))
            tested = [json.loads((run / "metrics.json").read_text())["label"]["accuracy"] for run in runs]
            found[variant] = mean(scores), mean(tested)
        best = max(found, key=lambda variant: found[variant][0])
        assert rows[model] == f"{found[best][1]:.3f}" == f"{tracked.data.metrics[f'test/{model}/label']:.3f}"
        each = ", ".join(f"{variant} {score:.3f}" for variant, (score, _) in found.items())
        assert f"mean validation scores: {each}; {best} counts" in said


@pytest.mark.slow
def test_recipes_tuned_on_one_store_are_trained_on_another(compared, tmp_path):
    sweeps, other = compared[0] / "comparison", write_store(tmp_path / "store", make_clips(24, 3, 3))
    takes = ["--trials", "0", "--tuned-in", str(sweeps), "--seeds", "1"]
    done = run(other, tmp_path, "--models", "concat", *takes)
    assert done.returncode == 0, done.stderr
    trained = yaml.safe_load((tmp_path / "comparison/concat-seed1/config.yaml").read_text())
    best = yaml.safe_load((sweeps / "sweep-concat/best.yaml").read_text())
    assert trained == best | {"seed": 1}
    assert not (tmp_path / "comparison/sweep-concat").exists()
    both = run(other, tmp_path / "c", "--trials", "2", "--tuned-in", str(sweeps))
    assert both.returncode == 2 and "--trials 2: --tuned-in takes recipes that are tuned already" in both.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_every_fold_is_tested_once_by_models_of_its_own(tmp_path, shared_ray):
    clips = [replace(clip, fold=number % 3) for number, clip in enumerate(make_clips(24, 3, 3))]
    store = write_store(tmp_path / "store", clips)
    done = run(store, tmp_path, "--models", "concat,audio", "--folds", "--trials", "0", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "comparison"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    learned = {r.info.run_name: r.data.params["loader.fold"] for r in runs if r.data.tags.get("variant") == "concat"}
    assert learned == {f"concat on store, seed {seed}, fold {fold}": str(fold) for seed in (1, 2) for fold in range(3)}
    accuracy = {}
    for fold in range(3):
        seeds = [json.loads((folder / f"fold{fold}/concat-seed{s}/metrics.json").read_text())["label"] for s in (1, 2)]
        assert {m["n"] for m in seeds} == {sum(c.fold == fold and c.labels["label"] is not None for c in clips)}
        accuracy[fold] = mean(m["accuracy"] for m in seeds)
        assert fold_of(f"{folder}/fold{fold}/concat-seed1") == fold  # as explain finds the split to draw
    table = (folder / "comparison.md").read_text()
    assert "Test split, folds 0, 1, 2:" in table and table in done.stdout
    row = next(row for row in table.splitlines() if row.startswith("| concat"))
    assert row.split("|")[2].split()[0] == f"{mean(accuracy.values()):.3f}"
    both = run(store, tmp_path, "--folds", "--loader.fold", "1")
    assert both.returncode != 0 and "--folds runs every fold, --loader.fold only one" in both.stderr
