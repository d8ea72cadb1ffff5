"""Raw clips: predicted as if they had gone through a store, without Ray where they are few."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from inprocess import run_extract
from mediafiles import numbered, sine, write_manifest, write_media
from models import small_model
from storefiles import LABELS, TASKS

import clcr
from features.corpus.manifest import Clip
from features.corpus.tasks import Task
from features.decode.clip import encode_clip
from features.decode.like import spec_of_store
from features.decode.specs import AudioSpec, EncoderSpec, ImageSpec, VectorSpec, VideoSpec
from features.errors import FeaturesError
from features.store import Feature, Store, StoreSpec
from features.store.quality import QualitySpec
from features.store.samples import pack
from features.store.shards import ShardWriter, create_store
from pipelines.answering import corpus as raw
from pipelines.common.cli import run_job
from pipelines.predict import PredictConfig, predict, predict_shard
from pipelines.training.trained import open_model

ENCODER = EncoderSpec(VideoSpec(fps=5, size=16, crop=(0.0, 0.1, 1.0, 0.9)), AudioSpec(mels=16), QualitySpec(0.2))
GIVEN = Feature(
    (4,), "float32", 50.0, {"name": "vectors", "dtype": "float32", "limit": 0.0, "max_broken": 0.1, "trim": True}
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, no_shared_ray):
    """A folder of clips, the store of them as the real encoder makes it, and a model of that store."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "clips").mkdir()
    write_media(folder / "clips" / "loud.mp4", numbered(25), sound=sine(440, 1.0))
    write_media(folder / "clips" / "silent.mp4", numbered(25) * 2)
    clips = [
        Clip(
            f"{n}",
            f"{name}.mp4",
            None,
            None,
            None,
            None,
            None,
            split,
            None,
            None,
            {"label": "ab"[n % 2], "mood": n / 10},
        )
        for n, (name, split) in enumerate([("loud", "train"), ("silent", "train"), ("loud", "val"), ("silent", "test")])
    ]
    spec = StoreSpec(ENCODER.features(), TASKS, {"train": 2, "val": 1, "test": 1}, 4, "digest")
    create_store(str(folder / "store"), spec)
    for split in ("train", "val", "test"):
        with ShardWriter(str(folder / "store"), f"{split}-000000", spec, LABELS) as writer:
            for clip in clips:
                if clip.split == split:
                    writer.add(clip, pack(clip, encode_clip(clip, clip.media(str(folder / "clips")), ENCODER)))
            writer.commit()
    store = Store(str(folder / "store"))
    small_model(folder / "run" / "model", store, "clcr")
    return folder, store


def job(*options):
    before, sys.argv = sys.argv, ["predict.py", *map(str, options)]
    try:
        return run_job(predict, PredictConfig, "")
    finally:
        sys.argv = before


@pytest.mark.parametrize(
    "spec",
    [
        ENCODER,
        EncoderSpec(VideoSpec(sampling="keyframes"), None),
        EncoderSpec(VideoSpec(crop="face"), None),
        EncoderSpec(None, AudioSpec(hop=0.01, window=0.02), QualitySpec()),
        EncoderSpec(None, None, image=ImageSpec(size=32, grid=2)),
        EncoderSpec(VideoSpec(encoder="resnet18", weights="IMAGENET1K_V1"), None),
        EncoderSpec(None, None, vectors=VectorSpec(("face=50",), trim=True), declared={"face": GIVEN}),
    ],
    ids=["crop", "keyframes", "face", "sound", "image", "resnet18", "vectors"],
)
def test_the_options_of_a_store_are_read_back_from_its_spec(spec):
    stored = StoreSpec(spec.features(), TASKS, {}, 4, "x")
    back = StoreSpec.from_dict(json.loads(json.dumps(stored.to_dict())))  # as store.json has them
    again = StoreSpec(spec_of_store(back.features).features(), TASKS, {}, 4, "x")
    assert stored.difference(again) == []


def test_what_cannot_be_repeated_is_named(tmp_path):
    with pytest.raises(FeaturesError, match="feature smell was made by 'nose', which this version cannot repeat"):
        spec_of_store({"smell": Feature((3,), "uint8", 1.0, {"name": "nose"})})
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    spec = EncoderSpec(VideoSpec(encoder="resnet18", weights=str(weights)), None)
    with pytest.raises(FeaturesError, match=r"weights from a file \(sha256 .*: name that file with --video.weights"):
        spec_of_store(spec.features())
    assert spec_of_store(spec.features(), {"video": str(weights)}).video.weights == str(weights)
    (tmp_path / "other.pth").write_bytes(b"2")
    with pytest.raises(
        FeaturesError, match=r"feature video: weights would be .*name the right one with --video.weights"
    ):
        spec_of_store(spec.features(), {"video": str(tmp_path / "other.pth")})


def test_one_clip_is_answered_as_its_store_is_and_without_ray(trained, capsys):
    folder, store = trained
    assert not ray.is_initialized()
    assert job("--model", folder / "run", "--corpus", folder / "clips" / "loud.mp4") == 0
    assert not ray.is_initialized()
    said = capsys.readouterr().out
    assert "model loaded in" in said and "decoder ready in" in said and "answered in" in said
    answer = json.loads(said[said.index("{") : said.rindex("}") + 1])
    wanted = predict_shard(open_model("--model", str(folder / "run")).model, store, "val-000000", 4).to_pylist()[0]
    assert answer["clip_id"] == "loud" and answer["label"] == wanted["label"]
    assert answer["label_probabilities"] == pytest.approx(wanted["label_probabilities"], abs=1e-5)
    assert answer["mood"] == pytest.approx(wanted["mood"], abs=1e-5)


