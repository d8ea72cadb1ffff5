"""The extract job over every kind of input at once: what is stored, what fails by name, what models learn from."""

import numpy as np
import pytest
import ray
import torch
from inprocess import run_extract
from mediafiles import numbered, sine, write_manifest, write_media
from PIL import Image
from storefiles import LABELS, make_clips, make_spec

from clcr.training import OptimConfig
from features.corpus.manifest import read_corpus
from features.decode.clip import encode_clip
from features.decode.specs import EncoderSpec, VectorSpec
from features.errors import MediaError, StoreError
from features.store import Store
from features.store.inspect import inspect
from features.store.samples import Sample, pack
from features.store.shards import ShardWriter, create_store
from features.store.sheet import choose, contact_sheet, write_figure
from features.store.spec import Feature
from features.store.verify import verify
from pipelines.common.cluster import start_ray
from pipelines.evaluation.strips import alpha_strips
from pipelines.explain import fold_of, mean_weights
from pipelines.extract import summarize
from pipelines.training.learner import Learner, Recipe
from pipelines.training.loading import LoaderConfig

ROWS = 12
VALUES = {"vectors.rates": "face=10", "vectors.dtype": "float16", "vectors.limit": 50, "vectors.max-broken": 0.2,
          "image.size": 16, "image.grid": 2, "text.max-tokens": 6, "text.layers": "1,3,6", "video.size": 32,
          "video.fps": 5, "tasks": "label", "shard-rows": 6, "max-failed": 0.3}  # fmt: skip
OPTIONS = ["--vectors.trim", *(f"--{name}={value}" for name, value in VALUES.items())]


@pytest.fixture(scope="module")
def folder(media, tmp_path_factory):
    """Twelve clips with a video, an image, a text, a file of their own and a row of an archive; three are broken."""
    folder, generator = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    rows = []
    for n in range(ROWS):
        face = generator.normal(size=(8, 5)).astype(np.float32) + 1
        face[:2], face[3, 4] = 0, -255
        np.save(folder / f"face{n}.npy", face if n != 1 else face * np.nan)
        Image.new("RGB", (20, 20), (n, 2 * n, 3 * n)).save(folder / f"{n}.png")
        rows.append(
            {
                "clip_id": n,
                "video": str(media / "silent.mp4"),
                "image": f"{n}.png" if n != 2 else "gone.png",
                "text": "a good film" if n % 2 else "a bad film",
                "face_features": f"face{n}.npy",
                "voice_features": f"voices.npz#mean[{n}]" if n != 3 else "",
                "split": ("train", "train", "val", "test")[n % 4],
                "fold": n % 4,
                "group": f"speaker {n}",
                "label": "ab"[n % 2],
            }
        )
    np.save(folder / "face5.npy", np.zeros((2, 4), np.float32))  # one number too few
    np.savez(folder / "voices.npz", mean=generator.normal(size=(ROWS, 7)))
    write_manifest(folder / "corpus.csv", rows)
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), folder / "resnet.pth")
    return folder


@pytest.fixture(scope="module")
def store(folder, no_shared_ray):
    """The store of all of it, made by one run of the job."""
    start_ray(address="local", num_cpus=1, log_to_driver=False)
    try:
        weights = ["--video.encoder", "resnet18", "--video.weights", str(folder / "resnet.pth")]
        assert run_extract("--corpus", folder / "corpus.csv", "--store", folder / "store", *OPTIONS, *weights) == 0
    finally:
        ray.shutdown()
    return Store(str(folder / "store"))


@pytest.mark.slow
def test_every_kind_of_input_is_stored_as_the_options_say(store, folder):
    shapes = {name: (feature.shape, feature.dtype, feature.rate) for name, feature in store.spec.features.items()}
    assert shapes == {
        "video": ((512,), "float16", 5.0),
        "image": ((3 * 8 * 8,), "uint8", 0.0),
        "text": ((3, 384), "float16", 0.0),
        "face": ((5,), "float16", 10.0),
        "voice": ((7,), "float16", 0.0),
    }
    rows = {row["clip_id"]: row for row in store.index().to_pylist()}
    assert rows.keys() == {str(n) for n in range(ROWS)} - {"1", "2", "5"}
    voices = np.load(folder / "voices.npz")["mean"].astype(np.float16)
    for clip_id, row in rows.items():
        n, sample = int(clip_id), store.read(row["shard"], row["offset"], row["nbytes"])
        assert sample.keys() == {"json", "video", "image", "text", "face"} | ({"voice"} if n != 3 else set())
        assert (len(sample["video"]), len(sample["image"]), len(sample["text"]), len(sample["face"])) == (5, 4, 5, 6)
        assert (sample["image"].reshape(-1, 3) == (n, 2 * n, 3 * n)).all()
        assert n == 3 or (sample["voice"] == voices[n]).all()
        assert sample["face"][1, 4] == pytest.approx(sample["face"][[0, 2, 3, 4, 5], 4].mean(), abs=2e-3)
        assert row["broken_values"] == pytest.approx(1 / 30) and row["duration"] == 1.0
        assert (row["uri_image"], row["uri_face_features"], row["uri_text"]) == (f"{n}.png", f"face{n}.npy", None)
        assert (row["fold"], row["group"]) == (n % 4, f"speaker {n}")


