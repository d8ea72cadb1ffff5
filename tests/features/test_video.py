"""The decoder contract for frames: every decoder gives the frame on screen at (k + 0.5) / fps, cropped and scaled."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mediafiles import numbered, numbers, rotate, sine, write_media

import features.video
from features.errors import MediaError
from features.video import VideoSpec, decode_frames, resolve_decoder

DECODERS = ["pyav", "auto"] + (["decord"] if features.video.decord else [])
ZOO = Path(__file__).parents[2].parent / "shared/data/media_zoo"

contract = pytest.mark.parametrize("decoder", DECODERS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 numbered frames at 25 per second: 1.6 s, B-frames, a key frame every 12."""
    return write_media(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(40), sound=sine(440, 1.6))


@contract
def test_each_frame_is_the_one_on_screen_at_its_time(clip, decoder):
    frames = decode_frames(clip, VideoSpec(fps=12.5, size=32, decoder=decoder))
    assert frames.values.shape == (20, 32, 32, 3) and frames.values.dtype == np.uint8
    assert frames.duration == pytest.approx(1.6)
    np.testing.assert_allclose(frames.times, (np.arange(20) + 0.5) / 12.5)
    assert numbers(frames.values) == [int(t * 25 + 1e-6) for t in frames.times]


@contract
def test_sampling_sparser_than_key_frames_still_finds_the_right_frames(clip, decoder):
    frames = decode_frames(clip, VideoSpec(fps=2.5, size=32, decoder=decoder))
    assert numbers(frames.values) == [5, 15, 25, 35]


@contract
def test_sampling_faster_than_the_file_repeats_frames(clip, decoder):
    frames = decode_frames(clip, VideoSpec(fps=50, size=32, decoder=decoder))
    assert numbers(frames.values) == [k // 2 for k in range(80)]


@contract
def test_a_variable_frame_rate_is_sampled_by_time_not_by_index(tmp_path, decoder):
    shown = [0, 20, 40, 60, 80, 500, 900, 920]  # ms
    path = write_media(tmp_path / "vfr.mp4", numbered(len(shown)), pts=shown)
    frames = decode_frames(path, VideoSpec(fps=10, size=32, decoder=decoder))
    wanted = [max(n for n, ms in enumerate(shown) if ms / 1000 <= t) for t in frames.times]
    assert numbers(frames.values) == wanted
    assert wanted[:9] == [2, 4, 4, 4, 4, 5, 5, 5, 5]


@contract
def test_a_clip_shorter_than_a_sampling_step_gives_one_frame(tmp_path, decoder):
    path = write_media(tmp_path / "short.mp4", numbered(2))
    frames = decode_frames(path, VideoSpec(fps=2, size=32, decoder=decoder))
    assert len(frames.values) == 1 and 0 < frames.times[0] <= frames.duration


@contract
@pytest.mark.parametrize(("start", "end"), [(0.4, 1.2), (0.9, None), (None, 0.5), (1.0, 99.0), (0.02, 0.03)])
def test_a_segment_holds_the_frames_of_its_own_time(clip, decoder, start, end):
    frames = decode_frames(clip, VideoSpec(fps=12.5, size=32, decoder=decoder), start, end)
    begin, until = start or 0.0, min(end or 1.6, 1.6)
    assert frames.duration == pytest.approx(until - begin)
    times = begin + (np.arange(max(1, round((until - begin) * 12.5))) + 0.5) / 12.5
    np.testing.assert_allclose(frames.times, np.minimum(times, until))
    assert numbers(frames.values) == [min(int(t * 25 + 1e-6), 39) for t in times]


@contract
def test_a_segment_that_starts_after_the_end_says_so(clip, decoder):
    with pytest.raises(MediaError, match=r"segment starts at 9 s, but the video ends at 1\.600 s"):
        decode_frames(clip, VideoSpec(decoder=decoder), 9.0, 10.0)


def test_a_segment_that_ends_before_it_starts_says_so(clip):
    with pytest.raises(MediaError, match="0 <= start < end"):
        decode_frames(clip, VideoSpec(), 1.0, 0.5)


def quadrants():
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[:48, :64], picture[:48, 64:], picture[48:, :64], picture[48:, 64:] = 30, 90, 150, 210
    return [picture] * 3


@contract
@pytest.mark.parametrize(
    ("crop", "level"),
    [((0, 0, 0.5, 0.5), 30), ((0.5, 0, 1, 0.5), 90), ((0, 0.5, 0.5, 1), 150), ((0.6, 0.6, 0.9, 0.9), 210)],
)
def test_the_crop_is_cut_in_fractions_of_the_picture(tmp_path, decoder, crop, level):
    path = write_media(tmp_path / "quadrants.mp4", quadrants())
    frames = decode_frames(path, VideoSpec(fps=25, size=20, crop=crop, decoder=decoder))
    assert frames.values.shape == (3, 20, 20, 3)
    assert abs(np.median(frames.values) - level) < 4


@contract
@pytest.mark.parametrize(("turns", "corner"), [(1, 150), (2, 210), (3, 90)])
def test_a_phones_rotation_is_applied(tmp_path, decoder, turns, corner):
    path = rotate(write_media(tmp_path / "turned.mp4", quadrants()), turns)
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
    assert abs(np.median(frames.values[:, :14, :14]) - corner) < 4


@pytest.mark.skipif("decord" not in DECODERS, reason="decord has no wheel for this machine")
def test_decoders_agree_on_moving_pictures(tmp_path):
    coarse = np.random.default_rng(0).integers(60, 200, (30, 9, 12, 3), np.uint8)
    path = write_media(tmp_path / "noise.mp4", coarse.repeat(16, 1).repeat(16, 2), fps=30)
    crop = (0.3, 0.4, 0.7, 0.9)
    a, b = (decode_frames(path, VideoSpec(20, 48, crop, decoder)) for decoder in ("decord", "pyav"))
    np.testing.assert_array_equal(a.times, b.times)
    assert np.abs(a.values.astype(float) - b.values).mean() < 2


@contract
def test_a_file_without_pictures_has_no_frames(tmp_path, decoder):
    assert decode_frames(write_media(tmp_path / "sound.mp4", sound=sine(440, 0.5)), VideoSpec(decoder=decoder)) is None


@contract
def test_bytes_from_a_remote_file_decode_like_the_file(clip, decoder, monkeypatch):
    spec = VideoSpec(size=32, decoder=decoder)
    expected = decode_frames(clip, spec, 0.3).values
    monkeypatch.setattr(features.video, "open_source", lambda uri: io.BytesIO(Path(uri).read_bytes()))
    np.testing.assert_array_equal(decode_frames(clip, spec, 0.3).values, expected)


def test_a_file_uri_is_a_path(clip):
    assert decode_frames(Path(clip).as_uri(), VideoSpec(size=32)).values.shape == (20, 32, 32, 3)


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no film, only words\n" * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("no index", "cut off"):
        noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
        write_media(path, noise, sound=sine(440, 1.6), faststart=kind == "cut off")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "damaged":
        noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
        data = bytearray(Path(write_media(path, noise)).read_bytes())
        data[len(data) // 2 : len(data) // 2 + 4000] = b"\xff" * 4000
        path.write_bytes(data)
    return str(path)


@contract
@pytest.mark.parametrize(
    ("kind", "stage", "message"),
    [
        ("missing", "open", "does not exist"),
        ("empty", "open", "is empty"),
        ("text", "open", "is not a media file"),
        ("folder", "open", "is not a file"),
        ("no index", "open", "is not a media file"),
        ("cut off", "video", "cut off|do not decode|does not decode"),
        ("damaged", "video", "do not decode|does not decode"),
    ],
)
def test_a_broken_file_is_one_named_error(tmp_path, decoder, kind, stage, message):
    with pytest.raises(MediaError, match=message) as caught:
        decode_frames(broken(tmp_path, kind), VideoSpec(decoder=decoder))
    assert caught.value.stage == stage
    assert "\n" not in str(caught.value)


def test_a_media_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("video", "a.mp4 is broken")))
    assert (error.stage, str(error)) == ("video", "a.mp4 is broken")


