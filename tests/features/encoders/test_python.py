"""An encoder of one's own: README's ten lines make a store that models learn from, and mistakes are one line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from inprocess import run_extract
from mediafiles import numbered, sine, write_manifest, write_media

from clcr.training import OptimConfig
from features.decode.specs import AudioSpec, VideoSpec
from features.encoders import Asked, find_encoder
from features.encoders.registry import identity_of
from features.errors import FeaturesError
from features.store import Store
from pipelines.common.cluster import start_ray
from pipelines.extract import ExtractConfig
from pipelines.training.learner import Learner, Recipe
from pipelines.training.like import with_places

README = Path(__file__).parents[3] / "features" / "README.md"
OWN = '''
import numpy as np
from features.encoders import Encoder

class Loudness(Encoder):
    """How loud each twentieth of a second is, seen with as much around it; a low and a high layer."""
    identity = {"version": 3}
    shape, sample_rate, window, hop, batch = (2, 1), 8000, 800, 400, 4
    def __call__(self, sound):
        assert sound.dtype == np.float32
        return np.stack([np.abs(sound).mean(1), np.abs(sound).max(1)], 1)[:, :, None]

class Letters(Encoder):
    identity, shape = {"version": 1}, (1,)
    def __call__(self, text):
        return np.array([[ord(letter)] for letter in text], float)

class Regions(Encoder):
    identity, shape, tokens, size = {"version": 1}, (3,), 2, 8
    def __call__(self, pictures):
        return np.stack([pictures[:, :4].mean((1, 2)), pictures[:, 4:].mean((1, 2))], 1)

class Flat(Encoder):
    def __call__(self, windows): ...

class Mute(Encoder):
    shape = (1,)

def fails(): raise RuntimeError("no luck")
def other(): return 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to start jobs from, with README's encoder and others."""
    (tmp_path / "colours.py").write_text(readme_encoder())
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    find_encoder.cache_clear()
    for name in ("colours", "own"):
        sys.modules.pop(name, None)


def readme_encoder():
    """The block of README that defines an encoder."""
    return next(b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "(Encoder)" in b)


def corpus(folder, count=9):
    """Clips whose brightness and pitch are their class."""
    rows = []
    for n in range(count):
        frames = [np.full((48, 64, 3), 60 + 100 * (n % 2), np.uint8)] * 12
        write_media(folder / f"{n}.mp4", frames, sound=sine(300, 0.5, gain=0.2 + 0.3 * (n % 2)))
        text = "good" if n % 2 else "bad"
        split = ("train", "train", "train", "train", "val", "test")[n % 6]
        rows.append({"clip_id": n, "video": f"{n}.mp4", "text": text, "split": split, "label": "ab"[n % 2]})
    return write_manifest(folder / "corpus.csv", rows)


@pytest.mark.slow
def test_readmes_encoder_is_extracted_and_learned_from(folder, no_shared_ray):
    options = ["--video.encoder", "python:colours:Colours", "--video.size", "16", "--shard-rows", "2"]
    options += ["--audio.encoder", "python:own:Loudness", "--text.encoder", "python:own:Letters"]
    manifest = corpus(folder)
    start_ray(address="local", num_cpus=2, log_to_driver=False)
    try:
        assert run_extract("--corpus", manifest, "--store", folder / "store", *options) == 0
        assert run_extract("--corpus", manifest, "--store", folder / "like", "--like", folder / "store") == 0
        (folder / "colours.py").write_text(readme_encoder() + "# changed\n")
        find_encoder.cache_clear()
        assert run_extract("--corpus", manifest, "--store", folder / "store", *options) == 1
    finally:
        ray.shutdown()
    store, like = Store(str(folder / "store")), Store(str(folder / "like"))
    shapes = {name: (feature.shape, feature.dtype, feature.rate) for name, feature in store.spec.features.items()}
    assert shapes == {
        "video": ((6,), "float16", 12.5),
        "audio": ((2, 1), "float16", 20.0),
        "text": ((1,), "float16", 0.0),
    }
    assert len(store.spec.features["video"].encoder["source"]) == 64
    assert store.spec.features["audio"].encoder["version"] == 3
    row = next(row for row in store.index().to_pylist() if row["clip_id"] == "1")
    sample = store.read(row["shard"], row["offset"], row["nbytes"])
    assert sample["video"].shape == (6, 6) and np.abs(sample["video"][:, :3] - 160).max() < 4
    assert len(sample["audio"]) in (10, 11) and sample["audio"][3, 1, 0] == pytest.approx(0.5, abs=0.1)
    assert sample["text"][:, 0].tolist() == [ord(letter) for letter in "good"]
    assert store.index()["sha256"].to_pylist() == like.index()["sha256"].to_pylist()
    learner = Learner(store.uri, Recipe(architecture="clcr", optim=OptimConfig(epochs=2, batch_size=4)))
    assert all(np.isfinite(epoch.metrics["val/score"]) for epoch in learner.fit())