@pytest.mark.slow
def test_what_cannot_be_used_says_why_and_names_no_machine(store, folder):
    failures = {row["clip_id"]: (row["stage"], row["message"]) for row in store.failures().to_pylist()}
    assert failures == {
        "1": ("quality", "face1.npy: 1 of the values are broken, above --vectors.max-broken 0.2"),
        "2": ("open", "gone.png does not exist; check the manifest's path"),
        "5": ("vectors", "face5.npy: a token has shape (4,), the corpus (5,)"),
    }
    assert str(folder) not in (folder / "store/store.json").read_text()


def test_the_last_lines_say_of_each_modality_what_is_there_and_what_to_do(tmp_path, capsys):
    """As after a corpus of 8 clips without sound, with a skeleton that has no rate, in 5 of them with a face."""
    features = {
        "video": Feature((4, 4, 3), "uint8", 12.5, {"name": "frames"}),
        "audio": Feature((8,), "float16", 50.0, {"name": "log_mel"}),
        "skeleton": Feature((6,), "float32", 0.0, {"name": "vectors"}),
        "face": Feature((2,), "float32", 10.0, {"name": "vectors"}),
    }
    clips = make_clips(8)
    spec = make_spec(clips, shard_rows=8, features=features)
    store = create_store(str(tmp_path), spec)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        for n, clip in enumerate(clips):
            values = {"video": np.zeros((3, 4, 4, 3), np.uint8), "skeleton": np.ones((9, 6), np.float32)}
            values |= {"face": np.ones((2, 2), np.float32)} if n < 5 else {}
            writer.add(clip, pack(clip, Sample(values, 0.24)))
        writer.commit()
    summarize(store, max_failed=0)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 8 rows = 8 indexed + 0 failed",
        "  video: in 8 of 8 clips, 12.5 tokens per second of uint8 [4, 4, 3]",
        "  audio: in 0 of 8 clips: leave it out with --modalities video,skeleton,face",
        "  skeleton: in 8 of 8 clips, tokens without time of float32 [6]; --vectors.rates skeleton=30 gives them 30 "
        "per second",
        "  face: in 5 of 8 clips, 10 tokens per second of float32 [2]",
    ]


@pytest.mark.slow
def test_the_store_verifies_and_is_shown(store):
    assert verify(store, pytest.fail).problems == 0
    report = inspect(store)
    assert report["quality"]["broken_values"]["count"] == 9 and report["modalities"]["voice"]["absent"] == 1
    assert contact_sheet(store, clips=2).axes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["clcr", "concat", "mult", "text", "image", "face"])
def test_models_learn_from_it(store, model, tmp_path):
    recipe = Recipe(architecture=model, optim=OptimConfig(epochs=1, batch_size=4))
    learner = Learner(store.uri, recipe)
    (epoch,) = learner.fit()
    assert np.isfinite(epoch.metrics["val/score"])
    if model == "clcr":  # what has no time is drawn all the same
        trained = learner.trainer.model.eval()
        figure = contact_sheet(store, clips=2, strips=alpha_strips(trained))
        write_figure(str(tmp_path / "alpha.png"), figure)
        omega, _ = mean_weights(trained, store, fold=2)
        assert {len(weights) for weights in omega.values()} == {len(store.index("test", fold=2))}


def test_events_in_clips_of_which_nothing_says_how_long_they_are_are_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((10, 4), np.float32))
    event = '[{"start": 3, "end": 8, "label": "dog"}]'
    rows = [{"clip_id": s, "smell_features": "a.npy", "split": s, "what": event} for s in ("train", "val", "test")]
    given = ["--corpus", write_manifest(tmp_path / "corpus.csv", rows), "--store", tmp_path / "store", "--dry-run"]
    assert run_extract(*given) == 1
    said = capsys.readouterr().err
    assert "--tasks what: every clip of" in said and "has events, and nothing says how long it is" in said
    assert run_extract(*given, "--vectors.rates", "smell=1") == 0
    write_manifest(tmp_path / "corpus.csv", [row | {"end": 10 if row["split"] == "train" else None} for row in rows])
    assert run_extract(*given) == 0
    corpus = read_corpus(str(tmp_path / "corpus.csv"))
    spec = EncoderSpec(
        None, None, vectors=VectorSpec(), declared={"smell": Feature((4,), "float32", 0.0, {"name": "vectors"})}
    )
    timed, untimed, _ = corpus.clips()
    assert encode_clip(timed, timed.media(corpus.folder), spec).duration == 10
    with pytest.raises(MediaError, match="val: has events, and nothing says how long it is: give"):
        encode_clip(untimed, untimed.media(corpus.folder), spec)


def test_the_fold_of_a_run_is_in_its_folder(tmp_path):
    assert fold_of(str(tmp_path)) is None
    (tmp_path / "config.yaml").write_text("epochs: 3\nloader.fold: 0\n")
    assert fold_of(str(tmp_path)) == 0


