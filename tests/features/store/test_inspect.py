"""`python -m features.store inspect` says what is in a store, and draws some of it."""

import io
import json
import statistics
from dataclasses import replace

import av
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from storefiles import LABELS, make_clip, make_clips, make_sample, make_spec, shards_of, write_store

from features.corpus.tasks import Task
from features.errors import StoreError
from features.store import Feature
from features.store.__main__ import main
from features.store.inspect import LINES, inspect, number, print_report
from features.store.samples import Sample, pack
from features.store.shards import Failure, ShardWriter, create_store
from features.store.sheet import choose, contact_sheet, write_figure


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """A store of 13 clips of which 5 failed, some salvaged, and a split that is not extracted yet."""
    uri = str(tmp_path_factory.mktemp("ledger"))
    clips = make_clips(13, 0, 4)
    store = create_store(uri, make_spec(clips))
    for name, rows in list(shards_of(clips, 4))[:-1]:
        with ShardWriter(uri, name, store.spec, LABELS) as writer:
            for number, clip in rows:
                if number in (1, 5, 9):
                    message = f"/data/{number}.mp4 holds {number}.5 s of its 20 s of sound; fetch it again"
                    writer.fail(clip, Failure("audio", "MediaError", message))
                elif number in (2, 3):
                    writer.fail(clip, Failure("decode", "Crash", "exit code -6", attempts=2))
                else:
                    figures = {"salvaged": number == 4, "good_frames": number / 16}
                    writer.add(clip, pack(clip, replace(make_sample(number), quality=figures)))
            writer.commit()
    return store


def test_the_figures_are_those_that_counting_the_samples_gives(store):
    report = inspect(store)
    clips = make_clips(29, 3, 5)
    samples = [make_sample(number) for number in range(len(clips))]
    assert report["rows"] == {"planned": 37, "indexed": 37, "failed": 0}
    assert sum(row["bytes"] for row in report["splits"].values()) == sum(store.index()["nbytes"].to_pylist())
    for split, row in report["splits"].items():
        seconds = [s.duration for s, c in zip(samples, clips, strict=True) if c.split == split]
        assert row["indexed"] == row["planned"] == len(seconds) == store.spec.splits[split]
        assert row["seconds"] == {
            "count": len(seconds), "min": min(seconds), "max": max(seconds), "sum": pytest.approx(sum(seconds)),
            "median": statistics.median(seconds),
        }  # fmt: skip
    for name, row in report["modalities"].items():
        held = [sample.features[name] for sample in samples if name in sample.features]
        lengths = [len(values) for values in held]
        assert (row["present"], row["absent"]) == (len(held), 37 - len(held))
        assert row["tokens"]["median"] == statistics.median(lengths) and row["tokens"]["sum"] == sum(lengths)
        assert (row["tokens"]["min"], row["tokens"]["max"]) == (min(lengths), max(lengths))
        assert row["bytes"] == sum(values.nbytes for values in held)
    label, mood = report["tasks"]["label"], report["tasks"]["mood"]
    for value in "ab":
        of_class = [clip.split for clip in clips if clip.labels["label"] == value]
        assert label["classes"][value] == {split: of_class.count(split) for split in ("train", "val", "test")}
    moods = [clip.labels["mood"] for clip in clips if clip.labels["mood"] is not None]
    assert label["unlabelled"] == 7 and mood["unlabelled"] == 37 - len(moods)
    assert mood["values"]["median"] == statistics.median(moods)


def test_what_failed_is_counted_by_stage_class_and_reason_whatever_file_and_seconds_it_names(ledger):
    failures = inspect(ledger)["failures"]
    sound = "... holds N s of its N s of sound; fetch it again"
    assert failures == [
        {"stage": "audio", "error": "MediaError", "reason": sound, "clips": 3, "example": "clip/1.v1", "attempts": 1},
        {"stage": "decode", "error": "Crash", "reason": "exit code -N", "clips": 2, "example": "clip/2.v1",
         "attempts": 2},
    ]  # fmt: skip


