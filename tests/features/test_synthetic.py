"""The synthetic corpus: real files, cues that can be measured in them, and nothing that gives the answers away."""

import csv
import itertools
import math
from collections import Counter, defaultdict

import av
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from features.errors import CorpusError
from features.synthetic import ceilings, generate
from features.synthetic.__main__ import main
from features.synthetic.render import FORMANTS_HZ, FPS, PITCHES_HZ, RATES, SAMPLE_RATE
from features.synthetic.semantics import ORDERS, RELIABILITY, TASKS, draw

CLIPS = 240
MEASURED = 60  # clips whose cues are measured
CUES = {
    "video": {"label": ("colour", "video_order"), "match": ("video_rate",), "when": ("marked_quarter",)},
    "audio": {"label": ("timbre", "audio_order"), "match": ("audio_rate",), "when": ("pitches",)},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    assert generate(folder, CLIPS, seed=3) == CLIPS
    return folder


@pytest.fixture(scope="module")
def latents():
    return draw(CLIPS, seed=3)


@pytest.fixture(scope="module")
def media(corpus, latents):
    """Planes and samples of the first clips, decoded with PyAV."""
    return [decode(corpus / "clips" / f"{clip.clip_id}.mp4") for clip in latents[:MEASURED]]


def decode(path):
    with av.open(str(path)) as container:
        planes = np.stack([frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]).astype(float)
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    chroma = planes[:, 64:].reshape(len(planes), 2, 32, 32) - 128
    return planes[:, :64], chroma, sound[: int(len(planes) / FPS * SAMPLE_RATE)]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def above_chance(n, chance):
    """Accuracy that blind guessing on n clips stays below, but for about one time in a thousand."""
    return chance + 3.1 * math.sqrt(chance * (1 - chance) / n)


# What is written


def test_clips_are_h264_and_aac_of_about_four_seconds(corpus, latents):
    for clip in latents[:20]:
        with av.open(str(corpus / "clips" / f"{clip.clip_id}.mp4")) as container:
            picture, sound = container.streams.video[0], container.streams.audio[0]
            assert (picture.codec_context.name, sound.codec_context.name) == ("h264", "aac")
            assert (picture.width, picture.height, picture.average_rate) == (64, 64, FPS)
            assert (sound.rate, sound.channels) == (SAMPLE_RATE, 1)
            assert 3.6 < container.duration / av.time_base < 4.4
            length = sum(1 for _ in container.decode(picture)) / FPS
            assert abs(float(sound.duration * sound.time_base) - length) < 0.1


def test_manifest_has_exact_shares_and_balanced_answers(corpus, latents):
    manifest = rows(corpus / "corpus.csv")
    assert list(manifest[0]) == ["clip_id", "video", "split", "label", "match", "when"]
    assert Counter(row["split"] for row in manifest) == {"train": 144, "val": 24, "test": 72}
    for row, clip in zip(manifest, latents, strict=True):
        assert (corpus / row["video"]).is_file()
        assert [row[task] for task in TASKS] == [classes[getattr(clip, task)] for task, classes in TASKS.items()]
    for split, task in itertools.product(("train", "val", "test"), TASKS):
        counts = Counter(row[task] for row in manifest if row["split"] == split)
        assert set(counts) == set(TASKS[task])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_same_seed_gives_same_bytes_for_any_number_of_processes(tmp_path):
    for name, seed, processes in (("one", 7, 1), ("two", 7, 2), ("other", 8, 1)):
        generate(tmp_path / name, 12, seed=seed, processes=processes)
    contents = {
        name: {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two", "other")
    }
    assert contents["one"] == contents["two"]
    clips = [name for name in contents["one"] if name.endswith(".mp4")]
    assert len(clips) == 12
    assert all(contents["one"][name] != contents["other"][name] for name in clips)


# What can be known


def test_ceilings_are_reached_and_not_passed_by_the_best_guess_on_drawn_cues():
    drawn = draw(20_000, seed=1)
    expected = ceilings()
    for source, task in itertools.product(("video", "audio", "both"), TASKS):
        used = [CUES[s][task] for s in (("video", "audio") if source == "both" else (source,))]
        cues = tuple(itertools.chain(*used))
        if task == "label":
            hits = [vote(clip, cues) == clip.label for clip in drawn]
        else:
            hits = held_out_table([(tuple(getattr(clip, cue) for cue in cues), getattr(clip, task)) for clip in drawn])
        error = 4 * math.sqrt(0.25 / len(hits))
        assert abs(np.mean(hits) - expected[task][source]) < error, (task, source)


def vote(clip, cues):
    """Best class by log-odds, each cue voting for the class it shows."""
    scores = Counter()
    for cue in cues:
        p = float(RELIABILITY[cue])
        scores[getattr(clip, cue)] += math.log(p / ((1 - p) / 3))
    return scores.most_common(1)[0][0]


def held_out_table(pairs):
    """Hits of the answer most often seen with an observation, counted on the other half of the pairs."""
    seen = defaultdict(Counter)
    for observation, answer in pairs[::2]:
        seen[observation][answer] += 1
    return [seen[observation].most_common(1)[0][0] == answer for observation, answer in pairs[1::2]]


def test_ceilings_of_the_label_leave_room_between_one_modality_and_both():
    table = ceilings()
    assert table["label"]["video"] == table["label"]["audio"] == pytest.approx(0.70)
    assert table["label"]["both"] == pytest.approx(0.85, abs=0.01)
    assert table["match"] == {"video": 0.5, "audio": 0.5, "both": 1.0}
    assert table["when"] == {"video": 0.25, "audio": 0.25, "both": 1.0}


def test_file_metadata_and_order_tell_no_answer(corpus, latents):
    facts = []
    for clip in latents:
        path = corpus / "clips" / f"{clip.clip_id}.mp4"
        with av.open(str(path)) as container:
            sizes = Counter()
            for packet in container.demux():
                sizes[packet.stream.type] += packet.size
            rates = [stream.bit_rate for stream in container.streams]
            facts.append([path.stat().st_size, sizes["video"], sizes["audio"], container.duration, clip.index, *rates])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for probe in (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        RandomForestClassifier(60, min_samples_leaf=3, random_state=0),
    ):
        for task, classes in TASKS.items():
            answers = np.array([getattr(clip, task) for clip in latents])
            accuracy = np.mean(cross_val_predict(probe, facts, answers, cv=folds) == answers)
            assert accuracy < above_chance(CLIPS, 1 / len(classes)), (task, accuracy)


# What can be measured in the decoded media


def share_right(measured, planted):
    return np.mean([m == p for m, p in zip(measured, planted, strict=True)])


def nearest_rate(signal, seconds):
    """Index of the planted rate whose sinusoid explains most of the signal."""

    def explained(rate):
        angle = 2 * np.pi * rate * seconds
        basis = np.stack([np.ones_like(seconds), np.sin(angle), np.cos(angle)], axis=1)
        return np.sum((basis @ np.linalg.lstsq(basis, signal, rcond=None)[0]) ** 2)

    return int(np.argmax([max(explained(rate * f) for f in (0.97, 0.985, 1, 1.015, 1.03)) for rate in RATES]))


def spectrogram(sound, window=512, hop=64):
    """Power (frames, bins), the bins' frequencies in Hz and the frames' times in seconds."""
    parts = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hanning(window)
    times = (np.arange(len(parts)) * hop + window / 2) / SAMPLE_RATE
    return np.abs(np.fft.rfft(parts)) ** 2, np.fft.rfftfreq(window, 1 / SAMPLE_RATE), times


def band(power, frequencies, low, high):
    return power[:, (frequencies >= low) & (frequencies < high)].sum(axis=1)


def test_colour_is_the_hue_of_the_disc(media, latents):
    quadrants = {(1, 1): 0, (-1, 1): 1, (-1, -1): 2, (1, -1): 3}  # signs of U and V
    measured = [quadrants[tuple(np.sign(chroma.sum(axis=(0, 2, 3))).astype(int))] for _, chroma, _ in media]
    assert share_right(measured, [clip.colour for clip in latents[:MEASURED]]) > 0.95


def test_rhythm_of_the_picture_is_the_pulse_of_the_coloured_area(media, latents):
    measured = []
    for luma, chroma, _ in media:
        area = np.hypot(chroma[:, 0], chroma[:, 1]).sum(axis=(1, 2))
        clear = (luma < 45).mean(axis=(1, 2)) < 0.05  # no flash over the disc
        measured.append(nearest_rate(area[clear], np.flatnonzero(clear) / float(FPS)))
    assert share_right(measured, [clip.video_rate for clip in latents[:MEASURED]]) > 0.95


def test_bright_border_marks_the_quarter(media, latents):
    measured = []
    for luma, _, _ in media:
        edge = np.concatenate(
            [luma[:, :3].mean(axis=(1, 2), keepdims=True), luma[:, -3:].mean(axis=(1, 2), keepdims=True)]
        )
        edge = edge.reshape(2, -1).mean(axis=0)
        measured.append(int(np.argmax([part.mean() for part in np.array_split(edge, 4)])))
    assert share_right(measured, [clip.marked_quarter for clip in latents[:MEASURED]]) > 0.95


def test_order_of_the_flashes_is_seen(media, latents):
    measured = []
    for luma, _, _ in media:
        bars = luma[:, 22:42, 8:14].mean(axis=(1, 2)), luma[:, 8:14, 22:42].mean(axis=(1, 2))
        diagonal = luma[:, np.arange(20, 44), np.arange(20, 44)].mean(axis=1)
        starts = [np.argmin(place - np.median(place)) for place in (*bars, diagonal)]
        measured.append(tuple(int(kind) for kind in np.argsort(starts)))
    assert share_right(measured, [ORDERS[clip.video_order] for clip in latents[:MEASURED]]) > 0.95


def test_pitch_of_every_quarter_is_its_fundamental(media, latents):
    measured = []
    for _, _, sound in media:
        peaks = []
        for part in np.array_split(sound, 4):
            spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
            frequencies = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
            spectrum[(frequencies < 140) | (frequencies > 620)] = 0
            peaks.append(frequencies[np.argmax(spectrum)])
        nearest = [int(np.argmin(abs(np.log(peak / np.array(PITCHES_HZ))))) for peak in peaks]
        measured.append(tuple(nearest))
    assert share_right(measured, [clip.pitches for clip in latents[:MEASURED]]) > 0.95


def test_rhythm_of_the_sound_is_the_swell_of_its_fundamental(media, latents):
    measured = []
    for _, _, sound in media:
        power, frequencies, times = spectrogram(sound)
        envelope = np.sqrt(band(power, frequencies, 140, 620))
        measured.append(nearest_rate(np.minimum(envelope, 2 * np.median(envelope)), times))
    assert share_right(measured, [clip.audio_rate for clip in latents[:MEASURED]]) > 0.95


def test_timbre_is_the_band_of_the_strongest_overtones(media, latents):
    measured = []
    for _, _, sound in media:
        power, frequencies, _ = spectrogram(sound)
        strength = [np.median(band(power, frequencies, 0.84 * f, 1.19 * f)) for f in FORMANTS_HZ]
        measured.append(int(np.argmax(strength)))
    assert share_right(measured, [clip.timbre for clip in latents[:MEASURED]]) > 0.95


def test_order_of_the_brief_sounds_is_heard(media, latents):
    measured = []
    for _, _, sound in media:
        power, frequencies, _ = spectrogram(sound, window=128, hop=32)
        high = np.lib.stride_tricks.sliding_window_view(band(power, frequencies, 6500, 8000), 100)  # 0.2 s
        steady, peak = np.median(high, axis=1), high.max(axis=1)
        power, frequencies, times = spectrogram(sound)
        thump = times[np.argmax(band(power, frequencies, 30, 110))]
        click = np.convolve(peak / (steady + np.median(steady)), np.ones(100), mode="same").argmax() * 32 / SAMPLE_RATE
        hiss = steady.argmax() * 32 / SAMPLE_RATE
        measured.append(tuple(int(kind) for kind in np.argsort([click + 0.1, hiss + 0.1, thump])))
    assert share_right(measured, [ORDERS[clip.audio_order] for clip in latents[:MEASURED]]) > 0.95


# Mistakes and second runs


def test_second_run_does_nothing_and_an_interrupted_one_goes_on(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "c"), "--clips", "10", "--processes", "1"]
    assert main(arguments) == 0
    assert "when       0.250   0.250   1.000" in capsys.readouterr().out
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "c").rglob("*.*")}
    assert main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "c").rglob("*.*")}

    lost = tmp_path / "c" / "clips" / "clip-000004.mp4"
    lost.rename(lost.with_suffix(".part123"))
    (tmp_path / "c" / "corpus.csv").unlink()
    assert main(arguments) == 0
    assert "(1 written now)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*.*")} == {p: b for p, (b, _) in before.items()}


