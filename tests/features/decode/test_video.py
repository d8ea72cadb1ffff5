"""The decoder contract for frames: every decoder gives the frame on screen at (k + 0.5) / fps, cropped and scaled."""

import io
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from mediafiles import cut, noise, numbered, numbers, rotate, sine, wreck_packet, write_media

import features.decode.video
from features.decode.specs import VideoSpec, resolve_decoder
from features.decode.video import decode_frames
from features.errors import MediaError

DECODERS = ["pyav", "auto"] + (["decord"] if features.decode.video.decord else [])

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


def check_segments(path, firsts):
    """Segments of four frames hold their own of a numbered clip (again from 0 after 40), and none counts as damaged."""
    for first in firsts:
        frames = decode_frames(path, VideoSpec(fps=25, size=32), first / 25, (first + 4) / 25)
        assert numbers(frames.values) == [(first + k) % 40 for k in range(4)], first
        assert not frames.quality["salvaged"] and frames.quality["good_frames"] == 1, first


MPEG = {"b": "4000000", "g": "12", "sc_threshold": "1000000000"}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.ts", "mpeg2video", MPEG | {"bf": "2"}),
        ("a.mpg", "mpeg2video", MPEG | {"bf": "2"}),
        ("a.ts", "libx264", {"crf": "8", "x264-params": "keyint=12:scenecut=0"}),
        ("a.mp4", "libx264", {"crf": "8", "x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}),
        ("a.mkv", "libx264", {"crf": "8", "x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}),
    ],
)
def test_a_segment_holds_its_own_frames_wherever_a_seek_lands(tmp_path, name, codec, options):
    path = write_media(tmp_path / name, numbered(40) * 8, codec=codec, options=options)
    check_segments(path, [*range(1, 25), *range(290, 314)])


def test_what_only_the_index_calls_a_key_frame_is_none(tmp_path):
    path, picture = tmp_path / "a.3gp", noise(1, 128, 96)[0]
    write_media(path, [np.roll(picture, n, axis=1) for n in range(40)], codec="h263", options=MPEG)
    whole = decode_frames(str(path), VideoSpec(fps=25, size=32))
    data = bytearray(path.read_bytes())
    at = data.index(b"stss") + 12
    assert struct.unpack_from(">4I", data, at) == (1, 13, 25, 37)
    struct.pack_into(">4I", data, at, 1, 17, 29, 37)
    path.write_bytes(data)
    part = decode_frames(str(path), VideoSpec(fps=25, size=32), 20 / 25, 24 / 25)
    np.testing.assert_array_equal(part.values, whole.values[20:24])
    assert not part.quality["salvaged"]


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
@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("ten-bit.mp4", "libx264", "yuv420p10le", (64, 48)),
        ("ten-bit.mkv", "libx265", "yuv422p10le", (64, 48)),
        ("planar.mp4", "libx264", "yuv444p", (64, 48)),
        ("odd.mp4", "libx264", "yuv444p", (37, 23)),
        ("tiny.mp4", "libx264", "yuv444p", (1, 1)),
        ("alpha.mov", "qtrle", "argb", (64, 48)),
        ("grey.avi", "ffv1", "gray", (64, 48)),
        ("jpegs.avi", "mjpeg", "yuvj422p", (64, 48)),
        ("vp9.webm", "libvpx-vp9", "yuv420p", (64, 48)),
        ("av1.mkv", "libsvtav1", "yuv420p10le", (64, 64)),
        ("program.mpg", "mpeg2video", "yuv420p", (64, 48)),
    ],
)
def test_pictures_come_as_people_have_them(tmp_path, decoder, name, codec, pixels, size):
    path = write_media(tmp_path / name, numbered(36, *size)[::3], codec=codec, pixels=pixels)
    if decoder == "decord" and codec in ("libsvtav1", "mpeg2video"):
        with pytest.raises(MediaError, match=r"does not decode|take other pictures"):
            decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
        return
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
    assert [round(number / 3) for number in numbers(frames.values)] == list(range(12))  # some codecs change the grey
    assert frames.quality["salvaged"] is False and frames.quality["good_frames"] == 1.0


@contract
def test_a_file_without_pictures_has_no_frames(tmp_path, decoder):
    assert decode_frames(write_media(tmp_path / "sound.mp4", sound=sine(440, 0.5)), VideoSpec(decoder=decoder)) is None


