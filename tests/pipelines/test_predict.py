"""The predict job: every clip of a store is answered once, as the model answers it alone; what is there stays."""

import json
from dataclasses import replace
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from inprocess import run_here
from mediafiles import write_manifest
from models import small_model
from storefiles import make_clips, write_mixture, write_store

import clcr
from clcr.batches import collate
from clcr.config import ModelConfig
from features.corpus.events import bin_events
from features.store import Store, open_store
from pipelines.answering.table import (
    answers,
    distinct_names,
    require_distinct_columns,
    to_events,
    to_table,
)
from pipelines.common.errors import JobError
from pipelines.extract import ExtractConfig, extract
from pipelines.predict import PredictConfig, clips_by_shard, predict, predict_shard, write_part
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs
from pipelines.training.trained import open_model

WORD = clcr.TaskSpec("word", "events", ("background", "a", "b"), 8.0)


def make_model(folder, store, name="concat", seed=0, word=True):
    """A model with random weights that answers the store's tasks and one of events, saved as training saves it."""
    torch.manual_seed(seed)
    tasks = task_specs(store) | ({"word": WORD} if word else {})
    model = clcr.build(name, clcr.CLCRConfig(ModelConfig(width=16, heads=2)), feature_specs(store), tasks)
    model.eval()
    loader = SplitLoader(store, "train", model.features, task_specs(store), LoaderConfig(), batch_size=8)
    model.prepare_evaluation(loader.sample_batches)
    clcr.save(model, folder, store.spec.to_dict())
    return model


def job(*options):
    return run_here(predict, PredictConfig, *options)


@pytest.fixture(scope="module")
def predicted(store, tmp_path_factory, shared_ray):
    folder = tmp_path_factory.mktemp("predict")
    model = make_model(folder / "run" / "model", store)
    options = ("--model", folder / "run", "--store", store.uri, "--out", folder / "out", "--batch-size", 3)
    options += ("--concurrency", 1)  # one process answers few clips sooner than two have started
    done = job(*options)
    assert done.returncode == 0, done.stderr
    return folder, model, options, done.stdout