def test_rhythms_on_request_are_two_more_tasks_of_the_same_clips(tmp_path):
    for name, rhythms in (("plain", False), ("rhythms", True)):
        generate(tmp_path / name, 10, rhythms=rhythms, processes=1)
    plain, more = (rows(tmp_path / name / "corpus.csv") for name in ("plain", "rhythms"))
    cues = rows(tmp_path / "rhythms" / "latents.csv")
    for before, row, cue in zip(plain, more, cues, strict=True):
        rates = [("slow", "mid-slow", "mid-fast", "fast")[int(cue[name])] for name in ("video_rate", "audio_rate")]
        assert row == before | dict(zip(("video_rate", "audio_rate"), rates, strict=True))
        assert (row["match"] == "agree") == (row["video_rate"] == row["audio_rate"])
    clip = plain[0]["video"]
    assert (tmp_path / "plain" / clip).read_bytes() == (tmp_path / "rhythms" / clip).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clips", "3"], "--clips 3 is too few"),
        (["--clips", "0"], "--clips 0 is too few"),
        (["--clips", "-5"], "--clips -5 is too few"),
        (["--test-share", "0.95"], "sum is below 1"),
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--processes", "0"], "--processes 0 is below 1"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "c"), *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="already holds other files"):
        generate(tmp_path, 10)
    generate(tmp_path / "c", 10, processes=1)
    with pytest.raises(CorpusError, match="already holds another corpus"):
        generate(tmp_path / "c", 11)
    with pytest.raises(CorpusError, match="is a URI"):
        generate("s3://bucket/corpus", 10)
    with pytest.raises(CorpusError, match="--out"):
        generate(tmp_path / "notes.txt", 10)
