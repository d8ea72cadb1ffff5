"""Given vectors: read as they are, agreed in shape, and never silently broken."""

import io
from pathlib import Path

import numpy as np
import pytest
from mediafiles import damage, write_manifest, write_tar

from features.corpus.manifest import read_corpus
from features.decode import vectors
from features.decode.clip import encode_clip
from features.decode.specs import EncoderSpec, VectorSpec
from features.decode.vectors import find_features, read_vectors
from features.errors import CorpusError, MediaError
from features.files import resolve, split_place
from features.store import Feature

FIVE = np.arange(15, dtype=np.float32).reshape(5, 3)


def feature(shape=(3,), rate=0.0):
    return Feature(shape, "float32", rate, {"name": "vectors"})


def read(uri, shape=(3,), rate=0.0, **options):
    return read_vectors(str(uri), VectorSpec(**options), feature(shape, rate))


def saved(path, array):
    np.save(path, array)
    return path


@pytest.fixture
def archive(tmp_path):
    np.savez(tmp_path / "all.npz", audio=np.stack([FIVE, FIVE + 100]), one=FIVE)
    return tmp_path / "all.npz"


def test_every_way_to_name_an_array_gives_the_clips_tokens(tmp_path, archive):
    np.testing.assert_array_equal(read(saved(tmp_path / "a.npy", FIVE)).values, FIVE)
    np.testing.assert_array_equal(read(saved(tmp_path / "one.npy", FIVE[0])).values, FIVE[:1])
    np.testing.assert_array_equal(read(f"{archive}#audio[1]").values, FIVE + 100)
    np.testing.assert_array_equal(read(f"{archive}#one").values, FIVE)
    np.testing.assert_array_equal(read(f"{archive}#one[2]").values, FIVE[2:3])
    np.testing.assert_array_equal(read(f"{saved(tmp_path / 'all.npy', np.stack([FIVE, -FIVE]))}#[1]").values, -FIVE)
    layers = np.ones((4, 2, 3), np.float16)
    assert read(saved(tmp_path / "layers.npy", layers), (2, 3)).values.shape == (4, 2, 3)
    counts = read(saved(tmp_path / "counts.npy", FIVE.astype(np.uint8))).values
    assert counts.dtype == np.float32 and (counts == FIVE).all()


def test_arrays_may_lie_in_a_tar(tmp_path, archive):
    saved(tmp_path / "a.npy", FIVE)
    saved(tmp_path / "all.npy", np.stack([FIVE, -FIVE]))
    files = {f"clips/{name}": (tmp_path / name).read_bytes() for name in ("a.npy", "all.npy")}
    tar = write_tar(tmp_path / "vectors.tar", files | {"a#1.npz": Path(archive).read_bytes()})
    np.testing.assert_array_equal(read(f"{tar}#clips/a.npy").values, FIVE)
    np.testing.assert_array_equal(read(f"{tar}#clips/all.npy#[1]").values, -FIVE)
    np.testing.assert_array_equal(read(f"{tar}#a#1.npz#audio[1]").values, FIVE + 100)
    with pytest.raises(MediaError, match=r"a\.npz#audio does not exist: the tar has 3 files|a\.npz does not exist"):
        read(f"{tar}#a.npz#audio")
    with pytest.raises(MediaError, match=r"name an \.npy file"):
        read(f"{tar}#clips/a.mp4")
    place = "v.tar#b.npz#audio[3]"
    assert resolve(place, "s3://bucket/x?region=eu") == "s3://bucket/x/v.tar?region=eu#b.npz#audio[3]"
    assert split_place("s3://b/v.tar?region=eu#b.npz#audio[3]") == ("s3://b/v.tar?region=eu", "#b.npz#audio[3]")


def test_names_with_a_hash_sign_are_names(tmp_path):
    assert split_place("take#3.npy") == ("take#3.npy", "")
    np.testing.assert_array_equal(read(saved(tmp_path / "take#3.npy", FIVE)).values, FIVE)


