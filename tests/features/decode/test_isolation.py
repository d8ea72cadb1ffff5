"""No clip can hurt another: what kills, hangs or breaks a decoder costs that clip alone."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import crashing
import psutil
import pytest
from storefiles import make_clip, make_sample

from features.corpus.manifest import read_corpus
from features.decode.isolation import IsolatedEncoder
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store.samples import PackedSample, unpack
from features.store.shards import Failure

ROOT = Path(__file__).parents[3]
SPEC = EncoderSpec(VideoSpec(size=16), AudioSpec())


@pytest.fixture
def encoder():
    """An encoder whose child runs crashing.encode; 2 s per clip."""
    encoder = IsolatedEncoder(SPEC, timeout=2.0, memory_gb=0.3, encode_clip=crashing.encode)
    yield encoder
    encoder.close()


def encode(encoder, *clip_ids):
    return [outcome for _, outcome in encoder.encode((make_clip(clip_id), {}) for clip_id in clip_ids)]


@pytest.mark.slow
def test_a_clip_that_aborts_hangs_or_raises_costs_itself_alone(encoder):
    ids = ["0", "aborts", "1", "aborts", "spins", "2", "raises", "refused", "4", "eats", "5"]
    outcomes = dict(zip(enumerate(ids), encode(encoder, *ids), strict=True))
    failures = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Failure)}
    crash = Failure("decode", "Crash", "the decoder's process died with exit code -6", attempts=2)
    assert failures == {
        (1, "aborts"): crash,
        (3, "aborts"): crash,
        (4, "spins"): Failure("decode", "Timeout", "took longer than 2 s and was stopped"),
        (6, "raises"): Failure("decode", "KeyError", repr("first line\nsecond line")),
        (7, "refused"): Failure("video", "MediaError", "no key frame"),
        (9, "eats"): Failure("decode", "Memory", "asked for more than 0.3 GB of memory"),
    }
    for (_, name), outcome in outcomes.items():
        if isinstance(outcome, PackedSample):
            assert (unpack(outcome.payload)["video"] == make_sample(int(name)).features["video"]).all()


@pytest.mark.slow
def test_a_crash_that_does_not_come_again_costs_nothing(encoder, tmp_path):
    clip = replace(make_clip("aborts once"), video=str(tmp_path / "crashed"))
    ((_, outcome),) = encoder.encode([(clip, {})])
    assert isinstance(outcome, PackedSample) and (tmp_path / "crashed").exists()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_child_that_hangs_in_its_exit_is_killed(encoder):
    crash, good = encode(encoder, "hangs up", "1")
    assert crash == Failure("decode", "Crash", "the decoder's process died with exit code -9", attempts=2)
    assert isinstance(good, PackedSample)


@pytest.mark.slow
def test_the_timeout_is_the_clips_own_and_not_the_childs_start(encoder):
    assert isinstance(encode(encoder, "1")[0], PackedSample)  # importing the decoders takes longer than a clip may
    encoder.timeout = 1e9
    assert isinstance(encode(encoder, "1")[0], PackedSample)  # longer than a pipe can be waited for
    encoder.timeout = 0.3
    assert encode(encoder, "spins") == [Failure("decode", "Timeout", "took longer than 0.3 s and was stopped")]


@pytest.mark.slow
def test_a_closed_encoder_leaves_no_child_that_decodes(encoder):
    encode(encoder, "1")
    child = encoder._child.pid
    encoder.close()
    encoder.close()
    assert not psutil.pid_exists(child)


@pytest.mark.slow
def test_real_clips_come_out_in_order_and_broken_ones_say_why(corpus):
    manifest = read_corpus(corpus)
    clips = list(manifest.clips())[:6]
    encoder = IsolatedEncoder(SPEC, timeout=60)
    outcomes = list(encoder.encode((clip, clip.media(manifest.folder)) for clip in clips))
    encoder.close()
    assert [clip for clip, _ in outcomes] == clips
    good, corrupt, silent, empty, missing, long = (outcome for _, outcome in outcomes)
    arrays = unpack(good.payload)
    assert arrays["video"].shape == (12, 16, 16, 3) and arrays["audio"].shape[1] == 64
    assert silent.tokens.keys() == {"video"} and long.tokens.keys() == {"video", "audio"}
    for failure, reason in [(corrupt, "not a media file"), (empty, "0 bytes"), (missing, "does not exist")]:
        assert (failure.stage, failure.error) == ("open", "MediaError") and reason in failure.message


ORPHAN = """
import sys
sys.path.insert(0, "tests/helpers")
import crashing, features.decode.isolation
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from storefiles import make_clip

SPEC = EncoderSpec(VideoSpec(), AudioSpec())

if __name__ == "__main__":
    encoder = features.decode.isolation.IsolatedEncoder(SPEC, timeout=2, encode_clip=crashing.encode)
    for _, sample in encoder.encode((make_clip(name), {}) for name in ["1", "spins"]):
        print(encoder._child.pid, flush=True)
"""


@pytest.mark.slow
def test_a_killed_job_leaves_no_decoder_behind(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(ORPHAN)
    job = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
    )
    child = psutil.Process(int(job.stdout.readline()))
    time.sleep(0.5)  # the next clip spins by now
    assert child.is_running()
    job.kill()
    job.wait()
    job.stdout.close()
    child.wait(timeout=10)
