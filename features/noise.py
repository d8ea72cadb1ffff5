"""A corpus again with noise in its sound: white noise, or babble made of the voices of other clips.

    python -m features.noise --corpus corpus.csv --out DIR --kind babble --snr -5

Writes DIR/sound/*.wav and DIR/corpus.parquet, the same rows with `audio` naming the noisy sound; pictures stay where
they are. Extract takes it as any corpus, so the noise is there before log-mel, in training as in test.
"""

import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from features.corpus.manifest import Clip, Corpus, read_corpus
from features.decode.audio import Sound, decode_sound
from features.errors import CorpusError, FeaturesError, MediaError
from features.files import resolve
from features.progress import counted

Kind = Literal["white", "babble"]
CHUNKS = 64  # per process: each carries the list of all files along


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
    splits: dict[str, list[str]] = {}
    for clip, uri in zip(clips, uris, strict=True):
        if uri:
            splits.setdefault(clip.split, []).append(uri)
    write, processes = partial(_write_one, options, splits), min(options.processes or os.cpu_count() or 1, len(clips))
    chunk = -(-len(clips) // (CHUNKS * processes)) if processes else 1
    # spawn: PyAV's and torch's threads do not survive fork.
    with multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else nullcontext() as pool:
        tasks = zip(clips, uris, strict=True)
        noisy = list(counted(pool.imap(write, tasks, chunk) if pool else map(write, tasks), len(clips)))
    _write_manifest(manifest, corpus, clips, noisy)
    return sum(path is not None for path in noisy), noisy.count(None)


def sound_of(clip: Clip, folder: str) -> str | None:
    """Where a clip's sound is: its own file, or its video's. Raises CorpusError for a segment of a file."""
    if clip.start is not None or clip.end is not None:
        raise CorpusError(
            f"clip {clip.clip_id!r} is a segment of a file: noise is mixed into whole files, cut it first"
        )
    media = clip.media(folder)
    return media.get("audio") or media.get("video")


def babblers(clip: Clip, uri: str, same: Sequence[str], seed: int) -> Iterator[str]:
    """The files that may babble over a clip, in random order: those of its split (same) but its own (uri)."""
    return (same[pick] for pick in generator(clip, seed, 0).permutation(len(same)) if same[pick] != uri)


def generator(clip: Clip, seed: int, use: int) -> np.random.Generator:
    """Random numbers of a clip, whatever its place in the manifest; those of different uses are independent."""
    return np.random.default_rng([seed, use, zlib.crc32(clip.clip_id.encode())])


def noise_of(clip: Clip, sound: Sound, others: Iterable[str], options: Options) -> np.ndarray:
    """Noise as long as a clip's sound, (N,) float32; others: files to babble, as many as have sound for the voices.

    Raises CorpusError where none of them has.
    """
    rng = generator(clip, options.seed, 1)
    if options.kind == "white":
        return rng.standard_normal(len(sound.samples)).astype(np.float32)
    mixed, heard = np.zeros(len(sound.samples), np.float32), 0
    for uri in others:
        if heard == options.voices:
            break
        if (voice := _voice(uri, sound.rate)) is None:
            continue
        begin = rng.integers(len(voice))
        mixed += np.resize(np.roll(voice, -begin), len(mixed))
        heard += 1
    if not heard:
        raise CorpusError(
            f"clip {clip.clip_id!r}: no other clip of split {clip.split!r} has sound to make babble of; "
            "give the split more clips, or take --kind white"
        )
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


def _write_one(options: Options, splits: Mapping[str, list[str]], task: tuple[Clip, str | None]) -> str | None:
    """One clip's noisy sound; its path below the folder, None where there is no sound to mix noise into.

    splits: the files with sound of each split.
    """
    clip, uri = task
    torch.set_num_threads(1)
    try:
        sound = decode_sound(uri) if uri else None
    except MediaError:  # extract will say what is wrong with it
        return None
    if sound is None:
        return None
    noise = noise_of(clip, sound, babblers(clip, uri, splits[clip.split], options.seed), options)
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


def _write_manifest(path: Path, corpus: Corpus, clips: Sequence[Clip], noisy: Sequence[str | None]) -> None:
    """The rows as they were, other files by their whole path; last, because it says that the sound is there."""
    schema = corpus.schema if "audio" in corpus.schema.names else corpus.schema.append(pa.field("audio", pa.string()))
    rows = (row for batch in corpus.batches() for row in batch.to_pylist())
    rows = [
        row | clip.media(corpus.folder) | _event_files(clip, corpus.folder) | ({"audio": sound} if sound else {})
        for row, clip, sound in zip(rows, clips, noisy, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema)
    part = path.with_suffix(".part")
    parquet.write_table(table, part)
    part.replace(path)


def _event_files(clip: Clip, folder: str) -> dict[str, str]:
    """Where the clip's files of events are; whether a label is one, only its ending tells before tasks are declared."""
    labels = {name: label for name, label in clip.labels.items() if isinstance(label, str)}
    return {name: resolve(label, folder) for name, label in labels.items() if label.endswith(".json")}


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