def test_a_store_that_is_not_finished_says_what_is_missing_and_how_good_the_rest_is(ledger):
    report = inspect(ledger)
    assert report["rows"] == {"planned": 17, "indexed": 8, "failed": 5}
    assert report["splits"]["test"]["indexed"] == 0 and report["splits"]["test"]["seconds"]["median"] is None
    good = [number / 16 for number in (0, 4, 6, 7, 8, 10, 11, 12)]
    assert report["quality"]["salvaged"] == 1
    assert report["quality"]["good_frames"]["count"] == 8
    assert report["quality"]["good_frames"]["median"] == statistics.median(good)
    assert report["quality"]["silence"] == {"count": 0, "min": None, "median": None, "max": None, "sum": 0}
    text = printed(report)
    assert "17 rows, 8 indexed, 5 failed; 4 not extracted yet" in text and ledger.spec.fingerprint in text


def printed(report):
    console = Console(file=io.StringIO(), width=140, markup=False, highlight=False, emoji=False)
    print_report(report, console)
    return console.file.getvalue()


def test_the_tables_show_every_figure_and_take_names_as_text(tmp_path):
    clips = [replace(make_clip("[red]x"), labels={"label": "[bold]:smile:", "mood": None})]
    spec = make_spec(clips, tasks=(Task("label", "classification", ("[bold]:smile:",)),))
    store = create_store(str(tmp_path), spec)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        writer.add(clips[0], pack(clips[0], make_sample(2)))
        writer.fail(make_clip("[red]y"), Failure("open", "MediaError", "[/red] is empty"))
        writer.commit()
    text = printed(inspect(store))
    assert all(word in text for word in ("[bold]:smile:", "[red]y", "is empty", "uint8 [4, 4, 3]", "mels 8", "144 B"))


def test_every_figure_can_be_written():
    assert [number(value) for value in (None, 3, 2.0, 0.12345, float("inf"), float("nan"))] == [
        "-", "3", "2", "0.1235", "inf", "nan"]  # fmt: skip


def test_of_many_classes_the_largest_are_listed_and_the_others_summed(store):
    report = inspect(store)
    classes = {f"class{n:03d}": {"train": n, "val": 1, "test": 0} for n in range(LINES + 60)}
    report["tasks"]["label"] = {"kind": "classification", "unlabelled": 0, "classes": classes}
    text = printed(report)
    assert f"class{LINES + 59:03d}" in text and "class059" not in text
    row = next(line for line in text.splitlines() if "60 smaller classes" in line)
    assert [cell.strip() for cell in row.split("│")[2:6]] == [str(sum(range(60))), "60", "0", str(sum(range(60)) + 60)]


def test_the_command_line_prints_tables_or_json(store, capsys):
    assert main(["inspect", store.uri]) == 0
    assert "Task label: clips by class" in capsys.readouterr().out
    assert main(["inspect", store.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect(store)


def test_a_store_without_a_committed_shard_is_an_error_of_one_line(tmp_path, capsys):
    create_store(str(tmp_path), make_spec(make_clips(3)))
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_index_that_does_not_read_is_an_error_of_one_line_that_points_to_verify(tmp_path, capsys):
    store = write_store(tmp_path, make_clips(3))
    (tmp_path / "index/train-000000.parquet").write_bytes(b"x")
    assert main(["inspect", store.uri]) == 1
    error = capsys.readouterr().err
    assert "`verify` names the parts" in error and error.count("\n") == 1


def test_the_sheets_clips_are_drawn_by_seed_without_repetition(store):
    def ids(*options):
        return [row["clip_id"] for row in choose(store, *options)]

    assert ids(6, 0, None) == ids(6, 0, None) != ids(6, 1, None)
    assert len(set(ids(6, 0, None))) == 6 and ids(99, 0, "val") == [f"clip/{n}.v1" for n in (29, 30, 31)]
    with pytest.raises(StoreError, match="no indexed clip in tset; its splits are train, val, test"):
        choose(store, 6, 0, "tset")


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_the_sheet_is_a_png_of_the_figures_size_and_not_blank(store, tmp_path, clips, capsys):
    path = tmp_path / "a sheet.png"
    assert main(["inspect", store.uri, "--sheet", str(path), "--clips", str(clips), "--seed", "3"]) == 0
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    width, height = contact_sheet(store, clips, 3).get_size_inches()
    assert picture.shape[:2] == pytest.approx((height * 150, width * 150), abs=1) and picture.std() > 10


def test_each_cell_of_the_sheet_names_its_clip_and_draws_it_at_its_time(tmp_path):
    clips = [make_clip(name, mood=None) for name in ("a$x_1$/" + "long/" * 40 + "end", "b.1")]
    spec = make_spec(
        clips, features={"video": Feature((8, 8, 3), "uint8", 12.5), "audio": Feature((4,), "float16", 50.0)}
    )
    store = create_store(str(tmp_path), spec)
    frames = np.repeat(np.arange(50, dtype=np.uint8), 8 * 8 * 3).reshape(50, 8, 8, 3)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        writer.add(clips[0], pack(clips[0], Sample({"video": frames, "audio": np.ones((100, 4), np.float16)}, 4.0)))
        writer.add(clips[1], pack(clips[1], Sample({"audio": np.ones((200, 4), np.float16)}, 4.0)))
        writer.commit()
    figure = contact_sheet(store, 2)
    heading, first, second = [text.get_text() for text in figure.texts]
    assert heading.startswith(str(tmp_path)) and second == "b.1   train   4.00 s   label a   mood -"
    assert first.startswith("a$x_1$/long/") and "/end   train   4.00 s" in first and len(first) <= 100
    video, audio, no_video, _ = figure.axes
    assert [text.get_text() for text in no_video.texts] == ["no video"] and not no_video.images
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 4)}
    assert audio.images[0].get_extent()[:2] == [0, 2]  # its sound ends after two of four seconds
    assert len(video.images) == 8
    for image in video.images:
        left, right, *_ = image.get_extent()
        assert image.get_array()[0, 0, 0] == pytest.approx((left + right) / 2 * 12.5, abs=1)
        pixels = video.get_window_extent()
        assert (right - left) / 4 * pixels.width == pytest.approx(pixels.height, rel=0.06)  # square stays square


