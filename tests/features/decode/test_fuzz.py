"""Damaged copies of real clips, each decoded apart: a sample with finite values or a failure, and nobody else is hurt.

FUZZED=300 for more of them than the suite runs; FUZZ_SEED for others.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from mediafiles import damage, noise, numbered, sine, write_media
from storefiles import make_clip

from features.decode.isolation import IsolatedEncoder
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store.quality import QUALITY_SCHEMA, QualitySpec
from features.store.samples import PackedSample, unpack
from features.store.shards import Failure

FUZZED = int(os.environ.get("FUZZED", 30))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SPEC = EncoderSpec(VideoSpec(size=16), AudioSpec(), QualitySpec())
STAGES = {"open", "video", "audio", "quality", "decode"}


def undamaged(folder):
    """Clips of every kind that people have: picture and sound, only one of them, several containers."""
    return [
        Path(write_media(folder / "both.mp4", noise(30), sound=sine(440, 1.2))),
        Path(write_media(folder / "fast.mp4", numbered(40), sound=sine(440, 1.6), faststart=True)),
        Path(write_media(folder / "both.mkv", noise(30), sound=sine(440, 1.2))),
        Path(write_media(folder / "picture.mov", noise(30))),
        Path(write_media(folder / "sound.mp4", sound=sine(440, 1.5))),
        Path(write_media(folder / "sound.mp3", sound=sine(440, 1.5))),
        Path(write_media(folder / "sound.wav", sound=sine(440, 1.5))),
    ]


def encode(paths):
    """Sample or failure of each file, all by one encoder."""
    encoder = IsolatedEncoder(SPEC, timeout=20)
    clips = [(make_clip(path.name), {"video": str(path)}) for path in paths]
    outcomes = [outcome for _, outcome in encoder.encode(clips)]
    encoder.close()
    return outcomes


def content(sample):
    """Everything of a sample that would lie in a store."""
    return sample.sha256, sample.tokens, sample.duration, sample.quality


@pytest.mark.slow
def test_damaged_clips_hurt_nobody_else(tmp_path):
    whole = undamaged(tmp_path)
    expected = [content(sample) for sample in encode(whole)]
    paths, generator = [], np.random.default_rng(SEED)
    for number in range(FUZZED):
        source = whole[number % len(whole)]
        paths.append(tmp_path / f"damaged-{number}{source.suffix}")
        paths[-1].write_bytes(damage(source.read_bytes(), generator))
        paths.append(source)
    outcomes = encode(paths)
    assert [content(sample) for sample in outcomes[1::2]] == [expected[n % len(whole)] for n in range(FUZZED)]
    damaged = outcomes[0::2]
    for path, outcome in zip(paths[0::2], damaged, strict=True):
        if isinstance(outcome, Failure):
            assert outcome.stage in STAGES and outcome.message and "\n" not in outcome.message, path
            continue
        features = {m: values for m, values in unpack(outcome.payload).items() if m != "json"}
        assert features and 0 < outcome.duration < 100, path
        assert all(len(values) and np.isfinite(values).all() for values in features.values()), path
        assert outcome.quality.keys() <= set(QUALITY_SCHEMA.names)
        assert all(value is None or 0 <= value <= 1 for value in outcome.quality.values()), path
    kinds = {(type(outcome).__name__, bool(getattr(outcome, "quality", {}).get("salvaged"))) for outcome in damaged}
    assert kinds >= {("PackedSample", False), ("PackedSample", True), ("Failure", False)}
    print(f"{FUZZED} damaged: {sum(isinstance(o, PackedSample) for o in damaged)} samples")