@contract
def test_bytes_from_a_remote_file_decode_like_the_file(clip, decoder, monkeypatch):
    spec = VideoSpec(size=32, decoder=decoder)
    expected = decode_frames(clip, spec, 0.3).values
    monkeypatch.setattr(features.decode.media, "open_source", lambda uri: io.BytesIO(Path(uri).read_bytes()))
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
    elif kind == "no index":
        cut(write_media(path, noise(40), sound=sine(440, 1.6)), 0.5)
    elif kind == "no frame":
        with av.open(write_media(path, noise(4))) as container:
            stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
        for stamp in stamps:
            wreck_packet(path, stamp)
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
        ("no frame", "video", "no frame decodes|does not decode|take other pictures"),
    ],
)
def test_a_broken_file_is_one_named_error(tmp_path, decoder, kind, stage, message):
    with pytest.raises(MediaError, match=message) as caught:
        decode_frames(broken(tmp_path, kind), VideoSpec(decoder=decoder))
    assert caught.value.stage == stage
    assert "\n" not in str(caught.value)


SALVAGING = [decoder for decoder in DECODERS if decoder != "decord"]  # decord alone takes nothing that is damaged
TICKS = 512  # of an mp4's clock from one frame to the next, at 25 per second


def quality(path, start=None, end=None, **options):
    return decode_frames(str(path), VideoSpec(fps=25, size=32, **options), start, end).quality


@contract
def test_what_decodes_whole_is_not_salvaged(clip, decoder):
    wanted = {"salvaged": False, "good_frames": 1.0, "repeated_frames": 0.0, "decoded_video": 1.0}
    assert quality(clip, decoder=decoder) == wanted
    assert quality(clip, 0.4, 1.2, decoder=decoder) == wanted


@pytest.mark.parametrize("decoder", SALVAGING)
@pytest.mark.parametrize(
    ("wrecked", "good"), [(12 + 3, 40 - 9), (0, 40 - 12), (24, 40 - 12), (39, 40 - 1), (12 + 11, 40 - 1)]
)
def test_damage_costs_the_frames_up_to_the_next_key_frame(tmp_path, decoder, wrecked, good):
    path = tmp_path / "wrecked.mp4"
    write_media(path, noise(40), bframes=0)
    intact = decode_frames(str(path), VideoSpec(fps=25, size=32, decoder="pyav")).values  # as what is salvaged
    wreck_packet(path, wrecked * TICKS)
    frames = decode_frames(str(path), VideoSpec(fps=25, size=32, decoder=decoder))
    assert frames.values.shape == intact.shape
    assert (frames.quality["salvaged"], frames.quality["good_frames"]) == (True, pytest.approx(good / 40))
    until = (wrecked // 12 + 1) * 12
    sound = np.r_[0:wrecked, until:40].astype(int)
    np.testing.assert_array_equal(frames.values[sound], intact[sound])


def test_what_lies_outside_a_segment_damages_nothing_in_it(tmp_path):
    path = wreck_packet(write_media(tmp_path / "wrecked.mp4", noise(50), bframes=0), 30 * TICKS)
    assert quality(path, 0.0, 1.0)["salvaged"] is False
    assert quality(path, 36 / 25, None) == {
        "salvaged": False,
        "good_frames": 1.0,
        "repeated_frames": 0.0,
        "decoded_video": 1.0,
    }
    assert quality(path, 1.0, 1.4)["good_frames"] == pytest.approx(0.5)


def test_a_frame_that_is_missing_stays_the_one_before_it(tmp_path):
    path = tmp_path / "wrecked.mp4"
    write_media(path, numbered(40), gop=1)
    frames = decode_frames(wreck_packet(str(path), 7 * TICKS), VideoSpec(fps=25, size=32))
    assert numbers(frames.values) == [6 if n == 7 else n for n in range(40)]
    assert frames.quality["good_frames"] == pytest.approx(39 / 40)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_that_is_cut_off_gives_what_is_left_and_says_how_much(tmp_path, suffix):
    path = write_media(tmp_path / f"cut{suffix}", noise(50), faststart=True)
    whole = decode_frames(path, VideoSpec(fps=25, size=32, decoder="pyav")).values
    frames = decode_frames(cut(path, 0.5), VideoSpec(fps=25, size=32, decoder="pyav"))
    assert frames.quality["decoded_video"] == pytest.approx(frames.duration / 2.0, abs=0.06)
    assert 0.8 < frames.duration < 1.2 and len(frames.values) == round(frames.duration * 25)
    left = len(frames.values) - 3  # the last packet is torn
    np.testing.assert_array_equal(frames.values[:left], whole[:left])
    assert quality(path, 0.0, 0.5)["decoded_video"] == 1.0
    assert quality(path, 0.5, 1.5)["decoded_video"] == pytest.approx(frames.duration - 0.5, abs=0.11)


def test_a_webm_without_a_duration_per_stream_is_measured_by_its_longest_one(tmp_path):
    path = Path(write_media(tmp_path / "a.mkv", noise(50), sound=sine(440, 2.0)))
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"DURATIOX"))
    assert quality(path)["decoded_video"] is None
    assert quality(cut(path, 0.5))["decoded_video"] == pytest.approx(0.5, abs=0.1)