def test_a_place_in_a_file_survives_that_the_manifest_lies_on_object_storage():
    assert resolve("a b.npz#audio[3]", "s3://bucket/x?region=eu") == "s3://bucket/x/a%20b.npz?region=eu#audio[3]"
    assert split_place("s3://bucket/a.npz?region=eu#audio[3]") == ("s3://bucket/a.npz?region=eu", "#audio[3]")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.npz#audio[2]", "no such row; the array has 2"),
        ("a.npz#video[0]", "holds no array 'video'; it has audio, text, deep"),
        ("a.npz", "holds no array ''; it has audio, text, deep"),
        ("a.npz#audio[x]", "name an .npy file, or file.npz#key[row]"),
        ("a.npz#text[0]", "holds <U5 and no numbers"),
        ("a.npz#deep", "must be (T, D), (D,) or (T, layers, D)"),
        ("gone.npy", "does not exist"),
        ("junk.npy", "is no array that reads"),
        ("junk.npz#audio", "is no array that reads"),
        ("objects.npy", "is no array that reads"),
        ("a.txt", "name an .npy file"),
        ("wide.npy", "a token has shape (4,), the corpus (3,)"),
        ("one.npy#key[0]", "holds one array and none called 'key'"),
    ],
)
def test_what_does_not_read_is_named_with_its_reason(tmp_path, name, reason):
    deep = np.zeros((1, 1, 1, 1, 3))
    np.savez(tmp_path / "a.npz", audio=np.stack([FIVE, FIVE]), text=np.array(["words"]), deep=deep)
    for junk in ("junk.npy", "junk.npz", "a.txt"):
        (tmp_path / junk).write_bytes(b"no numbers at all")
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "wide.npy", np.zeros((2, 4)))
    np.save(tmp_path / "one.npy", FIVE)
    with pytest.raises(MediaError) as failure:
        read(tmp_path / name)
    assert reason in str(failure.value) and name.partition("#")[0] in str(failure.value)
    assert failure.value.stage in ("open", "vectors")


def test_broken_values_become_the_mean_of_the_clips_sound_ones_and_are_counted(tmp_path):
    array = np.array([[1, 5, np.nan], [3, -255, np.inf], [np.nan, 7, -np.inf], [2, 6, np.nan]], np.float32)
    encoded = read(saved(tmp_path / "a.npy", array), limit=250, max_broken=0.5)
    np.testing.assert_array_equal(encoded.values, [[1, 5, 0], [3, 6, 0], [2, 7, 0], [2, 6, 0]])
    assert encoded.quality == {"broken_values": 0.5}
    with pytest.raises(
        MediaError, match=r"0\.5 of the values are broken, above --vectors\.max-broken 0\.49"
    ) as failure:
        read(tmp_path / "a.npy", limit=250, max_broken=0.49)
    assert failure.value.stage == "quality"
    assert read(tmp_path / "a.npy", max_broken=0.5).values[1, 1] == -255, "without a limit a large value is a value"


def test_half_precision_holds_no_infinity_that_the_file_did_not_have(tmp_path):
    array = np.array([[1.0, 70_000.0], [3.0, 4.0]], np.float32)
    encoded = read(saved(tmp_path / "a.npy", array), (2,), dtype="float16", max_broken=0.5)
    assert encoded.values.dtype == np.float16 and encoded.values.tolist() == [[1, 4], [3, 4]]


def test_padding_is_left_out_where_that_is_asked_for(tmp_path):
    padded = np.zeros((8, 3), np.float32)
    padded[2:4], padded[5] = FIVE[:2] + 1, 9
    saved(tmp_path / "a.npy", padded)
    assert len(read(tmp_path / "a.npy").values) == 8
    np.testing.assert_array_equal(read(tmp_path / "a.npy", trim=True).values, padded[2:6])
    assert read(saved(tmp_path / "zeros.npy", np.zeros((8, 3))), trim=True) is None


