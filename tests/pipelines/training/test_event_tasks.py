"""Events from a csv with JSON to a trained model, without Ray: manifest, media, store, loader, loop."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from learners import losses, on_two_workers, recipe
from mediafiles import numbered, sine, write_manifest, write_media

from clcr.config import CLCRConfig, ModelConfig, StemConfig
from features.corpus.events import EVENTS
from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.extractor import Extraction, isolated_encoder
from features.store import Store, StoreSpec
from features.store.inspect import inspect
from features.store.plan import write_plan
from features.store.shards import create_store
from features.store.sheet import choose, describe
from features.store.verify import verify
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs

ENCODER = EncoderSpec(VideoSpec(size=8), AudioSpec(mels=16))
TONES = {"low": 300.0, "high": 2500.0}
RATE = 5.0
pytestmark = pytest.mark.slow


def make_clip(folder, name, rng):
    """A clip of 1.2 s to 2.4 s: silence, one tone, silence, the other tone; and its events."""
    seconds = 1.2 + 0.2 * int(rng.integers(7))
    edges = np.sort(rng.choice(np.arange(1, round(seconds * 10)), 3, replace=False)) / 10
    sound = np.zeros(round(seconds * 16_000), np.float32)
    events = []
    for label, start, end in zip(rng.permutation(list(TONES)), edges[::2], [edges[1], seconds], strict=True):
        first, last = round(start * 16_000), round(end * 16_000)
        sound[first:last] = sine(TONES[label], 5)[: last - first]
        events.append({"start": round(float(start), 3), "end": round(float(end), 3), "label": str(label)})
    write_media(folder / f"{name}.mp4", numbered(round(seconds * 15), 32, 32), fps=15, sound=sound)
    return events


@pytest.fixture(scope="module")
def events_store(tmp_path_factory):
    """A store of 36 training, 12 validation and 12 test clips with events; clip 5 has none, clip 7 unknown ones."""
    folder, rng, rows = tmp_path_factory.mktemp("events"), np.random.default_rng(0), []
    for number in range(60):
        events = make_clip(folder, number, rng)
        cell = {5: "[]", 7: None}.get(number, json.dumps(events))
        split = "train" if number < 36 else "val" if number < 48 else "test"
        rows.append({"clip_id": number, "video": f"{number}.mp4", "split": split, "tone": cell})
    corpus = read_corpus(write_manifest(folder / "corpus.csv", rows)).declare(f"tone:events@{RATE}")
    summary = validate(corpus, f"tone:events@{RATE}")
    spec = StoreSpec(ENCODER.features(), summary.tasks, summary.splits, 16, summary.digest)
    store = create_store(str(folder / "store"), spec)
    write_plan(store, corpus)
    for name in spec.shards():
        Extraction(store.uri, corpus, ENCODER, timeout=60, memory_gb=2).shard(name)
    isolated_encoder.cache_clear()
    return Store(store.uri), corpus


def test_the_index_holds_events_that_plain_arrow_reads(events_store):
    store, corpus = events_store
    table = ds.dataset(f"{store.uri}/index").to_table(columns=["clip_id", "label_tone"])
    assert table.schema.field("label_tone").type == EVENTS
    stored = dict(zip(table["clip_id"].to_pylist(), table["label_tone"].to_pylist(), strict=True))
    assert stored == {clip.clip_id: clip.labels["tone"] for clip in corpus.clips()}
    assert stored["5"] == [] and stored["7"] is None
    row = store.index("train").to_pylist()[0]
    assert store.read(row["shard"], row["offset"], row["nbytes"])["json"]["labels"] == {"tone": stored[row["clip_id"]]}


def test_verify_inspect_and_the_sheet_know_events(events_store):
    store, _ = events_store
    problems = []
    verify(store, problems.append)
    assert not problems
    report = inspect(store)["tasks"]["tone"]
    # 36 training clips, two of which have no event: each of the others has one of each tone.
    assert report["classes"]["low"] == report["classes"]["high"] == {"train": 34, "val": 12, "test": 12}
    assert (report["kind"], report["unlabelled"]) == ("events", 1)
    first, *_ = [row for row in choose(store, 60, 0, None) if row["clip_id"] == "5"]
    assert "tone none" in describe(first, store)


def test_the_loader_gives_every_bin_the_class_of_its_middle(events_store):
    store, corpus = events_store
    labels = {clip.clip_id: clip.labels["tone"] for clip in corpus.clips()}
    duration = dict(zip(*store.index().select(["clip_id", "duration"]).to_pydict().values(), strict=True))
    tasks = task_specs(store)
    assert tasks["tone"].classes == ("background", "high", "low") and tasks["tone"].rate == RATE
    loader = SplitLoader(store, "train", feature_specs(store), tasks, LoaderConfig(), batch_size=8)
    widths, counts = set(), np.zeros(3, dtype=np.int64)
    for batch in loader.batches(0):
        counts += np.bincount(batch.targets["tone"][batch.targets["tone"] >= 0], minlength=3)
        widths.add(batch.targets["tone"].shape[1])
        for clip_id, target in zip(batch.clip_ids, batch.targets["tone"], strict=True):
            bins = round(duration[clip_id] * RATE)
            assert (target[bins:] == -1).all()
            for number, value in enumerate(target[:bins].tolist()):
                at = (number + 0.5) / RATE
                events = [e["label"] for e in labels[clip_id] or () if e["start"] <= at < e["end"]]
                known = ["background", "high", "low"].index(events[0] if events else "background")
                assert value == (-1 if labels[clip_id] is None else known)
    assert len(widths) > 1 and loader.class_counts() == {"tone": counts.tolist()}


def majority(learner, split):
    targets = torch.cat([batch.targets["tone"].flatten() for batch in learner.loader(split).batches(0)])
    return torch.bincount(targets[targets >= 0]).max().item() / (targets >= 0).sum().item()


@pytest.mark.parametrize("architecture", ["clcr", "concat", "audio"])
def test_models_learn_when_a_tone_sounds(events_store, architecture):
    store, _ = events_store
    learner = Learner(store.uri, recipe(architecture, epochs=12, lr=5e-3))
    history = [epoch.metrics for epoch in learner.fit()]
    metrics, predictions, diagnostics = learner.test()
    assert metrics["tone"]["accuracy"] > majority(learner, "test") + 0.2
    assert metrics["tone"]["n"] == (predictions["tone"].targets >= 0).sum() > 12
    assert {"val/accuracy", "val/macro_f1", "train/loss_tone"} <= set(history[0])
    if architecture == "clcr":
        assert sum(diagnostics[f"diag/omega/{level}"] for level in range(3)) == pytest.approx(1, abs=1e-5)


def outcome(uri, rank=0, world=1):
    model, stem = ModelConfig(width=16, heads=2, dropout=0.0), StemConfig(shift=0.0)  # nothing random
    given = replace(recipe(epochs=2), network=CLCRConfig(model, stem))
    learner = Learner(uri, given, rank, world)
    history = losses([epoch.metrics for epoch in learner.fit()])
    _, predictions, _ = learner.test()
    tone = predictions["tone"]
    rows = zip(tone.clip_ids, tone.targets, tone.logits, strict=True)
    return history, {clip_id: (target[target >= 0].tolist(), row[target >= 0]) for clip_id, target, row in rows}


def test_two_workers_with_different_numbers_of_bins_learn_and_predict_what_one_does(events_store):
    store, _ = events_store
    history, predictions = outcome(store.uri)
    for theirs, predicted in on_two_workers(outcome, store.uri):
        for one, two in zip(history, theirs, strict=True):
            for name in one:
                assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-3), name
        assert predicted.keys() == predictions.keys()
        for clip_id, (targets, logits) in predictions.items():
            assert predicted[clip_id][0] == targets
            assert torch.allclose(predicted[clip_id][1], logits, atol=2e-2)