def test_a_broken_timestamp_costs_its_frame_and_not_the_memory(tmp_path):
    shown = [0, 20, 40, 60, 100, 120, 140, 500]  # ms
    path = Path(write_media(tmp_path / "vfr.mp4", numbered(len(shown)), pts=shown, bframes=0))
    data = bytearray(path.read_bytes())
    last = data.index(b"stts") + 12 + 8 * (int.from_bytes(data[data.index(b"stts") + 8 :][:4], "big") - 2)
    data[last + 4 : last + 8] = (0x7FFF0000).to_bytes(4, "big")
    path.write_bytes(data)
    frames = decode_frames(str(path), VideoSpec(fps=100, size=32))
    assert frames.duration < 12
    assert numbers(frames.values[:14:2]) == [0, 1, 2, 3, 3, 4, 5]


def test_frames_equal_to_the_one_before_are_counted(tmp_path):
    still = [picture for picture in numbered(10) for _ in range(4)]
    assert quality(write_media(tmp_path / "slow.mp4", still, gop=100))["repeated_frames"] == pytest.approx(30 / 40)
    assert quality(write_media(tmp_path / "still.mp4", still[:1]))["repeated_frames"] == 0.0


def test_non_reference_frames_are_left_out_and_stand_for_by_the_one_before(tmp_path):
    path = write_media(tmp_path / "b.mp4", numbered(40), bframes=2)
    with av.open(path) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        decoded = sorted(frame.pts // TICKS for frame in container.decode(video=0))
    assert 10 < len(decoded) < 30
    frames = decode_frames(path, VideoSpec(fps=25, size=32, sampling="nonref"))
    assert numbers(frames.values) == [max(d for d in decoded if d <= n) for n in range(40)]
    assert frames.quality["salvaged"] is False and frames.quality["good_frames"] == 1.0


@pytest.mark.parametrize(("start", "end"), [(None, None), (0.6, 1.4), (0.2, 0.3)])
def test_key_frames_stand_for_all_frames_up_to_the_next(clip, start, end):
    frames = decode_frames(clip, VideoSpec(fps=12.5, size=32, sampling="keyframes"), start, end)
    exact = decode_frames(clip, VideoSpec(fps=12.5, size=32), start, end)
    np.testing.assert_array_equal(frames.times, exact.times)
    assert numbers(frames.values) == [n // 12 * 12 for n in numbers(exact.values)]
    assert frames.duration == exact.duration and frames.quality["salvaged"] is False


@pytest.mark.parametrize(("sampling", "wrecked"), [("keyframes", 24), ("nonref", 24)])
def test_damage_is_counted_in_every_sampling(tmp_path, sampling, wrecked):
    path = wreck_packet(write_media(tmp_path / "wrecked.mp4", noise(48)), wrecked * TICKS)
    assert quality(path, sampling=sampling)["good_frames"] == pytest.approx(36 / 48, abs=2.5 / 48)
    assert quality(path, sampling=sampling)["salvaged"] is True


def test_decord_alone_knows_no_other_sampling_and_no_salvage(tmp_path):
    with pytest.raises(ValueError, match="sampling keyframes needs decoder auto or pyav"):
        VideoSpec(decoder="decord", sampling="keyframes")


@pytest.mark.skipif("decord" not in DECODERS, reason="decord has no wheel for this machine")
def test_decord_alone_refuses_what_is_damaged(tmp_path):
    path = wreck_packet(write_media(tmp_path / "wrecked.mp4", noise(40)), 12 * TICKS)
    with pytest.raises(MediaError, match="does not decode"):
        decode_frames(path, VideoSpec(decoder="decord"))


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
    assert resolve_decoder("auto") == ("decord" if features.decode.video.decord else "pyav")
    assert resolve_decoder("pyav") == "pyav"


def test_reading_frames_needs_no_torch():
    code = "import sys, features.decode.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
