"""Published features, texts and memes become stores: each clip is there, to the value, and what is dirty is bounded."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mediafiles import write_manifest

from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.decode.specs import VectorSpec, VideoSpec
from features.extractor import Extraction, isolated_encoder
from features.store import StoreSpec
from features.store.plan import write_plan
from features.store.shards import create_store
from features.store.verify import verify
from pipelines.extract import ExtractConfig, plan_encoders

DATA = Path(__file__).parents[2].parent / "shared/data"
SPLITS = ("train", "val", "test")
pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")]


def extracted(folder, rows, tasks, **options):
    """A store of these rows, made by the extract job's own parts without its cluster; every value by clip and name."""
    corpus = read_corpus(write_manifest(folder / "corpus.csv", rows))
    report = validate(corpus, tasks)
    encoder = plan_encoders(ExtractConfig("", "", **options), corpus, report.sources)
    store = create_store(
        str(folder / "store"), StoreSpec(encoder.features(), report.tasks, report.splits, 500, report.digest)
    )
    write_plan(store, corpus)
    work = Extraction(store.uri, corpus, encoder, timeout=60, memory_gb=2)
    for name in store.spec.shards():
        work.shard(name)
    isolated_encoder.cache_clear()
    assert verify(store, pytest.fail).problems == 0
    index = store.index().to_pylist()
    return store, {row["clip_id"]: store.read(row["shard"], row["offset"], row["nbytes"]) for row in index}


def of_splits(path, names):
    """Rows of an archive with arrays `{name}_{split}`, of clips without names."""
    archive = np.load(path)
    for split in SPLITS:
        for n in range(len(archive[f"y_{split}"])):
            vectors = {f"{name}_features": f"{path}#{name}_{split}[{n}]" for name in names}
            yield {"clip_id": f"{split} {n}", **vectors, "split": split, "label": archive[f"y_{split}"][n].mean()}


def test_ravdess_by_groups_of_actors(tmp_path):
    path = DATA / "ravdess/ravdess.npz"
    archive = np.load(path)
    rows = [
        {
            "clip_id": clip_id,
            "face_features": f"{path}#action_units[{n}]",
            "voice_features": f"{path}#mfcc[{n}]",
            "split": ("test", "val", "train", "train", "train")[(actor - 1) % 5],
            "fold": (actor - 1) % 5,
            "group": f"actor {actor}",
            "emotion": emotion,
        }
        for n, (clip_id, actor, emotion) in enumerate(
            zip(archive["clip_id"], archive["actor"].tolist(), archive["emotion"].tolist(), strict=True)
        )
    ]
    store, samples = extracted(tmp_path, rows, "emotion")
    assert len(samples) == 1200 and store.folds() == [0, 1, 2, 3, 4]
    for n, clip_id in enumerate(archive["clip_id"]):
        np.testing.assert_array_equal(samples[clip_id]["face"], archive["action_units"][n : n + 1])
        np.testing.assert_array_equal(samples[clip_id]["voice"], archive["mfcc"][n : n + 1])


def test_pom_is_sequences_with_an_order_and_no_seconds(tmp_path):
    path = DATA / "pom/pom.npz"
    store, samples = extracted(tmp_path, list(of_splits(path, ["audio", "video"])), "label:regression")
    assert store.spec.splits == {"train": 600, "val": 100, "test": 203} and len(samples) == 903
    assert {name: (f.shape, f.rate) for name, f in store.spec.features.items()} == {
        "audio": ((43,), 0),
        "video": ((41,), 0),
    }
    np.testing.assert_array_equal(samples["val 7"]["video"], np.load(path)["video_val"][7])


def test_mmmos_broken_values_are_bounded_and_its_padding_is_left_out(tmp_path):
    path = DATA / "mmmo/mmmo.npz"
    options = {"vectors": VectorSpec(limit=254.99, trim=True)}
    store, samples = extracted(tmp_path, list(of_splits(path, ["audio", "video"])), "label:regression", **options)
    assert len(samples) == 340 and all(np.abs(sample["audio"]).max() < 255 for sample in samples.values())
    shares = store.index()["broken_values"].to_pylist()
    held = np.concatenate([np.load(path)[f"audio_{split}"] for split in SPLITS])
    assert sum(share > 0 for share in shares) == (np.abs(held) > 254.99).any((1, 2)).sum() and max(shares) < 0.02
    lengths = Counter(len(sample["audio"]) for sample in samples.values())
    assert (
        max(lengths) == 20
        and min(lengths) < 20
        and all(s["audio"][0].any() and s["audio"][-1].any() for s in samples.values())
    )


def test_mosis_texts_are_encoded_anew_beside_its_acoustics(tmp_path):
    with open(DATA / "mosi/segments.csv") as file:
        segments = list(csv.DictReader(file))
    archive = np.load(DATA / "mosi/audio.npz")
    places = {clip_id: n for n, clip_id in enumerate(archive["clip_id"])}
    assert Counter(row["split"] for row in segments) == {"train": 1284, "val": 229, "test": 686}
    rows = [
        {**row, "audio_features": f"{DATA}/mosi/audio.npz#audio[{places[row['clip_id']]}]"}
        for split in SPLITS
        for row in [row for row in segments if row["split"] == split][:40]
    ]
    store, samples = extracted(tmp_path, rows, "sentiment:sentiment")
    assert len(samples) == 120 and store.spec.features["text"].shape == (3, 384)
    for row in rows:
        sample = samples[row["clip_id"]]
        words = len(row["text"].split())
        assert len(sample["text"]) >= min(words + 2, 128) and np.isfinite(sample["text"]).all()
        np.testing.assert_array_equal(sample["audio"][0], archive["audio"][places[row["clip_id"]]])


def test_memes_are_regions_and_words(tmp_path):
    with open(DATA / "semeval_memes/corpus.csv", newline="") as file:
        memes = list(csv.DictReader(file))
    assert Counter(row["split"] for row in memes) == {"train": 687, "val": 63, "test": 200}
    rows = [
        {"clip_id": row["clip_id"], "image": str(DATA / "semeval_memes" / row["image"]), "text": row["text"],
         "split": split, "smears": row["smears"]}
        for split in SPLITS
        for row in [row for row in memes if row["split"] == split][:40]
    ]  # fmt: skip
    store, samples = extracted(tmp_path, rows, "smears:classification")
    assert len(samples) == 120 and not len(store.failures())
    assert all(len(sample["image"]) == 16 and len(sample["text"]) > 2 for sample in samples.values())


def test_speakers_faces_are_followed(tmp_path):
    with open(DATA / "grid/corpus.csv", newline="") as file:
        clips = list(csv.DictReader(file))
    rows = [
        {"clip_id": row["clip_id"], "video": str(DATA / "grid" / row["video"]), "split": split, "color": row["color"]}
        for split in SPLITS
        for row in [row for row in clips if row["split"] == split][:2]
    ]
    options = {"modalities": ("video",), "video": VideoSpec(fps=5, size=48, crop="face")}
    store, samples = extracted(tmp_path, rows, "color", **options)
    assert {sample["video"].shape for sample in samples.values()} == {(15, 48, 48, 3)}
    assert store.index()["face_found"].to_pylist() == [1.0] * 6
