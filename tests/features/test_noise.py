"""Noise in a corpus's sound: as strong as asked for, from the own split only, and a corpus that extract takes."""

import csv

import numpy as np
import pytest
from mediafiles import numbered, sine, write_manifest, write_media

from features.corpus.manifest import read_corpus
from features.decode.audio import decode_sound
from features.errors import CorpusError
from features.noise import Options, add_noise_to_corpus, babblers, main

RATE = 16_000
SPLITS = ("train", "train", "train", "test", "test", "test")


def hertz(number):
    return 500 + 400 * number


@pytest.fixture
def corpus(tmp_path):
    """Six one-second clips, each with a tone of its own, and one without sound."""
    rows = []
    for i, split in enumerate(SPLITS):
        write_media(tmp_path / f"{i}.wav", sound=sine(hertz(i), 1.0), rate=RATE)
        write_media(tmp_path / f"{i}.mp4", numbered(5))
        rows.append(
            {"clip_id": f"c.{i}/x", "video": f"{i}.mp4", "audio": f"{i}.wav", "split": split, "label": "ab"[i % 2]}
        )
    rows.append({"clip_id": "mute", "video": "0.mp4", "split": "train", "label": "a"})
    return write_manifest(tmp_path / "corpus.csv", rows)


def noisy(corpus, out, **options):
    """Clip id -> its noisy samples."""
    add_noise_to_corpus(Options(corpus, out, **options))
    made = read_corpus(str(out / "corpus.parquet"))
    media = {clip.clip_id: clip.media(made.folder) for clip in made.clips()}
    return {name: decode_sound(m["audio"]).samples for name, m in media.items() if "audio" in m}


def read_rows(manifest):
    with open(manifest, newline="") as file:
        return list(csv.DictReader(file))


def spectrum_at(samples, frequency):
    """Share of the power within 20 Hz of a frequency."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    near = np.abs(np.fft.rfftfreq(len(samples), 1 / RATE) - frequency) < 20
    return power[near].sum() / power.sum()


@pytest.mark.parametrize("kind", ["white", "babble"])
@pytest.mark.parametrize("snr", [-10.0, 5.0])
def test_the_noise_is_as_strong_as_asked_for(corpus, tmp_path, kind, snr):
    mixed = noisy(corpus, tmp_path / "out", kind=kind, snr=snr, processes=1)["c.0/x"]
    clean = decode_sound(str(tmp_path / "0.wav")).samples
    added = mixed - clean
    assert 10 * np.log10(np.square(clean).mean() / np.square(added).mean()) == pytest.approx(snr, abs=0.05)
    assert np.abs(mixed).max() > 1 or snr > 0  # nothing is cut off at full scale


def test_babble_is_made_of_others_of_the_own_split(corpus, tmp_path):
    mixed = noisy(corpus, tmp_path / "out", kind="babble", snr=0.0, processes=1)
    for i, split in enumerate(SPLITS):
        others = [j for j in range(len(SPLITS)) if j != i and SPLITS[j] == split]
        strangers = [j for j in range(len(SPLITS)) if SPLITS[j] != split]
        assert all(spectrum_at(mixed[f"c.{i}/x"], hertz(j)) > 0.1 for j in others)
        assert all(spectrum_at(mixed[f"c.{i}/x"], hertz(j)) < 0.01 for j in strangers)


def test_nobody_babbles_over_himself(corpus):
    same = [f"{i}.wav" for i in range(5)]
    for clip, uri in zip(read_corpus(corpus).clips(), same, strict=False):
        assert sorted([uri, *babblers(clip, uri, same, seed=0)]) == same


def test_voices_are_looked_for_until_enough_are_heard(tmp_path):
    for i in range(20):
        write_media(tmp_path / f"{i}.wav", sound=sine(500, 0.2) * (i in (0, 19)))
    rows = [{"clip_id": f"{i}", "audio": f"{i}.wav", "split": "train", "label": "a"} for i in range(20)]
    mixed = noisy(write_manifest(tmp_path / "c.csv", rows), tmp_path / "out", kind="babble", voices=1, processes=1)
    clean = decode_sound(str(tmp_path / "0.wav")).samples
    assert np.square(mixed["0"] - clean).mean() == pytest.approx(np.square(clean).mean(), rel=1e-3)


def test_a_split_without_another_sound_is_named_with_its_clip(corpus, tmp_path):
    for name in ("3.wav", "4.wav"):
        write_media(tmp_path / name, sound=np.zeros(RATE, np.float32))
    with pytest.raises(CorpusError, match=r"clip 'c\.5/x': no other clip of split 'test' has sound"):
        noisy(corpus, tmp_path / "out", kind="babble", processes=1)


def test_every_file_is_found_from_the_noisy_corpus(corpus, tmp_path):
    texts, events = ["t.txt", "so said he", None] * 2 + ["../t.txt"], ["e.json", None] * 3 + ["e.json"]
    rows = [
        row | {"text": text, "face_features": "v.npz#face[0]", "sounds": file}
        for row, text, file in zip(read_rows(corpus), texts, events, strict=True)
    ]
    add_noise_to_corpus(Options(write_manifest(corpus, rows), tmp_path / "out", kind="white", processes=1))
    made = list(read_corpus(str(tmp_path / "out/corpus.parquet")).clips())
    first = made[0]
    assert (first.text, first.vectors) == (f"{tmp_path}/t.txt", {"face_features": f"{tmp_path}/v.npz#face[0]"})
    assert [clip.text for clip in made[1:3]] == ["so said he", None]
    assert [clip.labels for clip in made[:2]] == [
        {"label": "a", "sounds": f"{tmp_path}/e.json"},
        {"label": "b", "sounds": None},
    ]


def test_the_same_seed_gives_the_same_sound_and_another_seed_another(corpus, tmp_path):
    runs = [
        noisy(corpus, tmp_path / f"{i}", kind="white", seed=seed, processes=processes)
        for i, (seed, processes) in enumerate([(0, 1), (0, 2), (1, 1)])
    ]
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not np.array_equal(runs[0]["c.1/x"], runs[2]["c.1/x"])


def test_a_clip_without_sound_and_one_that_does_not_decode_stay_as_they_are(corpus, tmp_path):
    (tmp_path / "1.wav").write_bytes(b"RIFF not a sound at all")
    assert add_noise_to_corpus(Options(corpus, tmp_path / "out", processes=1)) == (5, 2)
    before, after = (
        {c.clip_id: c for c in read_corpus(str(p)).clips()} for p in (corpus, tmp_path / "out/corpus.parquet")
    )
    assert after["mute"].audio is None
    assert after["c.1/x"].audio == str(tmp_path / "1.wav")
    assert [c.labels for c in after.values()] == [c.labels for c in before.values()]
    assert after["c.0/x"].video == str(tmp_path / "0.mp4")


def test_mistakes_end_in_one_line(corpus, tmp_path, capsys):
    segment = write_manifest(
        tmp_path / "segments.csv", [{"clip_id": "s", "audio": "0.wav", "start": "0.2", "end": "0.5", "split": "train"}]
    )
    assert main(["--corpus", segment, "--out", str(tmp_path / "a")]) == 2
    assert "clip 's' is a segment" in capsys.readouterr().err
    assert main(["--corpus", corpus, "--out", str(tmp_path / "b"), "--processes", "1"]) == 0
    assert main(["--corpus", corpus, "--out", str(tmp_path / "b")]) == 2
    assert "holds a corpus already" in capsys.readouterr().err
    with pytest.raises(CorpusError, match="--voices 0"):
        add_noise_to_corpus(Options(corpus, tmp_path / "c", voices=0))