def test_each_number_of_a_vector_is_drawn_on_its_own_scale_and_sound_on_one_for_all(tmp_path):
    ramp = np.linspace(0, 1, 10)[:, None]
    features = {
        "face": Feature((4,), "float32", 10.0, {"name": "vectors"}),
        "audio": Feature((4,), "float16", 10.0, {"name": "log_mel"}),
    }
    spec = make_spec(clips := make_clips(1), features=features)
    store = create_store(str(tmp_path), spec)
    face = np.concatenate([ramp, 1000 * ramp - 5, -1e-3 * ramp, np.full_like(ramp, 7)], axis=1)
    sound = np.concatenate([ramp, 9 * ramp, ramp, ramp], axis=1)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        sample = Sample({"face": face.astype(np.float32), "audio": sound.astype(np.float16)}, 1.0)
        writer.add(clips[0], pack(clips[0], sample))
        writer.commit()
    vectors, mel = (axes.images[0] for axes in contact_sheet(store).axes)
    rows = np.asarray(vectors.get_array())
    assert vectors.get_clim() == (0, 1) and mel.get_clim()[1] == pytest.approx(9, abs=0.1)
    for row, wanted in zip(rows, (ramp, ramp, ramp[::-1], np.full_like(ramp, 0.5)), strict=True):
        np.testing.assert_allclose(row, wanted[:, 0], atol=1e-5)  # one that stands still is in between
    np.testing.assert_allclose(np.asarray(mel.get_array())[:2], sound.T[:2], atol=0.01)


def test_features_that_are_no_pictures_or_sound_are_named_by_their_shape(tmp_path):
    clips = make_clips(1)
    spec = make_spec(clips, features={"video": Feature((2, 2, 2, 2), "float32", 1.0)})
    store = create_store(str(tmp_path), spec)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        writer.add(clips[0], pack(clips[0], Sample({"video": np.zeros((3, 2, 2, 2, 2), np.float32)}, 3.0)))
        writer.commit()
    (axes,) = contact_sheet(store).axes
    assert [text.get_text() for text in axes.texts] == ["3 tokens of float32 [2, 2, 2, 2]"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError):
        write_figure(str(tmp_path / "gone/f.png"), Figure())
    write_figure(str(tmp_path / "f.png"), Figure())
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]


def test_a_finished_store_looks_the_same_through_both_commands(tmp_path, capsys):
    write_store(tmp_path, make_clips(9, 2))
    assert main(["verify", str(tmp_path)]) == main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("11 rows") == 2