def test_an_image_is_as_large_as_its_encoder_says_and_makes_several_tokens(folder):
    from PIL import Image

    from features.corpus.manifest import Clip
    from features.decode.clip import encode_clip, prepare
    from features.decode.specs import EncoderSpec, ImageSpec

    Image.fromarray(np.repeat([[[9] * 3], [[200] * 3]], 20, axis=0).astype(np.uint8)).save(folder / "a.png")
    spec = EncoderSpec(None, None, image=ImageSpec("python:own:Regions", grid=1))
    prepare(spec)
    clip = Clip("1", None, None, str(folder / "a.png"), None, None, None, "train", None, None)
    sample = encode_clip(clip, {"image": str(folder / "a.png")}, spec)
    np.testing.assert_allclose(sample.features["image"], [[9] * 3, [200] * 3], atol=5)  # a bicubic edge
    assert spec.features()["image"].encoder["size"] == 8


@pytest.mark.parametrize(
    "name, said",
    [
        ("python:own", "write python:package.module:factory"),
        ("python:nowhere:Thing", "does not load: No module named 'nowhere'"),
        ("python:own:nothing", "does not load: module 'own' has no attribute 'nothing'"),
        ("python:own:fails", "does not load: no luck"),
        ("python:own:other", "makes a int, not a features.encoders.Encoder"),
        ("python:own:Flat", r"shape \(\) must be"),
        ("python:own:Mute", "an encoder of sound must say its sample_rate"),
    ],
)
def test_what_is_no_encoder_is_named(folder, name, said):
    with pytest.raises(FeaturesError, match=rf"--audio\.encoder {name}.*{said}"):
        find_encoder(Asked(name, "audio"))


def test_the_job_names_an_encoder_that_is_none_in_one_line(folder, capsys):
    write_media(folder / "a.mp4", numbered(5))
    rows = [{"clip_id": s, "video": "a.mp4", "split": s, "label": n} for n, s in enumerate(("train", "val", "test"))]
    given = ["--corpus", write_manifest(folder / "corpus.csv", rows), "--store", folder / "store", "--dry-run"]
    for encoder, said in (("nose", "is none of pixels, resnet18, hf:NAME"), ("python:own:fails", "no luck")):
        assert run_extract(*given, "--modalities", "video", "--video.encoder", encoder) != 0
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert run_extract(*given, "--modalities", "video", "--video.encoder", "python:colours:Colours") == 0
    assert "video: 12.5 tokens per second of float16 [6]" in capsys.readouterr().out


def test_an_encoders_identity_is_its_own_or_its_files(folder):
    colours, loud = Asked("python:colours:Colours", "video"), Asked("python:own:Loudness", "audio")
    assert identity_of(loud) == {"name": "python", "encoder": "python:own:Loudness", "version": 3}
    assert len(identity_of(colours)["source"]) == 64


def test_like_is_told_where_the_models_of_a_store_lie():
    config = ExtractConfig(
        "c", "s", like="x", audio=AudioSpec(encoder="hf:/a"), video=VideoSpec(encoder="resnet18", weights="r.pth")
    )
    assert with_places(config) == {"video": "r.pth", "audio": "hf:/a", "image": "", "text": ""}