@pytest.mark.slow
def test_every_clip_is_answered_once_and_as_it_is_alone(predicted, store):
    folder, model, _, said = predicted
    index = store.index().to_pylist()
    rows = pq.read_table(folder / "out").to_pylist()
    assert f"predictions of {len(index)} clips" in said and f"/{len(index)} clips" in said
    assert sorted((r["clip_id"], r["split"]) for r in rows) == sorted((r["clip_id"], r["split"]) for r in index)
    answered = {row["clip_id"]: row for row in rows}
    for row in index:
        sample, got = store.read(row["shard"], row["offset"], row["nbytes"]), answered[row["clip_id"]]
        targets = {"word": bin_events(None, row["duration"], WORD.rate, {})}
        features = {m: sample[m] for m in model.features if m in sample}
        clip = collate([{"clip_id": "x", "features": features, "targets": targets}], model.features, model.tasks)
        with torch.no_grad():
            logits = {name: values[0] for name, values in model(clip).logits.items()}
        probabilities = logits["label"].softmax(-1)
        assert got["label"] == "ab"[int(probabilities.argmax())]
        assert got["label_probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert list(got["label_probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert got["mood"] == pytest.approx(logits["mood"].item(), abs=1e-5)
        classes = {name: number for number, name in enumerate(WORD.classes)}
        bins = bin_events(got["word"], row["duration"], WORD.rate, classes)
        assert bins.tolist() == logits["word"].argmax(-1).tolist()


@pytest.mark.slow
def test_a_run_goes_on_with_the_parts_that_are_missing_or_lack_clips(predicted):
    folder, _, options, _ = predicted
    parts = sorted((folder / "out").glob("*.parquet"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts}
    parts[1].unlink()
    pq.write_table(pq.read_table(parts[2]).slice(1), parts[2])  # as if a clip had been cured since
    again = job(*options)
    assert again.returncode == 0 and f"2 of {len(parts)} shards to predict" in again.stdout
    assert {path for path in parts if path.stat().st_mtime_ns != before[path][1]} == set(parts[1:3])
    assert {path: path.read_bytes() for path in parts} == {path: content for path, (content, _) in before.items()}
    assert pq.read_table(folder / "out").num_rows > 0  # the folder is a data set, whatever else lies in it


@pytest.mark.slow
def test_new_clips_without_labels_go_through_extract_and_predict(media, tmp_path, shared_ray):
    """A model of labelled clips answers for clips of which nobody knows anything."""
    labelled = [("train", "a"), ("train", "b"), ("val", "a"), ("test", "b")]
    rows = [{"clip_id": f"{n}", "video": "good.mp4", "split": s, "label": y} for n, (s, y) in enumerate(labelled)]
    new = [{"clip_id": name, "video": f"{name}.mp4", "split": "test"} for name in ("good", "silent", "corrupt")]
    for name, clips in (("old", rows), ("new", new)):
        manifest = write_manifest(media / f"{name}.csv", clips)
        extra = ["--unlabelled", "--max-failed", "1"] if name == "new" else []
        options = ["--corpus", manifest, "--store", tmp_path / name, "--video.size", "16", *extra]
        done = run_here(extract, ExtractConfig, *options)
        assert done.returncode == 0, done.stderr
    make_model(tmp_path / "model", Store(str(tmp_path / "old")), "clcr", word=False)
    done = job("--model", tmp_path / "model", "--store", tmp_path / "new", "--out", tmp_path / "out", "--split", "test")
    assert done.returncode == 0, done.stderr
    answers = pq.read_table(tmp_path / "out").to_pylist()
    assert {row["clip_id"] for row in answers} == {"good", "silent"}
    assert all(row["label"] in "ab" and 0.5 <= row["label_probability"] <= 1 for row in answers)


@pytest.mark.parametrize("name", ["clcr", "mm_orient", "audio"])
def test_a_clips_answer_does_not_depend_on_its_batch_nor_on_how_the_model_was_found(store, tmp_path, name):
    make_model(tmp_path / "model", store, name, word=False)
    trained = open_model("--model", str(tmp_path))
    tables = []
    for batch_size in (1, 4):
        torch.manual_seed(batch_size)
        tables.append(predict_shard(trained.model, store, "train-000001", batch_size).to_pylist())
    for alone, beside in zip(*tables, strict=True):
        assert alone["clip_id"] == beside["clip_id"] and alone["label"] == beside["label"]
        assert alone["mood"] == pytest.approx(beside["mood"], abs=1e-5)


def test_a_split_is_its_shards_and_an_empty_one_is_named(store, tmp_path):
    every = clips_by_shard(store, "")
    assert sum(every.values()) == store.counts()[0]
    assert clips_by_shard(store, "val") == {name: n for name, n in every.items() if name.startswith("val-")}
    lacking = write_store(tmp_path / "store", make_clips(4, 3))
    make_model(tmp_path / "model", lacking)
    with pytest.raises(JobError, match=r"--split test: .*/store has no clip in it"):
        predict(PredictConfig(str(tmp_path), lacking.uri, str(tmp_path / "out"), "test"))


def test_predictions_of_another_model_or_store_are_not_mixed(store, tmp_path):
    one, other = (tmp_path / str(seed) for seed in (0, 1))
    for seed, folder in enumerate((one, other)):
        make_model(folder, store, seed=seed)
    (tmp_path / "out").mkdir()
    for shard, clips in clips_by_shard(store, "train").items():  # all there: nothing is left to predict
        write_part(str(tmp_path / "out"), shard, pa.table({"clip_id": ["x"] * clips}))
    config = PredictConfig(str(one), store.uri, str(tmp_path / "out"), "train")
    predict(config)
    predict(config)
    with pytest.raises(JobError, match="holds predictions of another model: give another --out"):
        predict(replace(config, model=str(other)))
    second = write_store(tmp_path / "store", make_clips(9, 3, 5))
    with pytest.raises(JobError, match="holds predictions of another store"):
        predict(replace(config, store=second.uri))


def test_a_store_of_other_features_a_folder_without_a_model_and_an_unknown_split_are_named(store, tmp_path):
    make_model(tmp_path / "model", store)
    config = PredictConfig(str(tmp_path), store.uri, str(tmp_path / "out"))
    other = write_store(tmp_path / "store", make_clips(4, 3, 5))
    path = tmp_path / "store/store.json"
    path.write_text(path.read_text().replace('"mels": 8', '"mels": 9'))
    with pytest.raises(JobError, match=r"than the model learned from: features\.audio\.encoder\.mels"):
        predict(replace(config, store=other.uri))
    with pytest.raises(JobError, match=r"--model .*/store holds no trained model: give the --out of a pipelines/train"):
        predict(replace(config, model=str(tmp_path / "store")))
    with pytest.raises(JobError, match="--split dev: choose one of train, val, test"):
        PredictConfig("m", "s", "o", "dev")
    assert not (tmp_path / "out").exists()


def test_rows_of_a_mixture_name_their_store(tmp_path):
    mixture = open_store(write_mixture(tmp_path))
    rows = [*mixture.index("val").to_pylist(), *mixture.index("test").to_pylist()]
    model = small_model(tmp_path / "model", mixture)
    shards = sorted({row["shard"] for row in rows})
    found = [row for shard in shards for row in predict_shard(model, mixture, shard, 4).to_pylist()]
    assert {row["clip_id"]: row["store"] for row in found} == {row["clip_id"]: row["store"] for row in rows}
    assert {row["store"] for row in found} == {"whole", "few"}
    with pytest.raises(JobError, match="task store: its column store is one of every row too"):
        require_distinct_columns({"store": clcr.TaskSpec("store", "regression")}, mixture=True)
    require_distinct_columns({"store": clcr.TaskSpec("store", "regression")})


def test_tasks_that_would_write_one_column_are_refused(store, tmp_path):
    tasks = {name: clcr.TaskSpec(name, kind, classes) for name, kind, classes in (
        ("mood", "classification", ("a", "b")), ("mood_probability", "regression", ()))}  # fmt: skip
    with pytest.raises(JobError, match="task mood_probability: its column mood_probability is one of task mood too"):
        require_distinct_columns(tasks)
    with pytest.raises(JobError, match="task split: its column split is one of every row too"):
        require_distinct_columns({"split": clcr.TaskSpec("split", "regression")})
    require_distinct_columns({"mood": tasks["mood"], "mood_probable": clcr.TaskSpec("mood_probable", "regression")})


def test_classes_that_differ_in_case_are_read_by_duckdb(tmp_path):
    classes = ("A", "a", "a_2", "B")
    assert distinct_names(classes) == ["A", "a_3", "a_2", "B"]
    task = clcr.TaskSpec("mood", "classification", classes)
    row = {"clip_id": "x", "split": "test", "fold": None, "duration": 1.0}
    table = to_table({"mood": task}, [row], {"mood": torch.tensor([[0.0, 3.0, 0.0, 0.0]])})
    pq.write_table(table, tmp_path / "part.parquet")
    read = duckdb.sql(f"select mood, mood_probability, mood_probabilities from '{tmp_path}/*.parquet'").fetchall()
    best, probability, each = read[0]
    assert best == "a" and each["a_3"] == pytest.approx(probability) and each["A"] < probability


def test_numbers_are_written_as_exactly_as_the_model_says_them():
    stamp = torch.tensor([[1.7e9 + 1.25]], dtype=torch.float64)
    written = answers(clcr.TaskSpec("when", "regression"), stamp, [1.0])
    assert written["when"].to_pylist() == [1.7e9 + 1.25]


def test_a_modality_that_a_whole_corpus_lacks_is_missing_in_every_clip(store, tmp_path):
    make_model(tmp_path / "model", store, "clcr", word=False)
    trained, path = open_model("--model", str(tmp_path)), tmp_path / "store"
    lacking = write_store(path, make_clips(4, 3, 5))
    spec = json.loads((path / "store.json").read_text())
    del spec["features"]["audio"]
    (path / "store.json").write_text(json.dumps(spec))
    lacking = Store(str(path))
    trained.require_features(lacking)
    assert predict_shard(trained.model, lacking, "train-000000", 4).num_rows == 4
    del spec["features"]["video"]
    spec["features"]["text"] = {"shape": [4], "dtype": "float16", "rate": 0.0, "encoder": {"name": "words"}}
    (path / "store.json").write_text(json.dumps(spec))
    with pytest.raises(JobError, match="holds text, and the model reads video, audio"):
        trained.require_features(Store(str(path)))


def test_bins_become_the_events_that_give_the_same_bins():
    rng = np.random.default_rng(0)
    classes = {name: number for number, name in enumerate(WORD.classes)}
    for _ in range(200):
        seconds = rng.uniform(0.5 / WORD.rate, 4)  # a shorter clip ends before the middle of its one bin
        bins = rng.integers(0, 3, len(bin_events(None, seconds, WORD.rate, {})))
        events = to_events(WORD, np.append(bins, [1, 2]), seconds)  # bins beyond the clip belong to a longer one
        assert bin_events(events, seconds, WORD.rate, classes).tolist() == bins.tolist()
        assert all(event["start"] < event["end"] <= seconds for event in events)
        assert all(a["end"] <= b["start"] for a, b in pairwise(events))