@pytest.mark.slow
def test_each_fold_is_tested_once_and_never_trained_on(store):
    everything = set(store.index()["clip_id"].to_pylist())
    tested = []
    for fold in store.folds():
        parts = {split: store.index(split, ["clip_id", "fold"], fold) for split in ("train", "val", "test")}
        assert set(parts["test"]["fold"].to_pylist()) == {fold}
        assert set(parts["val"]["fold"].to_pylist()) == {(fold + 1) % 4}
        assert set().union(*(part["clip_id"].to_pylist() for part in parts.values())) == everything
        assert sum(map(len, parts.values())) == len(everything)
        tested += parts["test"]["clip_id"].to_pylist()
    assert sorted(tested) == sorted(everything)
    recipe = Recipe(architecture="text", optim=OptimConfig(epochs=1, batch_size=4), loader=LoaderConfig(fold=2))
    learner = Learner(store.uri, recipe)
    batches = {split: learner.loader(split).batches(0) for split in ("train", "val", "test")}
    splits = {split: [clip for batch in found for clip in batch.clip_ids] for split, found in batches.items()}
    assert {split: {int(clip) % 4 for clip in clips} for split, clips in splits.items()} == {
        "train": {0, 1}, "val": {3}, "test": {2}
    }  # fmt: skip
    drawn = choose(store, clips=9, seed=0, split="test", fold=2)
    assert drawn and {(int(row["clip_id"]) % 4, row["split"]) for row in drawn} == {(2, "test")}
    with pytest.raises(StoreError, match="has no fold 7; it has 0, 1, 2, 3"):
        store.index("test", fold=7)


MISTAKES = {
    "a modality without a source": (["--modalities", "smell"], "--modalities smell: "),
    "a rate of nothing": (["--vectors.rates", "smell=3"], "no column smell_features with values"),
    "a rate that is none": (["--vectors.rates", "face"], "write NAME=RATE"),
    "an encoder that is nowhere": (["--text.encoder", "./nowhere"], "--text.encoder"),
    "a network without weights": (["--image.encoder", "resnet18"], "--image.weights belong together"),
    "weights that are nowhere": (["--image.encoder=resnet18", "--image.weights=face0.pth"], "there is no such file"),
    "a grid that does not divide": (["--image.grid", "5"], "--image.size 64 is not a multiple of --image.grid 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_options_is_one_line(folder, tmp_path, capsys, mistake):
    options, named = MISTAKES[mistake]
    code = run_extract("--corpus", folder / "corpus.csv", "--store", tmp_path / "store", "--dry-run", *options)
    error = capsys.readouterr().err
    assert code != 0 and error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "store").exists()


def test_a_plan_takes_the_modalities_that_are_asked_for(folder, tmp_path, capsys):
    assert (
        run_extract("--corpus", folder / "corpus.csv", "--store", tmp_path, "--dry-run", "--modalities", "text,voice")
        == 0
    )
    out = capsys.readouterr().out
    assert "text: tokens without time of float16 [3, 384]" in out and "voice: tokens without time of float32 [7]" in out
    assert "video:" not in out and "face:" not in out


def test_a_folder_of_class_folders_may_hold_images_alone(tmp_path, capsys):
    for n in range(30):
        path = tmp_path / "memes" / ("funny", "sad")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    assert run_extract("--corpus", tmp_path / "memes", "--store", tmp_path / "store", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "image: tokens without time of uint8 [768]" in out and "video:" not in out and "audio:" not in out


def test_sound_that_no_video_has_is_left_out_with_a_word_unless_it_is_asked_for(tmp_path, capsys):
    write_media(tmp_path / "silent.mp4", numbered(5))
    write_media(tmp_path / "loud.mp4", numbered(5), sound=sine(440, 0.2))
    for names, options, kept in (
        (("silent", "silent", "silent"), (), False),
        (("silent", "silent", "silent"), ("--modalities", "video,audio"), True),
        (("silent", "silent", "loud"), (), True),
        (("silent", "silent", "lost"), (), True),
    ):
        splits = ("train", "val", "test")
        rows = [
            {"clip_id": str(n), "video": f"{name}.mp4", "split": splits[n], "label": "ab"[n % 2]}
            for n, name in enumerate(names)
        ]
        corpus = write_manifest(tmp_path / "corpus.csv", rows)
        assert run_extract("--corpus", corpus, "--store", tmp_path / "store", "--dry-run", *options) == 0
        out = capsys.readouterr().out
        assert ("audio:" in out) is kept and ("none of the 1 videos has sound" in out) is not kept


@pytest.mark.slow
def test_a_store_that_was_begun_without_sound_is_resumed(tmp_path, capsys, shared_ray):
    write_media(tmp_path / "silent.mp4", numbered(5))
    rows = [{"clip_id": str(n), "video": "silent.mp4", "split": s} for n, s in enumerate(("train", "val", "test"))]
    asked = ("--corpus", write_manifest(tmp_path / "corpus.csv", rows), "--store", tmp_path / "store", "--unlabelled")
    assert run_extract(*asked) == 0 == run_extract(*asked), capsys.readouterr().err
    assert Store(str(tmp_path / "store")).spec.features.keys() == {"video"}
