"""Every file of the media zoo ends as a sample or as a named failure."""

import numpy as np
import pytest
from zoo import ZOO, manifest, outcomes

from features.store.samples import PackedSample, unpack
from features.store.shards import Failure

NOT_SAMPLES: dict[str, str] = {}  # files that FFmpeg decodes and we do not, each with the reason: none

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(not ZOO.is_dir(), reason="needs ../shared/data/media_zoo"),
]


@pytest.fixture(scope="module")
def zoo():
    return dict(outcomes())


def test_every_file_is_a_sample_or_a_named_failure(zoo):
    assert len(zoo) == 35
    for name, outcome in zoo.items():
        if isinstance(outcome, Failure):
            assert outcome.stage in ("open", "video", "audio", "quality") and name in outcome.message, name
        else:
            members = unpack(outcome.payload)
            assert outcome.tokens, name
            assert all(np.isfinite(members[m]).all() and len(members[m]) == n > 0 for m, n in outcome.tokens.items()), (
                name
            )


def test_every_file_that_ffmpeg_decodes_is_a_sample(zoo):
    decodes = {file for file, row in manifest().items() if row["ffmpeg_rc"] == "0"}
    assert decodes == {name for name, outcome in zoo.items() if isinstance(outcome, PackedSample)} | NOT_SAMPLES.keys()


def test_a_sample_lasts_as_long_and_has_the_tracks_that_the_manifest_says(zoo):
    for name, outcome in zoo.items():
        row = manifest()[name]
        if isinstance(outcome, PackedSample):
            present = {
                m for m, streams in (("video", "video_streams"), ("audio", "audio_streams")) if row[streams] != "[]"
            }
            assert outcome.tokens.keys() == present, name
            assert outcome.duration == pytest.approx(float(row["duration"]), abs=0.1), name


def test_only_what_is_damaged_is_salvaged(zoo):
    strict = {name for name, row in manifest().items() if row["ffmpeg_strict_rc"] == "0"}
    salvaged = {
        name for name, outcome in zoo.items() if isinstance(outcome, PackedSample) and outcome.quality.get("salvaged")
    }
    assert salvaged == {name for name, o in zoo.items() if isinstance(o, PackedSample)} - strict
