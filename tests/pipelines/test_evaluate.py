"""The evaluate job: its figures are scikit-learn's of its predictions, its report opens, odd stores get their word."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from inprocess import run_here
from mlflow.tracking import MlflowClient
from models import small_model
from selenium.webdriver.common.by import By
from storefiles import TASKS, make_clip, make_clips, make_spec, shards_of, write_shard, write_store

import clcr
from features.corpus.tasks import Task
from features.store import Store
from features.store.shards import create_store
from infra.screenshot import chromium
from pipelines.common.cli import parse
from pipelines.common.errors import JobError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation import flows
from pipelines.evaluation.models import Contender, find_run, fold_of, log_evaluation
from pipelines.explain import require_learned
from pipelines.tracking import run as tracking
from pipelines.training.run_folder import sole_owner
from pipelines.training.trained import open_model, store_file

QUICK = {"noise": (1.0,), "pictures": 0, "track": False}


def store_of(folder, clips, tasks=TASKS):
    spec = make_spec(clips, 4, tasks=tasks)
    create_store(str(folder), spec)
    for name, rows in shards_of(clips, 4):
        write_shard(folder, name, rows, spec)
    return Store(str(folder))


def run(folder, store, models, **options):
    """The metrics of an evaluation in this process."""
    config = EvaluateConfig(tuple(map(str, models)), store.uri, str(folder), **(QUICK | options))
    evaluate(config)
    return json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)


def shuffled(clips):
    """The same clips with labels that do not follow from their numbers."""
    rng = np.random.default_rng(0)
    return [replace(c, labels=c.labels | {"label": c.labels["label"] and "ab"[rng.integers(2)]}) for c in clips]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Three models on 60 clips, some without a label or without sound; one of them has an MLflow run."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = write_store(folder / "store", shuffled(make_clips(40, 12, 60)))
    for name, architecture, seed in (("fused", "concat", 8), ("clcr", "clcr", 2), ("sound", "audio", 1)):
        small_model(folder / name / "model", store, architecture, seed)  # seeds that give both answers
    started = tracking.start_run(f"sqlite:///{folder}/mlflow.db", "test", "fused", {}, {})
    (folder / "fused" / "run.json").write_text(json.dumps({"tracking_uri": started.uri, "run_id": started.run_id}))
    models = [folder / "fused", folder / "clcr" / "model", folder / "sound"]
    metrics = run(folder / "out", store, models, noise=(0.5, 2.0), pictures=2, track=True)
    return folder, store, metrics, started


def read(folder, model, condition="all"):
    return pq.read_table(folder / "out" / "predictions" / model / f"{condition}.parquet").to_pandas()


@pytest.mark.parametrize("model", ["fused", "clcr", "sound"])
def test_figures_of_classes_are_scikit_learns_of_the_predictions(evaluated, model):
    folder, _, metrics, _ = evaluated
    rows = read(folder, model)
    rows = rows[rows["label_label"].notna()]
    found, truth, guess = metrics["models"][model]["tasks"]["label"], rows["label_label"], rows["label"]
    assert found["n"] == len(rows) == 48 and set(guess) == {"a", "b"}
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    report = sk.classification_report(truth, guess, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    for label in "ab":
        mine, theirs = found["per_class"][label], report[label]
        assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names.values()])
    assert found["macro_precision"] == pytest.approx(report["macro avg"]["precision"])
    assert found["macro_recall"] == pytest.approx(report["macro avg"]["recall"])
    probability = np.array([row["b"] for row in rows["label_probabilities"]])
    areas = [sk.roc_auc_score(truth == c, [row[c] for row in rows["label_probabilities"]]) for c in "ab"]
    assert found["auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert found["nll"] == pytest.approx(sk.log_loss(truth == "b", probability), abs=1e-5)
    assert found["confusion"]["counts"] == sk.confusion_matrix(truth, guess, labels=["a", "b"]).tolist()
    low, high = found["intervals"]["accuracy"]
    assert low <= found["accuracy"] <= high < 1 and low < high


@pytest.mark.parametrize("model", ["fused", "sound"])
def test_figures_of_numbers_are_scikit_learns_of_the_predictions(evaluated, model):
    folder, _, metrics, _ = evaluated
    rows = read(folder, model).dropna(subset=["label_mood"])
    found, truth, guess = metrics["models"][model]["tasks"]["mood"], rows["label_mood"], rows["mood"]
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, guess), rel=1e-5)
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, guess), rel=1e-5)
    assert found["r2"] == pytest.approx(sk.r2_score(truth, guess), rel=1e-4)
    assert found["bias"] == pytest.approx((guess - truth).mean(), abs=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-5)


def test_every_subset_and_level_of_noise_is_that_of_its_predictions(evaluated):
    folder, _, metrics, _ = evaluated
    for model in ("fused", "clcr", "sound"):
        about = metrics["models"][model]
        assert set(about["subsets"]) == {"all", "only-video", "only-audio"}
        for condition, found in about["subsets"].items():
            rows = read(folder, model, condition).dropna(subset=["label_label"])
            assert found["label"]["accuracy"] == pytest.approx((rows["label"] == rows["label_label"]).mean())
        curve = about["noise"]["label"]["audio"]
        assert curve["levels"] == [0, 0.5, 2]
        values = [point["accuracy"] for point in curve["figures"]]
        assert curve["relative_robustness"] == pytest.approx(np.trapezoid(values, [0, 0.5, 2]) / 2)
        rows = read(folder, model, "noise-audio-2").dropna(subset=["label_label"])
        assert values[2] == pytest.approx((rows["label"] == rows["label_label"]).mean())
    # A model that reads sound alone does not see what happens to the picture.
    sound = metrics["models"]["sound"]
    assert sound["subsets"]["only-audio"] == sound["subsets"]["all"]
    assert sound["noise"]["label"]["video"]["kept"] == pytest.approx(1)


def test_worst_clips_slices_pairs_and_probes_are_there(evaluated):
    _, store, metrics, _ = evaluated
    found = metrics["models"]["fused"]["tasks"]["label"]
    losses = [clip["loss"] for clip in found["worst"]]
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    index = {row["clip_id"]: row for row in store.index("test").to_pylist()}
    assert all(clip["nbytes"] == index[clip["clip_id"]]["nbytes"] for clip in found["worst"])
    assert set(found["slices"]) == {"duration", "audio"} and set(found["slices"]["audio"]) == {"absent", "present"}
    assert sum(part["n"] for part in found["slices"]["audio"].values()) == found["n"]
    pairs = {(pair["task"], pair["a"], pair["b"]): pair for pair in metrics["paired"]}
    assert len(pairs) == 6
    pair = pairs["label", "fused", "sound"]
    accuracies = [metrics["models"][m]["tasks"]["label"]["accuracy"] for m in ("fused", "sound")]
    assert pair["difference"] == pytest.approx(accuracies[0] - accuracies[1])
    assert pair["only_a_right"] - pair["only_b_right"] == round(48 * pair["difference"]) and pair["p"] <= pair["p_holm"]
    assert 0 <= metrics["leaks"]["label"]["value"] <= 1 and metrics["leaks"]["mood"]["figure"] == "mae"
    assert found["calibration"]["temperature"] > 0


def test_the_report_opens_in_a_browser_offline_and_shows_what_metrics_json_holds(evaluated):
    folder, _, metrics, _ = evaluated
    path = folder / "out" / "report.html"
    text = path.read_text()
    assert len(text.encode()) < 3_000_000 and "<script" not in text
    assert not [
        word for word in ('src="http', 'href="http', "url(http", "@import") if word in text.replace("xlink:", "")
    ]
    with chromium() as browser:
        browser.get(path.as_uri())
        assert "fused, clcr, sound" in browser.title
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        section = browser.find_element(By.CSS_SELECTOR, "section[data-task=label]")
        for model, about in metrics["models"].items():
            cell = section.find_element(By.CSS_SELECTOR, f"tr[data-model='{model}'] td[data-figure=accuracy]")
            assert cell.text.startswith(f"{about['tasks']['label']['accuracy']:.3f} [")
        row = section.find_element(By.CSS_SELECTOR, "tr[data-condition=only-video]")
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        subset = [about["subsets"]["only-video"]["label"]["accuracy"] for about in metrics["models"].values()]
        assert cells == ["video alone", *(f"{value:.3f}" for value in subset)]
        drawn = section.find_elements(By.TAG_NAME, "svg")
        assert len(drawn) >= 5 and all(svg.rect["width"] > 50 for svg in drawn[:3])  # of closed details: no size
        sheet = section.find_element(By.CSS_SELECTOR, "img.sheet")
        assert browser.execute_script("return arguments[0].naturalWidth", sheet) > 300
        assert section.find_element(By.CSS_SELECTOR, "table.worst").text.count("clip/") == 10


def test_the_models_mlflow_run_gets_the_figures_and_a_second_evaluation_replaces_them(evaluated):
    folder, store, metrics, started = evaluated
    client = MlflowClient(started.uri)
    logged = client.get_run(started.run_id).data.metrics
    assert logged["evaluate/test/label/accuracy"] == metrics["models"]["fused"]["tasks"]["label"]["accuracy"]
    subset = metrics["models"]["fused"]["subsets"]["only-audio"]["label"]["accuracy"]
    assert logged["evaluate/test/subsets/only-audio/label/accuracy"] == subset
    place = client.list_artifacts(started.run_id, "evaluation")[0].path
    assert {Path(a.path).name for a in client.list_artifacts(started.run_id, place)} == {"report.html", "metrics.json"}
    again = run(folder / "again", store, [folder / "fused"], track=True, robust_clips=0, tasks=("mood",))
    assert again["models"]["fused"]["subsets"] == {}
    assert client.get_run(started.run_id).data.metrics["evaluate/test/label/accuracy"] == pytest.approx(
        metrics["models"]["fused"]["tasks"]["label"]["accuracy"]
    )


def test_a_model_whose_run_was_deleted_is_evaluated_without_it(tmp_path, capsys):
    started = tracking.start_run(f"sqlite:///{tmp_path}/mlflow.db", "test", "gone", {}, {})
    (tmp_path / "run.json").write_text(json.dumps({"tracking_uri": started.uri, "run_id": started.run_id}))
    contender = Contender("gone", str(tmp_path), None, str(tmp_path))
    assert find_run(contender) == started
    started.client.delete_run(started.run_id)
    assert find_run(contender) is None
    said = capsys.readouterr().out
    assert said == f"gone: not logged to MLflow: MLflow at {started.uri}: run {started.run_id} was deleted\n"


def test_a_model_knows_its_fold_wherever_it_lies(tmp_path):
    store, _ = write_store(tmp_path / "store", make_clips(8)), (tmp_path / "copy").mkdir()
    model = small_model(tmp_path / "made", store)
    clcr.save(model, tmp_path / "copy", store.spec.to_dict() | {"fold": 2})
    opened = open_model("--model", str(tmp_path / "copy"))
    assert opened.fold == 2 and store_file(opened.learned, opened.fold) == store.spec.to_dict() | {"fold": 2}
    both = [Contender("grid 1", "models:/grid/1", opened, None)]
    both.append(Contender("copy", "copy", opened, str(tmp_path / "copy")))
    assert fold_of(both, SimpleNamespace(folds=lambda: [0, 1, 2])) == 2
    assert fold_of(both, store) is None  # which has no folds


def test_explain_refuses_classes_that_the_model_does_not_know_so(tmp_path):
    store = write_store(tmp_path / "store", make_clips(8))
    small_model(tmp_path / "model", store)
    trained = open_model("--model", str(tmp_path / "model"))
    require_learned(trained, store)
    fewer = Task("label", "classification", trained.model.tasks["label"].classes[1:])
    store.spec = replace(store.spec, tasks=(fewer, *(t for t in store.spec.tasks if t.name != "label")))
    with pytest.raises(JobError, match=r"has the classes .* of label, and the model .*: explain it on the store"):
        require_learned(trained, store)


def test_labels_that_mlflow_would_spell_alike_keep_their_own_figures(tmp_path):
    run = tracking.start_run(f"sqlite:///{tmp_path}/mlflow.db", "test", "run", {}, {})
    log_evaluation(run, "evaluate/test", {"word": {"per_class": {"map@1": 0.25, "map#1": 0.75}}}, {})
    assert sorted(run.client.get_run(run.run_id).data.metrics.values()) == [0.25, 0.75]


@pytest.mark.slow
def test_on_a_cluster_the_figures_are_those_of_this_process(evaluated, shared_ray):
    folder, store, metrics, _ = evaluated
    options = ["--model", folder / "fused", "--store", store.uri, "--out", folder / "cluster"]
    options += ["--here", "0", "--noise", "0.5,2", "--pictures", "0", "--no-track", "--robust-clips", "20"]
    options += ["--concurrency", "1"]
    done = run_here(evaluate, EvaluateConfig, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "cluster" / "metrics.json").read_text())
    mine, theirs = (m["models"]["fused"]["tasks"]["label"] for m in (found, metrics))
    assert mine["accuracy"] == theirs["accuracy"] and mine["nll"] == pytest.approx(theirs["nll"], abs=1e-6)
    assert found["robust_clips"] == 20 and "60/60 clips" in done.stdout
    assert pq.read_metadata(folder / "cluster" / "predictions" / "fused" / "only-audio.parquet").num_rows == 20


def test_labels_in_another_order_give_the_same_figures(tmp_path):
    clips = make_clips(8, 4, 12)
    store = store_of(tmp_path / "store", clips)
    other = store_of(tmp_path / "other", clips, (Task("label", "classification", ("b", "a")), TASKS[1]))
    small_model(tmp_path / "net", store)
    one, two = (
        run(tmp_path / name, s, [tmp_path / "net"])["models"]["net"] for name, s in (("1", store), ("2", other))
    )
    assert one == two


def test_classes_that_the_model_never_saw_count_as_wrong_and_are_named(tmp_path):
    store = store_of(tmp_path / "store", make_clips(8, 4, 12))
    clips = make_clips(8, 4, 9) + [make_clip(f"new/{n}", "test", "zebra") for n in range(9)]
    wider = store_of(tmp_path / "wider", clips, (Task("label", "classification", ("a", "b", "zebra")), TASKS[1]))
    small_model(tmp_path / "net", store)
    metrics = run(tmp_path / "out", wider, [tmp_path / "net"])
    found = metrics["models"]["net"]["tasks"]["label"]
    rows = pq.read_table(tmp_path / "out/predictions/net/all.parquet").to_pandas().dropna(subset=["label_label"])
    assert found["accuracy"] == pytest.approx((rows["label"] == rows["label_label"]).mean())
    assert found["per_class"]["zebra"] == {"precision": 0, "recall": 0, "f1": 0, "support": 9, "auroc": None}
    assert found["confusion"]["labels"] == ["a", "b", "zebra"] and sum(found["confusion"]["counts"][2]) == 9
    assert "zebra" in metrics["notes"][0] and "zebra" in (tmp_path / "out" / "report.html").read_text()
    assert found["worst"][0]["label"] == "zebra"


def test_classes_that_a_store_lacks_stay_in_the_table_without_a_clip(tmp_path, store):
    task = Task("label", "classification", ("zebra", "b", "a"))
    wider = store_of(tmp_path / "wider", make_clips(8), (task, TASKS[1]))
    small_model(tmp_path / "net", wider)
    narrow = store_of(tmp_path / "narrow", make_clips(8, 4, 12))
    metrics = run(tmp_path / "out", narrow, [tmp_path / "net"])
    found = metrics["models"]["net"]["tasks"]["label"]
    rows = pq.read_table(tmp_path / "out/predictions/net/all.parquet").to_pandas().dropna(subset=["label_label"])
    expected = sk.confusion_matrix(rows["label_label"], rows["label"], labels=task.classes).tolist()
    assert found["confusion"] == {"labels": list(task.classes), "counts": expected} and sum(expected[0]) == 0
    assert found["per_class"]["zebra"]["support"] == 0 and found["per_class"]["zebra"]["auroc"] is None
    assert metrics["notes"] == []


def test_a_task_that_the_store_or_one_of_the_models_lacks_is_left_out(tmp_path):
    clips = make_clips(8, 4, 12)
    whole, lacking = store_of(tmp_path / "whole", clips), store_of(tmp_path / "lacking", clips, TASKS[:1])
    small_model(tmp_path / "both", whole)
    small_model(tmp_path / "feel", whole, tasks={"mood": clcr.TaskSpec("mood", "regression")})
    models = [tmp_path / "both", tmp_path / "feel"]
    one, two = (run(tmp_path / s.spec.tasks[-1].name, s, models) for s in (whole, lacking))
    assert [list(one["models"][m]["tasks"]) for m in ("both", "feel")] == [["label", "mood"], ["mood"]]
    assert [(pair["task"], pair["a"], pair["b"]) for pair in one["paired"]] == [("mood", "both", "feel")]
    assert two["tasks"] == ["label"] and two["models"]["feel"]["tasks"] == {} and two["paired"] == []
    assert two["models"]["both"]["tasks"]["label"] == one["models"]["both"]["tasks"]["label"]
    report = (tmp_path / "label" / "report.html").read_text()
    assert 'data-task="label"' in report and 'data-task="mood"' not in report
    with pytest.raises(JobError, match=r"/lacking has label, and the models answer mood: there is nothing to evaluate"):
        run(tmp_path / "none", lacking, models[1:])


def test_one_class_and_equal_numbers_leave_undefined_figures_null(tmp_path):
    clips = make_clips(8, 4) + [make_clip(f"{n}", "test", "a", 0.5) for n in range(6)]
    store = store_of(tmp_path / "store", clips)
    small_model(tmp_path / "net", store, "clcr")
    metrics = run(tmp_path / "out", store, [tmp_path / "net"])
    tasks = metrics["models"]["net"]["tasks"]
    assert tasks["label"]["auroc"] is None and tasks["mood"]["r2"] is None
    assert 0 <= tasks["label"]["accuracy"] <= 1
    assert any("all labels are the same" in note for note in metrics["notes"])


def test_without_a_validation_split_there_is_no_temperature(tmp_path):
    store = store_of(tmp_path / "store", make_clips(8, 0, 8))
    small_model(tmp_path / "net", store)
    found = run(tmp_path / "out", store, [tmp_path / "net"])["models"]["net"]["tasks"]["label"]
    assert "temperature" not in found["calibration"] and found["calibration"]["ece"] >= 0


def test_a_private_flow_that_follows_from_another_is_found_and_one_that_does_not_is_not(evaluated):
    folder, _, metrics, _ = evaluated
    assert set(metrics["models"]["clcr"]["flows"]) == {"video -> audio", "audio -> video"}
    assert not metrics["models"]["fused"]["flows"]  # concat keeps nothing private
    assert 'class="flows"' in (folder / "out" / "report.html").read_text()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4))
    y = {"follows": x @ rng.normal(size=(4, 6)), "its own": rng.normal(size=(80, 6))}
    found = {k: flows.r_squared(x[:40], v[:40], x[40:], v[40:]) for k, v in y.items()}
    assert found["follows"] > 0.9 and found["its own"] < flows.LEAK
    assert flows.r_squared(np.full((40, 4), np.nan), y["follows"][:40], x[40:], y["follows"][40:]) is None


def test_a_second_job_is_kept_out_of_the_folder(tmp_path, store):
    small_model(tmp_path / "net", store)
    with sole_owner(str(tmp_path / "out")), pytest.raises(JobError, match="--out"):
        run(tmp_path / "out", store, [tmp_path / "net"])


SPLITS = {  # clips of the training, validation and test split, and the labels of the test split
    "no training split": (0, 6, 6, "ab"),
    "one clip": (6, 0, 1, "a"),
    "one class": (6, 6, 6, "a"),
    "a class that is rare": (6, 6, 9, "aaaaaaaab"),
    "labels of one clip alone": (6, 6, 6, "a....."),
}


@pytest.mark.parametrize("case", SPLITS)
def test_an_odd_store_gives_a_right_table(tmp_path, store, case):
    train, val, test, labels = SPLITS[case]
    known = [None if label == "." else label for label in (labels * test)[:test]]
    clips = make_clips(train, val) + [make_clip(f"t{n}", "test", label, None) for n, label in enumerate(known)]
    odd = store_of(tmp_path / "odd", clips)
    small_model(tmp_path / "net", store, "clcr")
    metrics = run(tmp_path / "out", odd, [tmp_path / "net"])
    found = metrics["models"]["net"]["tasks"]
    rows = (
        pq.read_table(tmp_path / "out" / "predictions" / "net" / "all.parquet")
        .to_pandas()
        .dropna(subset=["label_label"])
    )
    assert found["label"]["n"] == len(rows) == sum(label is not None for label in known)
    assert found["label"]["accuracy"] == pytest.approx((rows["label"] == rows["label_label"]).mean())
    assert found["mood"]["n"] == 0 and any("no clip has a label" in note for note in metrics["notes"])
    assert (tmp_path / "out" / "report.html").stat().st_size > 5000


def test_what_cannot_be_evaluated_is_one_line(tmp_path, store):
    small_model(tmp_path / "net", store)
    config = EvaluateConfig((str(tmp_path / "net"),), store.uri, str(tmp_path / "out"))
    lacking = store_of(tmp_path / "lacking", make_clips(6, 3))
    with pytest.raises(JobError, match=r"--split test: .*/lacking has no clip in it; it has train \(6\), val \(3\)"):
        evaluate(replace(config, store=lacking.uri))
    bare = store_of(tmp_path / "bare", make_clips(6, 3, 3), ())
    with pytest.raises(JobError, match=r"has no labels .*predict.py.*there is nothing to evaluate"):
        evaluate(replace(config, store=bare.uri))
    blank = [*make_clips(6, 3), *(make_clip(f"{n}", "test", None, None) for n in range(3))]
    with pytest.raises(JobError, match=r"--split test: no clip of .* has a label of label, mood there"):
        evaluate(replace(config, store=store_of(tmp_path / "blank", blank).uri))
    with pytest.raises(JobError, match="--tasks mud: the models answer label, mood"):
        evaluate(replace(config, tasks=("mud",)))
    with pytest.raises(JobError, match="--slices colour: the store's index has no such column; it has clip_id"):
        evaluate(replace(config, slices=("colour",)))
    words = (clcr.TaskSpec("label", "regression"),)
    small_model(tmp_path / "numbers", store, tasks={task.name: task for task in words})
    with pytest.raises(JobError, match="task label is regression to numbers and classification in"):
        evaluate(replace(config, model=(str(tmp_path / "numbers"),)))
    with pytest.raises(JobError, match="--noise 0: levels must be above 0"):
        replace(config, noise=(0.0,))
    assert not (tmp_path / "out").exists()
    assert parse(EvaluateConfig, ["--model", "a,b", "--store", "s", "--out", "o"]).model == ("a", "b")
