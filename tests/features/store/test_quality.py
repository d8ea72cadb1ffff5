"""Truth checks: what a clip lacks is written beside it, and beyond a threshold it is a failure that says why."""

import dataclasses

import pyarrow as pa
import pytest
from mediafiles import cut, noise, numbered, sine, wreck_packet, write_media
from storefiles import make_clip

from features.decode.clip import encode_clip
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.errors import MediaError
from features.store.quality import QUALITY_SCHEMA, QualitySpec

TICKS = 512  # of an mp4's clock from one frame to the next, at 25 per second


def encode(path, modalities=("video", "audio"), **thresholds):
    spec = EncoderSpec(VideoSpec(fps=25, size=32), AudioSpec(), QualitySpec(**thresholds))
    spec = dataclasses.replace(spec, **{m: None for m in ("video", "audio") if m not in modalities})
    return encode_clip(make_clip("0"), {"video": str(path)}, spec)


def test_a_whole_clip_has_every_figure_of_the_index(tmp_path):
    sample = encode(write_media(tmp_path / "a.mp4", numbered(40), sound=sine(440, 1.6)))
    assert list(sample.quality) == QUALITY_SCHEMA.names
    assert sample.quality == {
        "salvaged": False,
        "good_frames": 1.0,
        "repeated_frames": 0.0,
        "decoded_video": 1.0,
        "decoded_audio": 1.0,
        "silence": 0.0,
    }
    pa.Table.from_pylist([sample.quality], schema=QUALITY_SCHEMA)


def test_figures_of_an_absent_modality_are_absent(tmp_path):
    silent = encode(write_media(tmp_path / "silent.mp4", numbered(40)))
    assert "silence" not in silent.quality and silent.features.keys() == {"video"}
    blind = encode(write_media(tmp_path / "blind.mp4", sound=sine(440, 1.0)))
    assert blind.quality == {"decoded_audio": 1.0, "silence": 0.0}


def test_a_still_slide_with_silence_is_a_clip(tmp_path):
    slide = write_media(tmp_path / "slide.mp4", numbered(1) * 40, sound=sine(440, 1.6, gain=0))
    sample = encode(slide)
    assert sample.quality["repeated_frames"] == pytest.approx(39 / 40) and sample.quality["silence"] == 1.0


def damaged(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "damaged":
        return wreck_packet(write_media(path, noise(40), gop=100, bframes=0), 16 * TICKS)  # 16 of 40 frames are good
    if kind == "cut picture":
        return cut(write_media(path, noise(50), faststart=True), 0.5)
    if kind == "cut sound":
        return cut(write_media(path, sound=sine(440, 4.0), faststart=True), 0.5)
    still = numbered(1) * 30 + numbered(10)  # the first of these ten is the same again
    return write_media(path, still, sound=sine(440, 0.8).tolist() + [0.0] * 12_800)


@pytest.mark.parametrize(
    ("kind", "modalities", "loose", "strict", "message"),
    [
        (
            "damaged",
            ("video",),
            {"min_good_frames": 0.35},
            {},
            r"the picture is damaged: good_frames 0\.4 is below --quality\.min-good-frames 0\.5",
        ),
        (
            "cut picture",
            ("video",),
            {"min_decoded": 0.4},
            {},
            r"the picture is cut off: decoded_video 0\.\d+ is below --quality\.min-decoded 0\.9",
        ),
        (
            "cut sound",
            ("audio",),
            {"min_decoded": 0.3},
            {},
            r"the sound is cut off or damaged: decoded_audio 0\.\d+ is below --quality\.min-decoded 0\.9",
        ),
        (
            "still",
            ("video",),
            {},
            {"max_repeated": 0.7},
            r"the picture stands still: repeated_frames 0\.75 is above --quality\.max-repeated 0\.7",
        ),
        (
            "quiet",
            ("audio",),
            {},
            {"max_silence": 0.4},
            r"the sound is silence: silence 0\.\d+ is above --quality\.max-silence 0\.4",
        ),
    ],
)
def test_a_clip_beyond_a_threshold_fails_with_figure_threshold_and_option(
    tmp_path, kind, modalities, loose, strict, message
):
    path = damaged(tmp_path, kind)
    assert encode(path, modalities, **loose).features.keys() == set(modalities)
    with pytest.raises(MediaError, match=message) as caught:
        encode(path, modalities, **strict)
    assert caught.value.stage == "quality" and str(path) in str(caught.value)


@pytest.mark.parametrize("threshold", [field.name for field in dataclasses.fields(QualitySpec)])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold, value):
    with pytest.raises(ValueError, match=f"--quality.{threshold.replace('_', '-')} .* is not a share from 0 to 1"):
        QualitySpec(**{threshold: value})


def test_thresholds_and_sampling_are_part_of_the_stores_spec():
    spec = EncoderSpec(VideoSpec(), AudioSpec())
    stricter = dataclasses.replace(spec, quality=QualitySpec(min_good_frames=1.0))
    for modality in ("video", "audio"):
        assert spec.features()[modality] != stricter.features()[modality]
        assert stricter.features()[modality].encoder["quality"]["min_good_frames"] == 1.0
    sparse = EncoderSpec(VideoSpec(sampling="keyframes"), None).features()["video"].encoder
    assert (sparse["sampling"], sparse["decoder"]) == ("keyframes", "pyav")
