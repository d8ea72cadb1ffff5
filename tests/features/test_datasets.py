"""The official benchmarks: every clip of the official lists is in the manifest or named as missing."""

import csv
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from mediafiles import numbered, sine, write_media
from PIL import Image
from scipy.io import savemat

from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.datasets.__main__ import READERS, Options, main, write
from features.datasets.kinetics_sounds import clip_of
from features.datasets.layout import Layout
from features.datasets.mosi import load_arrays
from features.datasets.ravdess import EMOTIONS
from features.decode.clip import encode_clip
from features.decode.specs import AudioSpec, EncoderSpec, VectorSpec, VideoSpec
from features.decode.vectors import find_features
from features.errors import CorpusError

DATA = Path(__file__).parents[2].parent / "shared/data"
LISTS = DATA / "annotations"
official = [pytest.mark.data, pytest.mark.skipif(not LISTS.is_dir(), reason="needs ../shared/data/annotations")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A real file of each kind that the layouts hold."""
    folder = tmp_path_factory.mktemp("clip")
    for name in ("a.mp4", "a.avi", "a.flv"):
        codec = {"a.avi": "mpeg4", "a.flv": "flv1"}.get(name, "libx264")
        write_media(folder / name, numbered(12), sound=None if name != "a.mp4" else sine(440, 0.5), codec=codec)
    write_media(folder / "a.wav", sound=sine(440, 0.5))
    return folder


def put(source, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)


def firsts(name, separator, count=40, field=0):
    """The first entries of an official list."""
    lines = (LISTS / name).read_text().splitlines()[:count]
    return [line.split(separator)[field].strip() for line in lines]


def layouts(clip, root):
    """The official layouts with the media of some clips of each list: how many, and what the extract job then needs."""
    crema = [name for part in ("train", "test") for name in firsts(f"crema_d/{part}.csv", ",")]
    put(clip / "a.flv", *(root / "crema_d/VideoFlash" / f"{name}.flv" for name in crema))
    put(clip / "a.wav", *(root / "crema_d/AudioWAV" / f"{name}.wav" for name in crema[1:]))
    sounds = firsts("kinetics_sounds/my_train.txt", ",")
    tested = [clip_of(name) for name in firsts("kinetics_sounds/my_test.txt", ",")]
    sounds += [f"{video}_{start:06d}_{start + 10:06d}" for video, start in tested]
    put(clip / "a.mp4", *(root / "kinetics_sounds/val/playing drums" / f"{name}.mp4" for name in sounds))
    events = sorted(set(firsts("ave/Annotations.txt", "&", 600, field=1)))
    put(clip / "a.mp4", *(root / "ave/AVE" / f"{name}.mp4" for name in events))
    actions = [n for k in ("train", "test") for n in firsts(f"ucf101/{k}list01.txt", " ", 400)]
    put(clip / "a.avi", *(root / "ucf101/UCF-101" / name for name in actions))
    return {"crema_d": 80, "kinetics_sounds": 80, "ave": 600, "ucf101": 800}


COUNTS = {
    "crema_d": (6698, 744, "emotion", 6),
    "kinetics_sounds": (14799, 2597, "label", 31),
    "ave": (3339 + 402, 402, "event:events,category", 28),
    "ucf101": (9537, 3783, "action", 101),
}


@pytest.fixture(scope="module")
def manifests(clip, tmp_path_factory):
    """Each benchmark's manifest, from official lists and small media: clips there, counted by split, missing."""
    root = tmp_path_factory.mktemp("benchmarks")
    there = layouts(clip, root)
    written = {n: write(Options(n, root / n, root / f"{n}.parquet", LISTS / n)) for n in there}
    return root, there, written


class TestOfficial:
    pytestmark = official

    @pytest.mark.parametrize("name", COUNTS)
    def test_every_clip_of_the_official_lists_is_counted(self, manifests, name):
        root, there, written = manifests
        (counts, missing), rows = written[name], pq.read_table(root / f"{name}.parquet").to_pylist()
        assert (counts["train"] + counts["val"], counts["test"]) == COUNTS[name][:2]
        assert len(rows) == counts.total() - len(missing) == (there[name] if name != "ave" else len(rows)) > 79
        assert not {row["clip_id"] for row in rows} & set(missing)
        assert all((root / row["video"]).is_file() for row in rows)

    @pytest.mark.parametrize("name", COUNTS)
    def test_the_manifest_is_a_valid_corpus_whose_clips_encode(self, manifests, name):
        root, _, _ = manifests
        corpus = read_corpus(str(root / f"{name}.parquet"))
        summary = validate(corpus, COUNTS[name][2])
        assert summary.rows == sum(summary.splits.values()) and len(summary.tasks[0].classes) > 1
        first = next(corpus.clips())
        spec = EncoderSpec(VideoSpec(size=16), AudioSpec())
        sample = encode_clip(first, first.media(corpus.folder), spec)
        assert len(sample.features["video"]) == 6 and sample.duration == pytest.approx(0.48, abs=0.08)

    @pytest.mark.parametrize("name", ["crema_d", "kinetics_sounds", "ucf101"])
    def test_a_tenth_is_held_out_and_classes_are_the_official_ones(self, name):
        rows = list(READERS[name](Layout(LISTS / name, LISTS / name)))
        labels = {row[COUNTS[name][2]] for row in rows}
        val = sum(row["split"] == "val" for row in rows)
        assert len(labels) == COUNTS[name][3] and 0.08 < val / COUNTS[name][0] < 0.12
        groups = {}
        for row in rows:
            assert groups.setdefault(row.get("group", row["clip_id"]), row["split"]) == row["split"]

    def test_ave_has_its_official_splits_and_a_label_for_each_second(self, manifests):
        root, _, written = manifests
        assert written["ave"][0] == {"train": 3339, "val": 402, "test": 402}
        row = pq.read_table(root / "ave.parquet").to_pylist()[0]
        lines = (LISTS / "ave/Annotations.txt").read_text().splitlines()
        category, video, _, start, end = next(line for line in lines if line.split("&")[1] in row["video"]).split("&")
        assert row["event"] == [{"start": float(start), "end": float(end), "label": category}]
        assert row["clip_id"] == f"{video}/{category}"

    def test_mosi_has_its_official_folds(self, clip, tmp_path):
        with open(DATA / "mosi/segments.csv") as file:
            segments = list(csv.DictReader(file))
        names = [row["clip_id"].rpartition("_") for row in segments]
        modes = {"val": "valid"}
        header = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
        with open(tmp_path / "label.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(header)
            for (video, _, number), row in zip(names, segments, strict=True):
                mode = modes.get(row["split"], row["split"])
                table.writerow([video, number, row["text"], row["sentiment"], "", "", "", "", mode])
        put(clip / "a.mp4", *(tmp_path / "Raw" / video / f"{number}.mp4" for video, _, number in names[:-9]))
        counts, missing = write(Options("mosi", tmp_path, tmp_path / "mosi.parquet"))
        assert counts == {"train": 1284, "val": 229, "test": 686} and len(missing) == 9
        summary = validate(read_corpus(str(tmp_path / "mosi.parquet")), "sentiment:sentiment")
        assert summary.rows == 2190 and summary.sources == {"video": 2190, "text": 2190}


def test_a_kinetics_clip_has_one_name_in_all_its_spellings():
    for name in ("-3Mwkq-7TV4_2", "-3Mwkq-7TV4_000002_000012", "-3Mwkq-7TV4_2_12"):
        assert clip_of(name) == ("-3Mwkq-7TV4", 2)
    assert clip_of("--_1234_567_000132_000142") == ("--_1234_567", 132)


def ave_lines(root, split, *lines):
    header = ["Category&VideoID&Quality&StartTime&EndTime"]
    (root / f"{split}Set.txt").write_text("\n".join([*header, *lines]))


def test_aves_own_split_files_serve_as_well(clip, tmp_path, capsys):
    put(clip / "a.mp4", tmp_path / "AVE/one.mp4", tmp_path / "AVE/two.mp4")
    ave_lines(tmp_path, "train", "Church bell&one&good&0&10", "Bark&gone&good&1&2")
    ave_lines(tmp_path, "val", "Bark&two&good&3&5")
    ave_lines(tmp_path, "test", "Bark&one&good&0&1")
    assert main(["ave", "--root", str(tmp_path), "--out", str(tmp_path / "out/ave.parquet")]) == 0
    out = capsys.readouterr().out
    assert "ave: 4 clips in the official lists (2 train, 1 val, 1 test), 1 of them missing" in out
    assert (tmp_path / "out/ave.missing.txt").read_text() == "gone/Bark\n" and "gone/Bark" in out
    corpus = read_corpus(str(tmp_path / "out/ave.parquet"))
    assert [task.kind for task in validate(corpus, "event,category").tasks] == ["events", "classification"]
    assert next(c.media(corpus.folder)["video"] for c in corpus.clips()).endswith("out/../AVE/one.mp4")


MEMES = """,image_name,text_ocr,text_corrected,humour,sarcasm,offensive,motivational,overall_sentiment
0,image_1.jpg,OCR TEXT,right text,hilarious,general,not_offensive,not_motivational,very_positive
1,image_2.png,ONLY OCR,,not_funny,not_sarcastic,hateful_offensive,motivational,negative
2,image_3.jpg,ONLY OCR, ,funny,twisted_meaning,slight,motivational,neutral
3,image_4.jpg,,,funny,twisted_meaning,slight,motivational,neutral
"""


def test_memotion_has_the_labels_of_its_three_tasks(tmp_path):
    (tmp_path / "labels.csv").write_text(MEMES)
    for name in ("image_1.jpg", "image_2.png", "image_3.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    _, missing = write(Options("memotion", tmp_path, tmp_path / "m.parquet"))
    first, second, third = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert missing == ["image_4"]
    assert (first["text"], second["text"], third["text"]) == ("right text", "ONLY OCR", "ONLY OCR")
    tasks = (
        "sentiment",
        "humour",
        "sarcasm",
        "offence",
        "motivation",
        "humour_level",
        "sarcasm_level",
        "offence_level",
    )
    assert [first[t] for t in tasks] == ["positive", 1, 1, 0, 0, 3, 1, 0]
    assert [second[t] for t in tasks] == ["negative", 0, 0, 1, 1, 0, 0, 3]
    assert first["image"] == "images/image_1.jpg"


def mmsa(counts=(5, 2, 3), **changes):
    """A dict as MMSA pickles it, of small features."""
    generator = np.random.default_rng(0)

    def part(name, size):
        features = {
            key: generator.normal(size=(size, 6, width)) for key, width in (("text", 8), ("audio", 5), ("vision", 4))
        }
        for array in features.values():
            array[:, 4:] = 0
        ids = [f"vid{n // 2}{name}$_${n}" for n in range(size)]
        words = np.array([f"it is {n}" for n in range(size)], dtype=object)
        return {"raw_text": words, "id": ids, "regression_labels": np.linspace(-3, 3, size), **features, **changes}

    return {name: part(name, size) for name, size in zip(("train", "valid", "test"), counts, strict=True)}


def test_mmsas_pickle_becomes_given_vectors(tmp_path):
    content = mmsa()
    (tmp_path / "Processed").mkdir()
    (tmp_path / "Processed/aligned_50.pkl").write_bytes(pickle.dumps(content))
    counts, missing = write(Options("mosei", tmp_path, tmp_path / "out.parquet", pickle="aligned_50.pkl"))
    assert counts == {"train": 5, "val": 2, "test": 3} and not missing
    corpus = read_corpus(str(tmp_path / "out.parquet"))
    assert validate(corpus, "sentiment:sentiment").sources.keys() == {
        "text", "audio_features", "vision_features", "bert_features"
    }  # fmt: skip
    vectors = VectorSpec(trim=True)
    spec = EncoderSpec(None, None, vectors=vectors, declared=find_features(corpus, ["audio", "bert"], vectors))
    clips = list(corpus.clips())
    assert [clip.clip_id for clip in clips[:2]] == ["vid0train/0", "vid0train/1"] and clips[1].text == "it is 1"
    sample = encode_clip(clips[-1], clips[-1].media(corpus.folder), spec)
    np.testing.assert_allclose(sample.features["audio"], content["test"]["audio"][2, :4], rtol=1e-6)
    assert sample.features["bert"].shape == (4, 8)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_older_numpy_and_python_read_as_well(tmp_path, protocol):
    content = mmsa()
    plain = pickle.dumps(content, protocol)
    if protocol == 2:  # whose names are lines of text: as NumPy 1 wrote them
        plain = plain.replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"cnumpy.core.multiarray" in plain
    (tmp_path / "x.pkl").write_bytes(plain)
    loaded = load_arrays(tmp_path / "x.pkl")
    np.testing.assert_array_equal(loaded["valid"]["vision"], content["valid"]["vision"])
    assert list(loaded["test"]["raw_text"]) == ["it is 0", "it is 1", "it is 2"]


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize("harm", [Harmful(), os.getcwd, shutil.rmtree, Path("x")])
def test_a_pickle_that_asks_for_anything_but_arrays_is_refused(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"train": harm}))
    with pytest.raises(CorpusError, match=r"is no pickle of plain arrays: it asks for .* which is not an array"):
        load_arrays(tmp_path / "x.pkl")
    assert not (tmp_path / "harmed").exists()


MISTAKES = {
    "no lists": (["crema_d"], "has no train.csv; name the folder of the lists by --lists"),
    "no media": (["memotion"], "has none of the 4 clips of the lists, such as image_1"),
    "no folder": (["ave", "--lists", "nowhere"], "nowhere is no folder"),
    "another split": (["memotion", "--split", "2"], "--split 2: ucf101 has the splits"),
    "a pickle of another": (["ave", "--pickle", "x.pkl"], "--pickle is of mosi and mosei"),
    "no such pickle": (["mosi", "--pickle", "x.pkl"], "has no x.pkl"),
    "a share that is none": (["memotion", "--val-share", "1"], "--val-share 1.0"),
    "a broken line": (["kinetics_sounds"], "my_train.txt, line 2: 'what' has 1 fields, not 3"),
    "an unknown fold": (["mosi"], "label.csv has the mode 'dev'"),
    "another corpus": (["grid"], "has no files named as GRID's, such as s1/bbaf2n.mpg"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    options, named = MISTAKES[mistake]
    (tmp_path / "labels.csv").write_text(MEMES)
    (tmp_path / "my_train.txt").write_text("-3Mwkq-7TV4_2,10,23\nwhat\n")
    (tmp_path / "label.csv").write_text("video_id,clip_id,text,label,mode\na,1,words,1.0,dev\n")
    assert main([*options, "--root", str(tmp_path), "--out", "out.parquet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not (tmp_path / "out.parquet").exists()


def test_ucf101s_other_splits_can_be_asked_for(clip, tmp_path):
    put(clip / "a.avi", tmp_path / "UCF-101/YoYo/v_YoYo_g01_c01.avi")
    (tmp_path / "trainlist02.txt").write_text("YoYo/v_YoYo_g01_c01.avi 101\nYoYo/v_YoYo_g02_c01.avi 101\n")
    (tmp_path / "testlist02.txt").write_text("YoYo/v_YoYo_g03_c01.avi\n")
    counts, missing = write(Options("ucf101", tmp_path, tmp_path / "u.parquet", split=2, val_share=0.0))
    assert counts == {"train": 2, "test": 1} and missing == ["v_YoYo_g02_c01", "v_YoYo_g03_c01"]


def test_grids_names_are_its_labels_and_its_alignments_are_events(clip, tmp_path):
    for path in ("s1/video/mpg_6000/bbaf2n.mpg", "s3/bbaf2n.mpg", "s3/lwwz9a.mpg", "s7/srbxzs.mpg"):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_media(path, numbered(12), sound=sine(440, 0.5), codec="mpeg1video")
    put(clip / "a.wav", tmp_path / "audio_25k/s21/bbaf2n.wav", tmp_path / "audio_25k/s3/bbaf2n.wav")
    aligned = tmp_path / "alignments/s3/bbaf2n.align"
    aligned.parent.mkdir(parents=True)
    aligned.write_text("0 2500 sil\n2500 5000 bin\n5000 5000 sp\n5000 6250 blue\n6250 74500 sil\n")
    (tmp_path / "s3/notes.mpg").write_bytes(b"")  # not named as a sentence
    assert main(["grid", "--root", str(tmp_path), "--out", str(tmp_path / "grid.parquet")]) == 0
    first, second, third, fourth = pq.read_table(tmp_path / "grid.parquet").to_pylist()
    words = ("command", "color", "preposition", "letter", "digit", "adverb")
    assert [first[word] for word in words] == ["bin", "blue", "at", "f", "two", "now"]
    assert [third[word] for word in words] == ["lay", "white", "with", "z", "nine", "again"]
    assert [fourth[word] for word in words] == ["set", "red", "by", "x", "zero", "soon"]
    assert [row["clip_id"] for row in (first, second)] == ["s1/bbaf2n", "s3/bbaf2n"]
    assert [row["split"] for row in (first, second, fourth)] == ["test", "train", "val"]
    assert first["word"] is None and first["audio"] is None and second["audio"].endswith("s3/bbaf2n.wav")
    assert second["word"] == [
        {"start": 0.1, "end": 0.2, "label": "bin"},
        {"start": 0.2, "end": 0.25, "label": "blue"},
    ]
    assert (tmp_path / "grid.missing.txt").read_text() == "s21/bbaf2n\n"
    corpus = read_corpus(str(tmp_path / "grid.parquet"))
    assert [task.kind for task in validate(corpus, "word:events,digit").tasks] == ["events", "classification"]
    encoded = next(corpus.clips())
    sample = encode_clip(encoded, encoded.media(corpus.folder), EncoderSpec(VideoSpec(size=16), AudioSpec()))
    assert len(sample.features["video"]) == 6 and len(sample.features["audio"])


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "grid").is_dir(), reason="needs ../shared/data/grid")
def test_a_speaker_of_grids_is_labelled_as_by_another_hand(tmp_path):
    """Whoever cut the clips spelt their names too; the words' times come from the alignments."""
    with open(DATA / "grid/corpus.csv") as file:
        expected = {f"s1/{row.pop('clip_id')}": row for row in csv.DictReader(file)}
    spoken = {}
    with open(DATA / "grid/words.csv") as file:
        for row in csv.DictReader(file):
            spoken.setdefault(f"s1/{row['clip_id']}", []).append(row)
    (tmp_path / "s1").symlink_to(DATA / "grid/clips")
    (tmp_path / "align/s1").mkdir(parents=True)
    for name, words in spoken.items():
        lines = [f"{float(w['start']) * 25000:.0f} {float(w['end']) * 25000:.0f} {w['word']}\n" for w in words]
        (tmp_path / "align" / f"{name}.align").write_text("".join(lines))
    layout = Layout(tmp_path, tmp_path)
    rows = {row["clip_id"]: row for row in READERS["grid"](layout)}
    assert rows.keys() == spoken.keys() and rows.keys() >= expected.keys()
    for name, row in expected.items():
        assert all(rows[name][column] == word for column, word in row.items() if column not in ("video", "split"))
        assert [event["label"] for event in rows[name]["word"]] == [word["word"] for word in spoken[name]]


RAVDESS = "Actor_12/{}-01-06-01-02-01-12"


def test_ravdess_is_its_1440_performances_of_speech(clip, tmp_path):
    names = [RAVDESS.format("01") + ".mp4", "Actor_02/02-01-01-01-01-01-02.mp4", "Actor_03/01-02-06-01-02-01-03.mp4"]
    put(clip / "a.mp4", *(tmp_path / "Video" / name for name in names))  # the last of them is a song
    put(clip / "a.wav", tmp_path / "Audio" / f"{RAVDESS.format('03')}.wav")
    counts, missing = write(Options("ravdess", tmp_path, tmp_path / "r.parquet"))
    assert counts == {"train": 840, "val": 300, "test": 300} and len(missing) == 1438
    silent, both = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert both == {
        "clip_id": "01-06-01-02-01-12",
        "video": f"Video/{names[0]}",
        "audio": "Audio/Actor_12/03-01-06-01-02-01-12.wav",
        "split": "train",
        "fold": 2,
        "group": "actor12",
        "emotion": "fearful",
        "intensity": "normal",
        "statement": "dogs",
    }
    assert (silent["video"], silent["audio"], silent["split"]) == (f"Video/{names[1]}", None, "test")
    assert (silent["emotion"], silent["intensity"], silent["statement"]) == ("neutral", "normal", "kids")
    rows = list(READERS["ravdess"](Layout(tmp_path, tmp_path)))
    assert len({row["clip_id"] for row in rows}) == 1440 and len({row["group"] for row in rows}) == 24
    assert Counter(row["emotion"] for row in rows) == {"neutral": 96, **dict.fromkeys(EMOTIONS[1:], 192)}


def test_ravdess_without_its_videos_is_a_corpus_of_sound(clip, tmp_path):
    put(clip / "a.wav", tmp_path / f"{RAVDESS.format('03')}.wav", tmp_path / "Actor_01/03-01-01-01-01-01-01.wav")
    _, missing = write(Options("ravdess", tmp_path, tmp_path / "r.parquet"))
    table = pq.read_table(tmp_path / "r.parquet")
    assert len(missing) == 1438 and "video" not in table.column_names and table.num_rows == 2


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "ravdess_voice").is_dir(), reason="needs ../shared/data/ravdess_voice")
def test_ravdess_has_the_published_folds_and_labels(tmp_path):
    with open(DATA / "ravdess_voice/corpus.csv") as file:
        expected = {row["clip_id"]: row for row in csv.DictReader(file)}
    rows = {f"03-{row['clip_id']}": row for row in READERS["ravdess"](Layout(tmp_path, tmp_path))}
    columns = ("split", "fold", "group", "emotion", "intensity", "statement")
    assert {name: [str(row[c]) for c in columns] for name, row in rows.items()} == {
        name: [row[c] for c in columns] for name, row in expected.items()
    }


def put_action(folder, name, color=None, steps=9):
    """A clip of UTD-MHAD's in its four official files; returns skeleton, inertial and depth as they were."""
    generator = np.random.default_rng(0)
    skeleton, inertial = generator.normal(size=(20, 3, steps)), generator.normal(size=(2 * steps, 6))
    depth = np.zeros((240, 320, steps), np.uint16)
    depth[:, :, :] = np.linspace(1000, 4500, 320, dtype=np.uint16)[:, None]
    depth[:120] = 0  # unknown
    for kind, key, values in (
        ("Skeleton", "skel", skeleton),
        ("Inertial", "iner", inertial),
        ("Depth", "depth", depth),
    ):
        (folder / kind).mkdir(exist_ok=True)
        savemat(folder / kind / f"{name}_{kind.lower()}.mat", {f"d_{key}": values}, do_compression=True)
    if color:
        put(color, folder / "RGB" / f"{name}_color.avi")
    return skeleton, inertial, depth


def test_utd_mhad_is_861_clips_by_subjects_with_vectors_from_its_mat_files(clip, tmp_path):
    skeleton, inertial, _ = put_action(tmp_path, "a8_s1_t1", color=clip / "a.avi")
    put_action(tmp_path, "a8_s1_t4", color=clip / "a.avi")  # one of the three corrupt ones
    put_action(tmp_path, "a27_s8_t1")  # no colour
    counts, missing = write(Options("utd_mhad", tmp_path, tmp_path / "u.parquet"))
    assert counts == {"train": 323, "val": 108, "test": 430} and len(missing) == 860 and "a27_s8_t1" in missing
    (row,) = pq.read_table(tmp_path / "u.parquet").to_pylist()
    assert (row["clip_id"], row["action"], row["group"], row["fold"]) == ("a8_s1_t1", "draw_x", "s1", 0)
    assert row["video"] == "RGB/a8_s1_t1_color.avi"
    stored = np.load(tmp_path / row["skeleton_features"])
    assert stored.shape == (9, 60) and stored.dtype == np.float32
    np.testing.assert_allclose(stored[4, 3 * 7 + 2], skeleton[7, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / row["inertial_features"]), inertial, rtol=1e-6)
    corpus = read_corpus(str(tmp_path / "u.parquet"))
    vectors = VectorSpec(rates=("skeleton=30", "inertial=50"))
    spec = EncoderSpec(VideoSpec(size=16), None, vectors=vectors, declared=find_features(corpus, ["skeleton"], vectors))
    first = next(corpus.clips())
    sample = encode_clip(first, first.media(corpus.folder), spec)
    assert sample.features["skeleton"].shape == (9, 60) and len(sample.features["video"])


def test_utd_mhads_depth_is_the_picture_where_there_is_no_colour(tmp_path):
    _, _, depth = put_action(tmp_path, "a1_s2_t3")
    write(Options("utd_mhad", tmp_path, tmp_path / "u.parquet"))
    (row,) = pq.read_table(tmp_path / "u.parquet").to_pylist()
    with av.open(str(tmp_path / row["video"])) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert (len(frames), frames[0].shape, row["split"]) == (9, (240, 320), "test")
    expected = np.clip((4000 - depth[200, :, 0].astype(float)) / 2500, 0, 1) * 255
    np.testing.assert_allclose(frames[4][200], expected, atol=6)
    assert frames[4][:100].max() <= 3


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no MATLAB file", "is no MATLAB file with d_skel"), ({"other": 1}, "is no MATLAB file with d_skel: 'd_skel'"),
     ({"d_skel": np.zeros((3, 20, 9))}, r"d_skel has shape \(3, 20, 9\), not \(20, 3, -1\)")],
    ids=["broken", "another", "turned"],
)  # fmt: skip
def test_a_mat_file_that_is_not_the_official_one_is_named(tmp_path, content, said):
    put_action(tmp_path, "a1_s1_t1")
    path = tmp_path / "Skeleton/a1_s1_t1_skeleton.mat"
    path.write_bytes(content) if isinstance(content, bytes) else savemat(path, content)
    with pytest.raises(CorpusError, match=rf"a1_s1_t1_skeleton\.mat.*{said}"):
        write(Options("utd_mhad", tmp_path, tmp_path / "u.parquet"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "utd_mhad").is_dir(), reason="needs ../shared/data/utd_mhad")
def test_utd_mhad_has_the_clips_and_labels_of_another_copy(tmp_path):
    with open(DATA / "utd_mhad/corpus.csv") as file:
        expected = {row["clip_id"]: row for row in csv.DictReader(file)}
    rows = {row["clip_id"]: row for row in READERS["utd_mhad"](Layout(tmp_path, tmp_path))}
    columns = ("split", "fold", "group", "action")
    assert {name: [str(row[c]) for c in columns] for name, row in rows.items()} == {
        name: [row[c] for c in columns] for name, row in expected.items()
    }
