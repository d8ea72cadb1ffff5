"""The predict job: every clip of a store is answered once, as the model answers it alone; what is there stays."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from storefiles import make_clips, write_store

import clcr
from clcr.batches import collate
from clcr.config import ModelConfig
from features.events import bin_events
from pipelines.cli import JobError
from pipelines.loading import feature_specs, task_specs
from pipelines.predict import PredictConfig, predict, to_events

ROOT = Path(__file__).parents[2]
WORD = clcr.TaskSpec("word", "events", ("background", "a", "b"), 8.0)


def make_model(folder, store, name="concat", seed=0):
    """A model with random weights that answers the store's tasks and one of events, saved as training saves it."""
    torch.manual_seed(seed)
    tasks = {**task_specs(store), "word": WORD}
    model = clcr.build(name, clcr.CLCRConfig(ModelConfig(width=16, heads=2)), feature_specs(store), tasks)
    clcr.save(model, folder, store.spec.to_dict())
    return model.eval()


def job(*options):
    command = [sys.executable, "pipelines/predict.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def predicted(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    model = make_model(folder / "run" / "model", store)
    options = ("--model", folder / "run", "--store", store.uri, "--out", folder / "out", "--batch-size", 3)
    done = job(*options)
    assert done.returncode == 0, done.stderr
    return folder, model, options, done.stdout


@pytest.mark.slow
def test_every_clip_is_answered_once_and_as_it_is_alone(predicted, store):
    folder, model, _, said = predicted
    index = store.index().to_pylist()
    rows = ds.dataset(sorted((folder / "out").glob("*.parquet"))).to_table().to_pylist()
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
def test_a_run_goes_on_with_the_parts_that_are_missing(predicted):
    folder, _, options, _ = predicted
    parts = sorted((folder / "out").glob("*.parquet"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts}
    parts[1].unlink()
    again = job(*options)
    assert again.returncode == 0 and f"1 of {len(parts)} shards to predict" in again.stdout
    assert {path for path in parts if path.stat().st_mtime_ns != before[path][1]} == {parts[1]}
    assert parts[1].read_bytes() == before[parts[1]][0]


def test_predictions_of_another_model_or_store_are_not_mixed(store, tmp_path):
    one, other = (tmp_path / str(seed) for seed in (0, 1))
    for seed, folder in enumerate((one, other)):
        make_model(folder, store, seed=seed)
    claimed = PredictConfig(str(one), store.uri, str(tmp_path / "out"), "train")
    (tmp_path / "out").mkdir()
    for shard in store.spec.shards():  # all there: nothing is left to predict
        pq.write_table(pa.table({"clip_id": ["x"]}), tmp_path / "out" / f"{shard}.parquet")
    predict(claimed)
    predict(claimed)
    with pytest.raises(JobError, match="holds predictions of another model: give another --out"):
        predict(replace(claimed, model=str(other)))
    second = write_store(tmp_path / "store", make_clips(9, 3, 5))
    with pytest.raises(JobError, match="holds predictions of another store"):
        predict(replace(claimed, store=second.uri))


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
