"""A corpus again with noise in its sound: white noise, or babble made of the voices of other clips.

    python -m features.noise --corpus corpus.csv --out DIR --kind babble --snr -5

Writes DIR/sound/*.wav and DIR/corpus.parquet, the same rows with `audio` naming the noisy sound; pictures stay where
they are. Extract takes it as any corpus, so the noise is there before log-mel, in training as in test.
"""

import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import av
import numpy as np
import pyarrow as pa
import torch
import tyro
from pyarrow import parquet
from torchaudio.functional import add_noise, resample

from features.audio import Sound, decode_sound
from features.corpus import Clip, read_corpus
from features.errors import CorpusError, FeaturesError, MediaError
from features.files import resolve
from features.progress import counted

Kind = Literal["white", "babble"]
SPARE = 2  # candidates per voice of babble: some clips have no sound, or a damaged one


@dataclass(frozen=True)
class Options:
    """Mix noise into the sound of every clip of a corpus."""

    corpus: str
    """manifest or folder of clips; path or URI"""
    out: Path
    """folder to write: sound/*.wav and corpus.parquet"""
    kind: Kind = "babble"
    """white: Gaussian noise; babble: a mixture of other clips of the same split"""
    snr: float = 0.0
    """power of a clip's sound over the noise's, in dB, both over the whole clip"""
    voices: int = 6
    """clips in the mixture of babble"""
    seed: int = 0
    """of the noise and of who babbles; the same seed gives the same sound"""
    processes: int = 0
    """processes at work; 0 = one per CPU"""


def add_noise_to_corpus(options: Options) -> tuple[int, int]:
    """Write the noisy corpus; how many clips got noise, and how many have no sound that decodes and stay as they are.

    Raises CorpusError where the corpus does not read, holds segments, or the folder is in use.
    """
    if options.voices < 1:
        raise CorpusError(f"--voices {options.voices}: babble needs 1 or more")
    manifest, sound = options.out / "corpus.parquet", options.out / "sound"
    if manifest.exists():
        raise CorpusError(f"--out {options.out} holds a corpus already: give another folder")
    corpus = read_corpus(options.corpus)
    clips = list(corpus.clips())
    sound.mkdir(parents=True, exist_ok=True)
    uris = [sound_of(clip, corpus.folder) for clip in clips]
    tasks = zip(clips, uris, babblers(clips, uris, options), strict=True)
    write, processes = partial(_write_one, options), min(options.processes or os.cpu_count() or 1, len(clips))
    # spawn: PyAV's and torch's threads do not survive fork.
    with multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else nullcontext() as pool:
        noisy = list(counted(pool.imap(write, tasks, chunksize=8) if pool else map(write, tasks), len(clips)))
    _write_manifest(manifest, pa.Table.from_batches(corpus.batches(), corpus.schema), corpus.folder, noisy)
    return sum(path is not None for path in noisy), noisy.count(None)


def sound_of(clip: Clip, folder: str) -> str | None:
    """Where a clip's sound is: its own file, or its video's. Raises CorpusError for a segment of a file."""
    if clip.start is not None or clip.end is not None:
        raise CorpusError(
            f"clip {clip.clip_id!r} is a segment of a file: noise is mixed into whole files, cut it first"
        )
    media = clip.media(folder)
    return media.get("audio") or media.get("video")


def babblers(clips: Sequence[Clip], uris: Sequence[str | None], options: Options) -> Iterator[list[str]]:
    """For every clip the files of others of its split that may babble over it; none for white noise."""
    rows: dict[str, list[int]] = {}
    for row, clip in enumerate(clips):
        rows.setdefault(clip.split, []).append(row)
    for row, clip in enumerate(clips):
        same = rows[clip.split]
        wanted = min(len(same) - 1, SPARE * options.voices) if options.kind == "babble" else 0
        picks = generator(clip, options.seed, 0).choice(len(same), wanted + 1, replace=False) if wanted else []
        others = [same[pick] for pick in picks if same[pick] != row][:wanted]
        yield [uris[other] for other in others if uris[other]]


def generator(clip: Clip, seed: int, use: int) -> np.random.Generator:
    """Random numbers of a clip, whatever its place in the manifest; those of different uses are independent."""
    return np.random.default_rng([seed, use, zlib.crc32(clip.clip_id.encode())])


def noise_of(kind: Kind, sound: Sound, others: Sequence[str], voices: int, rng: np.random.Generator) -> np.ndarray:
    """Noise as long as a sound, (N,) float32. Raises MediaError where no other clip's sound decodes."""
    if kind == "white":
        return rng.standard_normal(len(sound.samples)).astype(np.float32)
    mixed, heard = np.zeros(len(sound.samples), np.float32), 0
    for uri in others:
        voice = _voice(uri, sound.rate)
        if voice is None or heard == voices:
            continue
        begin = rng.integers(len(voice))
        mixed += np.resize(np.roll(voice, -begin), len(mixed))
        heard += 1
    if not heard:
        raise MediaError("audio", "no other clip of its split has sound to make babble of")
    return mixed


def _voice(uri: str, rate: int) -> np.ndarray | None:
    """A clip's sound at a rate and unit power; None where there is none to hear."""
    try:
        sound = decode_sound(uri)
    except MediaError:
        return None
    if sound is None or not (power := float(np.square(sound.samples).mean())):
        return None
    return resample(torch.from_numpy(sound.samples), sound.rate, rate).numpy() / power**0.5


def _write_one(options: Options, task: tuple[Clip, str | None, list[str]]) -> str | None:
    """One clip's noisy sound; its path below the folder, None where there is no sound to mix noise into."""
    clip, uri, others = task
    torch.set_num_threads(1)
    try:
        sound = decode_sound(uri) if uri else None
    except MediaError:  # extract will say what is wrong with it
        return None
    if sound is None:
        return None
    noise = noise_of(options.kind, sound, others, options.voices, generator(clip, options.seed, 1))
    mixed = add_noise(torch.from_numpy(sound.samples), torch.from_numpy(noise), torch.tensor(options.snr))
    name = f"sound/{quote(clip.clip_id, safe='')}.wav"
    write_wav(options.out / name, mixed.numpy(), sound.rate)
    return name


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """(N,) float32 samples as they are, also those beyond full scale."""
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_manifest(path: Path, table: pa.Table, folder: str, noisy: Sequence[str | None]) -> None:
    """The rows as they were, other media by their whole path; last, because it says that the sound is there."""
    for name in {"video", "audio", "image"} & set(table.column_names):
        uris = [uri and resolve(uri, folder) for uri in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(uris, pa.string()))
    own = table["audio"].to_pylist() if "audio" in table.column_names else [None] * len(noisy)
    sounds = pa.array([new or old for new, old in zip(noisy, own, strict=True)], pa.string())
    table = table.drop_columns(["audio"] if "audio" in table.column_names else []).append_column("audio", sounds)
    part = path.with_suffix(".part")
    parquet.write_table(table, part)
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m features.noise", args=arguments)
    try:
        noisy, silent = add_noise_to_corpus(options)
    except FeaturesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f"; {silent} without sound that decodes stay as they are" if silent else ""
    print(f"{options.out / 'corpus.parquet'}: {noisy} clips with {options.kind} noise at {options.snr:g} dB{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