def test_a_crop_outside_the_picture_is_refused():
    with pytest.raises(ValueError, match="left < right"):
        VideoSpec(crop=(0.7, 0, 0.3, 1))


def test_widths_that_decord_misreads_are_refused_or_left_to_pyav(clip):
    with pytest.raises(ValueError, match="decord misreads pictures 48 pixels wide"):
        VideoSpec(size=48, decoder="decord")
    assert numbers(decode_frames(clip, VideoSpec(fps=2.5, size=48)).values) == [5, 15, 25, 35]


def test_auto_is_decord_where_it_is_installed():
    assert resolve_decoder("auto") == ("decord" if features.video.decord else "pyav")
    assert resolve_decoder("pyav") == "pyav"


def test_reading_frames_needs_no_torch():
    code = "import sys, features.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


UNUSABLE = ("corrupt_nal_mp4", "undecodable_mp4", "truncated_no_moov_mp4", "damaged_mpeg1_mpg", "zero_byte_webm")


@pytest.mark.data
@pytest.mark.data
@pytest.mark.skipif(not ZOO.is_dir(), reason="needs ../shared/data/media_zoo")
def test_every_file_of_the_zoo_is_frames_or_a_named_failure():
    failed = []
    for path in sorted(ZOO.glob("[0-9]*")):
        try:
            frames = decode_frames(str(path), VideoSpec(size=32))
            assert frames is None or len(frames.values) == max(1, round(frames.duration * 12.5)), path.name
        except MediaError:
            failed.append(path.name)
    assert [name for name in failed if not any(tag in name.replace("__", "_") for tag in UNUSABLE)] == []
    assert len(failed) == len(UNUSABLE)