def test_a_rate_gives_tokens_their_seconds(tmp_path):
    assert read(saved(tmp_path / "a.npy", FIVE), rate=10.0).duration == 0.5
    assert read(tmp_path / "a.npy").duration == 0.0
    spec = VectorSpec(rates=("audio=10", "video=2.5"))
    assert (spec.rate_of("audio"), spec.rate_of("video"), spec.rate_of("smell")) == (10, 2.5, 0)
    for wrong in ("audio", "audio=", "=3", "audio=fast", "audio=-1", "audio=0"):
        with pytest.raises(ValueError, match="write NAME=RATE"):
            VectorSpec(rates=(wrong,))


def test_most_of_the_first_clips_decide_the_shape(tmp_path):
    for n, width in enumerate([4, 3, 3, 3]):
        np.save(tmp_path / f"{n}.npy", np.zeros((2, width)))
    rows = [{"clip_id": n, "smell_features": f"{n}.npy", "split": "train", "label": "a"} for n in range(5)]
    corpus = read_corpus(write_manifest(tmp_path / "corpus.csv", rows))  # 4.npy is missing
    found = find_features(corpus, ["smell"], VectorSpec(dtype="float16", rates=("smell=4",)))
    assert (found["smell"].shape, found["smell"].dtype, found["smell"].rate) == ((3,), "float16", 4.0)
    assert found["smell"].encoder == {
        "name": "vectors",
        "dtype": "float16",
        "limit": 0.0,
        "max_broken": 0.1,
        "trim": False,
    }
    with pytest.raises(CorpusError, match=r"none of the first 1 smell_features reads: .*4\.npy does not exist"):
        find_features(read_corpus(write_manifest(tmp_path / "lost.csv", rows[4:])), ["smell"], VectorSpec())


def test_a_clip_without_a_file_lacks_that_modality_and_the_rows_seconds_are_its_length(tmp_path):
    np.save(tmp_path / "a.npy", FIVE)
    rows = [
        {"clip_id": "x", "face_features": "a.npy", "voice_features": "", "split": "train", "end": 2.5, "label": "a"}
    ]
    corpus = read_corpus(write_manifest(tmp_path / "corpus.csv", rows))
    (clip,) = corpus.clips()
    spec = EncoderSpec(None, None, vectors=VectorSpec(), declared={"face": feature(), "voice": feature()})
    sample = encode_clip(clip, clip.media(corpus.folder), spec)
    assert sample.features.keys() == {"face"} and sample.duration == 2.5 and sample.quality == {"broken_values": 0.0}


def test_an_array_of_another_machine_that_is_cut_off_is_a_failure(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, FIVE)
    (tmp_path / "cut.npy").write_bytes(buffer.getvalue()[:-8])
    with pytest.raises(MediaError, match=r"cut\.npy is no array that reads"):
        read(tmp_path / "cut.npy")


def test_what_lies_on_object_storage_reads_the_same(tmp_path, archive, monkeypatch):
    """Local files are mapped; those of object storage arrive as bytes."""
    np.save(tmp_path / "all.npy", np.stack([FIVE, -FIVE]))
    names = [f"{archive}#audio[1]", f"{archive}#one", f"{tmp_path / 'all.npy'}#[1]"]
    local = [read(name).values for name in names]
    vectors._shared.cache_clear()
    monkeypatch.setattr(vectors, "open_source", lambda uri: io.BytesIO(Path(uri).read_bytes()))
    for name, values in zip(names, local, strict=True):
        np.testing.assert_array_equal(read(name).values, values)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "packed.npz"])
def test_a_damaged_file_is_a_named_failure_or_an_array_of_the_right_shape(tmp_path, name):
    generator = np.random.default_rng(0)
    array = generator.normal(size=(200, 3))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", audio=array)
    np.savez_compressed(tmp_path / "packed.npz", audio=array)
    whole, failed = (tmp_path / name).read_bytes(), 0
    for number in range(150):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damage(whole, generator))
        try:
            encoded = read(path if name == "a.npy" else f"{path}#audio", max_broken=1)
            assert encoded.values.shape[1:] == (3,) and np.isfinite(encoded.values).all()
        except MediaError as failure:
            assert path.name in str(failure) and failure.stage in ("open", "vectors")
            failed += 1
        except MemoryError:  # a shape beyond all measure; the decoding process reports it as such
            failed += 1
    assert failed > 50