def test_a_manifest_without_splits_and_a_flat_folder_are_answered_and_bad_clips_cost_themselves(
    trained, tmp_path, capsys
):
    folder, _ = trained
    (folder / "clips" / "broken.mp4").write_bytes(b"no video at all")
    try:
        rows = [{"clip_id": f"x{n}", "video": f"{name}.mp4"} for n, name in enumerate(["silent", "broken", "loud"])]
        manifest = write_manifest(folder / "clips" / "new.csv", rows)
        assert job("--model", folder / "run", "--corpus", manifest, "--out", tmp_path / "a") == 0
        assert job("--model", folder / "run", "--corpus", folder / "clips", "--out", tmp_path / "b") == 0
        assert "x1: MediaError" in capsys.readouterr().out
        one, other = (pq.read_table(tmp_path / name).to_pylist() for name in "ab")
        assert [row["clip_id"] for row in one] == ["x0", "x2"] and [r["clip_id"] for r in other] == ["loud", "silent"]
        assert one[1]["mood"] == other[0]["mood"] and one[0]["label_probability"] == other[1]["label_probability"]
        assert pq.read_table(tmp_path / "b" / "_failures" / "clips.parquet")["clip_id"].to_pylist() == ["broken"]
        assert job("--model", folder / "run", "--corpus", folder / "clips" / "broken.mp4") == 1
        assert "no clip can be used: MediaError" in capsys.readouterr().err
    finally:
        (folder / "clips" / "broken.mp4").unlink()
    assert job("--model", folder / "run", "--corpus", folder / "clips", "--out", tmp_path / "b") == 0
    assert not (tmp_path / "b" / "_failures" / "clips.parquet").exists()


def test_what_is_no_corpus_of_clips_is_one_line(trained, tmp_path, capsys):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").touch()
    for corpus, said in (
        (tmp_path / "nowhere", "does not exist: name a media file, a folder of them"),
        (tmp_path / "empty", "has no media file (mp4"),
        (tmp_path / "notes.doc", "not a media file that is known (mp4"),
    ):
        assert job("--model", folder / "run", "--corpus", corpus) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]
    assert job("--model", folder / "run", "--out", tmp_path / "o") == 2
    assert "--store or --corpus: name what to predict" in capsys.readouterr().err
    assert job("--model", folder / "run", "--corpus", "c", "--split", "test") == 2
    assert "--split test belongs to --store" in capsys.readouterr().err
    assert job("--model", folder / "run", "--store", "s") == 2
    assert "--out" in capsys.readouterr().err


def test_extract_like_a_store_or_a_model_plans_the_same_features(trained, tmp_path, capsys):
    folder, store = trained
    manifest = write_manifest(folder / "clips" / "like.csv", [{"clip_id": "n", "video": "loud.mp4", "split": "test"}])
    common = ("--corpus", manifest, "--store", tmp_path / "new", "--unlabelled", "--dry-run")
    for like in (store.uri, folder / "run", folder / "run" / "model"):
        assert run_extract(*common, "--like", like) == 0
        said = capsys.readouterr().out
        assert "video: 5 tokens per second of uint8 [16, 16, 3]" in said and "audio: 50 tokens per second" in said
    assert run_extract(*common, "--like", folder / "run", "--video.size", "32") == 2
    assert "--video.size: --like" in capsys.readouterr().err
    assert run_extract(*common, "--like", tmp_path) == 1
    assert "is neither a feature store nor a trained model" in capsys.readouterr().err


@pytest.mark.slow
def test_many_clips_go_through_a_store_like_the_models_and_give_the_same_answers(trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr(raw, "HERE", 1)
    rows = [{"clip_id": "quiet", "video": "silent.mp4", "audio": ""}]
    rows += [{"clip_id": name, "video": f"{name}.mp4", "audio": f"{name}.mp4"} for name in ("silent", "loud")]
    manifest = write_manifest(folder / "clips" / "own_sound.csv", rows)
    config = PredictConfig(str(folder / "run"), out=str(tmp_path / "own"), corpus=manifest)
    predict(config)  # a source that the first clip lacks is read of the others
    planned = pq.read_table(tmp_path / "own" / "_corpus" / "corpus.parquet")
    assert [Path(uri).name if uri else None for uri in planned["audio"].to_pylist()] == [None, "silent.mp4", "loud.mp4"]
    Path(manifest).unlink()
    config = PredictConfig(str(folder / "run"), out=str(tmp_path / "out"), corpus=str(folder / "clips"))
    predict(config)
    predict(config)  # again: nothing is left to do
    rows = {row["clip_id"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    monkeypatch.undo()
    predict(PredictConfig(str(folder / "run"), out=str(tmp_path / "here"), corpus=str(folder / "clips")))
    for row in pq.read_table(tmp_path / "here").to_pylist():
        assert rows[row["clip_id"]]["mood"] == pytest.approx(row["mood"], abs=1e-5)


def test_a_model_of_events_answers_them_for_raw_clips(trained, tmp_path):
    folder, store = trained
    word = clcr.TaskSpec("word", "events", ("background", "a"), 4.0)
    small_model(tmp_path, store, tasks={"word": word})
    answer = raw.ClipAnswerer(open_model("--model", str(tmp_path))).answer(
        raw.clip_of_file(str(folder / "clips" / "silent.mp4"))
    )
    assert isinstance(answer.values["word"], list) and torch.get_num_threads() > 0
    assert Task("word", "events", word.classes, 4.0).encode_events(answer.values["word"], 2.0).shape == (8,)
