"""What a file says is decided once: streams, orientation, times and ends, for every decoder and every segment.

SEEDS=200 for more random files than the suite makes.
"""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from mediafiles import numbered, numbers, sine, write_media

import features.decode.media
import features.decode.video
from features.corpus.manifest import Clip
from features.decode.audio import decode_sound, encode_audio
from features.decode.clip import encode_clip
from features.decode.media import MediaFile
from features.decode.probe import Orientation, frame_times
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.decode.video import decode_frames
from features.errors import MediaError

CASES = Path(__file__).parents[3].parent / "shared/data/cases"
EVERY = EncoderSpec(VideoSpec(fps=12.5), AudioSpec())

data = pytest.mark.data
here = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/data/cases")
decoders = pytest.mark.parametrize("decoder", ["auto", "pyav"])

MATRICES = {  # a, b, c, d of the display matrix: x' = a x + c y, y' = b x + d y
    (False, False, False): (1, 0, 0, 1),
    (False, True, False): (-1, 0, 0, 1),
    (False, False, True): (1, 0, 0, -1),
    (False, True, True): (-1, 0, 0, -1),
    (True, False, False): (0, 1, 1, 0),
    (True, True, False): (0, 1, -1, 0),
    (True, False, True): (0, -1, 1, 0),
    (True, True, True): (0, -1, -1, 0),
}


def corners(picture):
    """The levels of a picture's corners, row by row, to the nearest of 30, 90, 150 and 210."""
    size = len(picture)
    places = [(y, x) for y in (size // 4, 3 * size // 4) for x in (size // 4, 3 * size // 4)]
    levels = [float(picture[y - 3 : y + 3, x - 3 : x + 3].mean()) for y, x in places]
    return [min((30, 90, 150, 210), key=lambda level: abs(level - value)) for value in levels]


def quadrants(count=50):
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[:48, :64], picture[:48, 64:], picture[48:, :64], picture[48:, 64:] = 30, 90, 150, 210
    return [picture] * count


def turn(path, matrix):
    """Write a display matrix into an mp4's track header."""
    a, b, c, d = matrix
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    Path(path).write_bytes(data)
    return path


def expected_corners(matrix):
    """Where the four corners come to lie: by the matrix itself, on a picture of 2 x 2."""
    a, b, c, d = matrix
    placed = {}
    for (y, x), level in zip([(-1, -1), (-1, 1), (1, -1), (1, 1)], (30, 90, 150, 210), strict=True):
        placed[b * x + d * y, a * x + c * y] = level
    return [placed[key] for key in sorted(placed)]


@decoders
@pytest.mark.parametrize("state", MATRICES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_picture_is_upright_in_all_eight_states(tmp_path, decoder, state, suffix):
    path = turn(write_media(tmp_path / "a.mp4", quadrants()), MATRICES[state])
    if suffix == "mkv":
        path = remuxed(path, tmp_path / "a.mkv")
        if state not in ((False, False, False), (True, True, False), (True, False, True), (False, True, True)):
            pytest.xfail("Matroska states rotations alone") if not frame_matrix(path) else None
    for segment in ((None, None), (0.5, 1.0), (1.2, None)):
        frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), *segment)
        assert corners(frames.values[0]) == expected_corners(MATRICES[state]), segment
        assert frames.quality["good_frames"] == 1


def frame_matrix(path):
    with av.open(path) as container:
        return "DISPLAYMATRIX" in next(container.decode(video=0)).side_data


def remuxed(path, target, **options):
    """The same packets in another container."""
    with av.open(path) as source, av.open(str(target), "w", **options) as copy:
        streams = {s.index: copy.add_stream_from_template(s) for s in source.streams}
        matrix = next(av.open(path).decode(video=0)).side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            a, b, _, c, d = (v / 65536 for v in np.frombuffer(bytes(matrix), np.int32)[:5].tolist())
            streams[source.streams.video[0].index].set_display_matrix(
                [int(v * 65536) for v in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
            )
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                copy.mux(packet)
    return str(target)


@pytest.mark.parametrize("state", MATRICES)
def test_an_orientation_is_a_rotation_where_its_determinant_is_positive(state):
    a, b, c, d = MATRICES[state]
    assert Orientation(*state).is_rotation == (a * d - b * c > 0)


def write_streams(path, *streams, fps=25):
    """A file of several streams: (kind, frames or samples, disposition), each with packets of its own."""
    with av.open(str(path), "w") as container:
        outs = []
        for kind, content, disposition in streams:
            if kind == "video":
                out = container.add_stream("libx264", rate=fps, options={"crf": "8", "g": "12"})
                out.height, out.width, out.pix_fmt = *content[0].shape[:2], "yuv420p"
            else:
                out = container.add_stream("aac", rate=16_000, layout="mono")
            out.disposition = disposition
            outs.append(out)
        for out, (kind, content, _) in zip(outs, streams, strict=True):
            if kind == "video":
                for picture in content:
                    container.mux(out.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            else:
                for at in range(0, len(content), 1024):
                    frame = av.AudioFrame.from_ndarray(content[None, at : at + 1024].copy(), "fltp", "mono")
                    frame.sample_rate, frame.pts, frame.time_base = 16_000, at, Fraction(1, 16_000)
                    container.mux(out.encode(frame))
            container.mux(out.encode(None))
    return str(path)


DEFAULT, NONE = av.stream.Disposition.default, av.stream.Disposition(0)


def flat(level, count=40, width=64, height=48):
    return [np.full((height, width, 3), level, np.uint8)] * count


@decoders
@pytest.mark.parametrize(
    ("streams", "level"),
    [
        ([(flat(60), DEFAULT), (flat(180, width=128, height=96), NONE)], 60),  # the default flag before the pixels
        ([(flat(60), NONE), (flat(180, width=128, height=96), DEFAULT)], 180),
        ([(flat(60), NONE), (flat(180, width=128, height=96), NONE)], 180),  # no flag: the most pixels
        ([(flat(60, 1, 320, 240), DEFAULT), (flat(180), NONE)], 180),  # a thumbnail that calls itself the default
        ([(flat(60, 1), NONE), (flat(180), DEFAULT)], 180),
    ],
)
def test_one_picture_stream_is_chosen_for_whole_rows_and_segments(tmp_path, decoder, streams, level):
    path = write_streams(tmp_path / "a.mkv", *(("video", frames, flag) for frames, flag in streams))
    for segment in ((None, None), (0.4, 0.8), (1.0, None)):
        frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), *segment)
        assert abs(frames.values.mean() - level) < 6 and frames.quality["decoded_video"] in (1.0, None), segment


def test_the_default_sound_is_heard(tmp_path):
    quiet, loud = sine(440, 1, gain=0.1), sine(440, 1, gain=0.6)
    for flags, peak in (((NONE, DEFAULT), 0.6), ((DEFAULT, NONE), 0.1)):
        path = write_streams(tmp_path / "a.mkv", ("audio", quiet, flags[0]), ("audio", loud, flags[1]))
        assert np.abs(decode_sound(path).samples[2000:14000]).max() == pytest.approx(peak, abs=0.05)


@decoders
def test_frames_of_an_avi_with_b_frames_come_in_their_order(tmp_path, decoder):
    path = write_media(tmp_path / "b.avi", numbered(40), bframes=2, sound=None)
    for codec, options in (("libx264", None), ("mpeg4", {"b": "4000000", "bf": "2", "g": "12"})):
        path = write_media(tmp_path / f"{codec}.avi", numbered(40), codec=codec, options=options, bframes=2)
        frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
        assert numbers(frames.values) == list(range(40)), codec
        part = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), 0.8, 1.2)
        assert numbers(part.values) == list(range(20, 30)), codec
        assert frames.quality["good_frames"] == part.quality["good_frames"] == 1


@decoders
def test_an_mp4_without_times_of_display_is_shown_in_the_order_in_which_frames_come_out(tmp_path, decoder):
    path = Path(write_media(tmp_path / "b.mp4", numbered(40), bframes=2))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"ctts", b"free").replace(b"edts", b"free"))
    frames = decode_frames(str(path), VideoSpec(fps=25, size=32, decoder=decoder))
    assert numbers(frames.values) == list(range(40))


@decoders
@pytest.mark.parametrize("bframes", [0, 2])
def test_a_bare_stream_is_timed_by_its_frame_rate(tmp_path, decoder, bframes):
    path = write_media(tmp_path / "raw.h264", numbered(40), bframes=bframes)
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
    assert numbers(frames.values) == list(range(40)) and frames.duration == pytest.approx(1.6)
    part = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), 0.8, 1.2)
    assert numbers(part.values) == list(range(20, 30))
    assert decode_sound(path) is None


@decoders
@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_interlaced_frames_are_whole(tmp_path, decoder, codec):
    options = {"b": "4000000", "g": "12", "flags": "+ildct+ilme", "crf": "8"}
    path = write_media(tmp_path / "a.ts", numbered(40), codec=codec, options=options)
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
    assert numbers(frames.values) == list(range(40)) and frames.quality["good_frames"] == 1


def fragmented(path, frames, skipped):
    """The fragments of an mp4 after the first ones: its header's duration is where the whole presentation ends."""
    parts = []
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+default_base_moof+empty_moov"}) as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"crf": "8", "g": "10", "sc_threshold": "0", "bf": "0"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data, at, fragment = Path(path).read_bytes(), 0, 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        fragment += kind == b"moof"
        if kind in (b"ftyp", b"moov") or (fragment > skipped and kind in (b"moof", b"mdat")):
            box = bytearray(data[at : at + size])
            if kind == b"moov":  # the durations of the whole: mvhd and tkhd in milliseconds, mdhd in ticks
                whole, scale = len(frames) / 25, struct.unpack_from(">I", box, box.index(b"mdhd") + 16)[0]
                struct.pack_into(">I", box, box.index(b"mvhd") + 20, round(whole * 1000))
                struct.pack_into(">I", box, box.index(b"tkhd") + 24, round(whole * 1000))
                struct.pack_into(">I", box, box.index(b"mdhd") + 20, round(whole * scale))
            parts.append(bytes(box))
        at += size
    Path(path).write_bytes(b"".join(parts))
    return str(path)


@decoders
def test_the_duration_of_a_fragmented_file_that_begins_late_is_its_end(tmp_path, decoder):
    path = fragmented(tmp_path / "dash.mp4", numbered(40), skipped=2)
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder))
    assert numbers(frames.values) == list(range(20, 40))
    assert frames.quality["decoded_video"] == 1 and frames.duration == pytest.approx(0.8)
    part = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), 0.4, 0.6)
    assert numbers(part.values) == [30, 31, 32, 33, 34]


def clip(path, start=None, end=None):
    return Clip("a", str(path), None, None, None, start, end, "train", None, None), {"video": str(path)}


def empty_track(path, kind):
    """A Matroska file that declares picture and sound, and has packets of one of them."""
    other = {"audio": "video", "video": "audio"}[kind]
    content = {"video": numbered(40), "audio": sine(440, 1.6)}
    whole = write_streams(path.with_name("whole.mkv"), *((k, content[k], DEFAULT) for k in ("video", "audio")))
    with av.open(whole) as source, av.open(str(path), "w") as copy:
        streams = {s.index: copy.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None and packet.stream.type == other:
                packet.stream = streams[packet.stream.index]
                copy.mux(packet)
    return path


@pytest.mark.parametrize(("kind", "kept"), [("audio", "video"), ("video", "audio")])
@pytest.mark.parametrize("segment", [(None, None), (0.5, 1.0)])
def test_a_track_that_is_declared_and_empty_is_absent(tmp_path, kind, kept, segment):
    path = empty_track(tmp_path / "a.mkv", kind)
    assert encode_clip(*clip(path, *segment), EVERY).features.keys() == {kept}


def test_a_track_that_a_transport_stream_declares_and_never_sends_is_absent(tmp_path):
    path = str(tmp_path / "a.ts")
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "8"})
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        container.add_stream("aac", rate=16_000, layout="mono")
        for picture in numbered(40):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    for segment in ((None, None), (0.6, 1.0)):
        assert encode_clip(*clip(path, *segment), EVERY).features.keys() == {"video"}


@decoders
@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("mpg", "mpeg2video")])
def test_files_put_behind_each_other_are_refused_and_not_shown_at_once(tmp_path, decoder, suffix, codec):
    options = {"b": "4000000", "g": "12", "bf": "2", "crf": "8"}
    path = Path(write_media(tmp_path / f"a.{suffix}", numbered(40), codec=codec, options=options))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MediaError, match="begin anew, as of joined files; remux it"):
        decode_frames(str(path), VideoSpec(decoder=decoder))
    assert numbers(decode_frames(str(path), VideoSpec(fps=25, decoder=decoder), 0.2, 0.6).values) == list(range(5, 15))


def test_a_segment_after_the_picture_has_ended_keeps_its_sound(tmp_path):
    path = write_media(tmp_path / "a.mkv", numbered(10), sound=sine(440, 3))
    assert encode_clip(*clip(path, 2.0, 3.0), EVERY).features.keys() == {"audio"}
    with pytest.raises(MediaError, match="starts at 5 s, but the video ends at") as caught:
        encode_clip(*clip(path, 5.0, 6.0), EVERY)
    assert type(caught.value) is MediaError


def write_wav(path, samples, rate=16_000):
    """(channels, N) float samples as plain PCM, whose header counts channels and does not name them."""
    pcm = (samples.T * 32767).astype("<i2").tobytes()
    channels = len(samples)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(pcm), b"WAVE", b"fmt ", 16, 1, channels, rate,
                       rate * channels * 2, channels * 2, 16, b"data", len(pcm))  # fmt: skip
    path.write_bytes(head + pcm)
    return str(path)


@pytest.mark.parametrize("channels", [3, 4, 6, 8])
def test_every_channel_of_a_layout_that_is_not_stated_counts_as_much(tmp_path, channels):
    for channel in range(channels):
        samples = np.zeros((channels, 16_000), np.float32)
        samples[channel] = sine(440, 1)
        sound = decode_sound(write_wav(tmp_path / "a.wav", samples))
        np.testing.assert_allclose(sound.samples, samples.mean(axis=0), atol=1e-4)


def test_the_picture_is_probed_alike_from_bytes_and_files(tmp_path):
    import io

    path = turn(write_media(tmp_path / "a.mp4", numbered(40)), MATRICES[True, True, False])
    a, b = (frame_times(MediaFile(path, s), 0.0, None) for s in (path, io.BytesIO(Path(path).read_bytes())))
    np.testing.assert_array_equal(a.times, b.times)
    assert (a.orientation, a.timing, a.end) == (b.orientation, b.timing, b.end)


def offset_media(path, frames, fps, offset, order, sound):
    """Picture and sound that begin late, in either order of streams."""
    with av.open(str(path), "w") as container:
        streams = {}
        for kind in order:
            if kind == "video":
                out = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "8", "g": "9", "bf": "2"})
                out.height, out.width, out.pix_fmt = *frames[0].shape[:2], "yuv420p"
            else:
                out = container.add_stream("aac", rate=16_000, layout="mono")
            streams[kind] = out
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = 1 / Fraction(fps)
            frame.pts = number + round(offset * Fraction(fps))
            container.mux(streams["video"].encode(frame))
        container.mux(streams["video"].encode(None))
        for at in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, at : at + 1024].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, at + round(offset * 16_000), Fraction(1, 16_000)
            container.mux(streams["audio"].encode(frame))
        container.mux(streams["audio"].encode(None))
    return str(path)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS", 12))))
def test_every_decoder_and_segment_shows_the_same_frames(tmp_path, seed):
    """Random container, orientation, stream order, start and frame rate; each frame is the one of its time."""
    rng = np.random.default_rng(seed)
    suffix = rng.choice(["mp4", "mkv", "ts", "mov"])
    fps = str(rng.choice(["25", "30000/1001", "12", "24"]))
    offset = float(rng.choice([0.0, 0.0, 2.0, 7.5]))
    order = list(rng.permutation(["video", "audio"]))
    state = list(MATRICES)[rng.integers(8)] if suffix in ("mp4", "mov") else (False, False, False)
    path = offset_media(tmp_path / f"a.{suffix}", numbered(40), fps, offset, order, sine(440, 40 / Fraction(fps)))
    if state != (False, False, False):
        data = Path(path).read_bytes()
        first = data.index(b"tkhd")
        if order[0] == "audio":
            first = data.index(b"tkhd", first + 4)
        a, b, c, d = MATRICES[state]
        matrix = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
        Path(path).write_bytes(data[: first + 44] + matrix + data[first + 80 :])
    shown = frame_times(MediaFile(path), 0.0, None)
    assert shown.orientation == Orientation(*state)
    rate = float(Fraction(fps))
    begins = shown.times[0]
    options = ["auto", "pyav"]
    if (
        features.decode.video.decord
        and suffix != "ts"
        and (Orientation(*state).is_rotation or state == (False, False, False))
    ):
        options.append("decord")
    for decoder in options:
        spec = VideoSpec(fps=10, size=32, decoder=decoder)
        for start, end in ((None, None), (begins + 0.3, begins + 0.9), (begins + 0.7, None)):
            frames = decode_frames(path, spec, start, end)
            wanted = np.clip(np.floor((frames.times - begins) * rate + 1e-2), 0, 39)
            assert numbers(frames.values) == wanted.tolist(), (decoder, start, suffix, fps, offset, order, state)


@data
@here
@decoders
class TestCases:
    """The files of the cases' README with their right values."""

    @pytest.mark.parametrize(
        ("name", "corners"),
        [("base.mp4", "RGBn"), ("hflip.mp4", "GRnB"), ("rot90.mkv", "GnRB"), ("thumbfirst.mkv", "RGBn")],
    )
    def test_orientation_and_streams(self, decoder, name, corners):
        for segment in ((None, None), (3.0, 4.0), (6.5, None)):
            frames = decode_frames(str(CASES / name), VideoSpec(fps=12.5, decoder=decoder), *segment)
            assert "".join(colour(frames.values[-1], place) for place in range(4)) == corners, segment
            moving = frames.values.reshape(len(frames.values), -1)
            assert len(np.unique(moving, axis=0)) > 0.9 * len(moving)

    def test_of_two_pictures_the_default_one(self, decoder):
        whole = decode_frames(str(CASES / "twovid.mp4"), VideoSpec(fps=25, decoder=decoder))
        part = decode_frames(str(CASES / "twovid.mp4"), VideoSpec(fps=25, decoder=decoder), 3.0, 4.0)
        assert np.abs(whole.values[75:100].astype(float) - part.values).mean() < 3
        assert frame_times(MediaFile(str(CASES / "twovid.mp4")), 0.0, None).stream == 0

    @pytest.mark.parametrize("name", ["bin.avi", "bin.mp4"])
    def test_frames_in_steps_of_two(self, decoder, name):
        frames = decode_frames(str(CASES / name), VideoSpec(fps=12.5, decoder=decoder))
        assert [bits(picture) for picture in frames.values] == list(range(1, 200, 2))
        part = decode_frames(str(CASES / name), VideoSpec(fps=12.5, decoder=decoder), 3.0, 5.0)
        assert [bits(picture) for picture in part.values] == list(range(76, 125, 2))

    def test_fields_fragments_and_bare_streams(self, decoder):
        for name, fps, count in (("paffn.mts", 30000 / 1001, 100), ("dash.mp4", 25, 102), ("raw.h264", 25, 200)):
            frames = decode_frames(str(CASES / name), VideoSpec(fps=fps, decoder=decoder))
            assert abs(len(frames.values) - count) <= 1 and frames.quality["good_frames"] == 1, name
            assert not frames.quality["salvaged"] and frames.quality["decoded_video"] in (1, None), name
            assert frames.quality["repeated_frames"] < 0.1, name

    def test_empty_tracks(self, decoder):
        for name, kept in (("noaud.mkv", "video"), ("novid.webm", "audio")):
            assert encode_clip(*clip(CASES / name), EVERY).features.keys() == {kept}


@data
@here
def test_the_cases_sound():
    sound = decode_sound(str(CASES / "twoaud.mkv"))
    default = av.open(str(CASES / "twoaud.mkv"))
    frames = np.concatenate([f.to_ndarray()[0] for f in default.decode(default.streams.audio[1])])
    np.testing.assert_allclose(sound.samples[:5000], frames[:5000], atol=1e-3)
    deep = decode_sound(str(CASES / "p6_lfe.wav"))
    assert np.abs(deep.samples).max() == pytest.approx(0.5 / 6, abs=0.01)


def colour(picture, place):
    """R, G, B, or n for the corner with the frame's number; place: row by row."""
    y, x = divmod(place, 2)
    size = len(picture)
    red, green, blue = picture[(1 + 3 * y) * size // 5, (1 + 3 * x) * size // 5].astype(int)
    strongest = max(red, green, blue)
    named = [n for n, v in zip("RGB", (red, green, blue), strict=True) if v == strongest]
    return named[0] if strongest - sorted((red, green, blue))[1] > 60 else "n"


def bits(picture):
    """The number in the corner at the bottom right: 4 x 2 cells, most significant first."""
    half = len(picture) // 2
    cells = picture[half:, half:].mean(axis=-1).reshape(2, half // 2, 4, half // 4).mean(axis=(1, 3))
    return int("".join(str(int(cell > 128)) for cell in cells.ravel()), 2)


def test_a_file_that_picture_and_sound_share_is_read_once_and_gives_the_same(tmp_path, monkeypatch):
    """What one decoder leaves open changes nothing for the next."""
    opened = []
    original = features.decode.media.open_source
    monkeypatch.setattr(features.decode.media, "open_source", lambda uri: opened.append(uri) or original(uri))
    late = [500 + 40 * n for n in range(40)]  # a picture that begins after the sound
    for suffix, bframes, pts in (("mp4", 2, None), ("mkv", 2, None), ("mp4", 0, None), ("mov", 0, late)):
        path = write_media(
            tmp_path / f"a{bframes}.{suffix}", numbered(40), sound=sine(440, 1.6), bframes=bframes, pts=pts
        )
        for segment in ((None, None), (0.7, 1.2)):
            opened.clear()
            sample = encode_clip(*clip(path, *segment), EVERY).features
            assert opened == [str(path)]
            np.testing.assert_array_equal(sample["video"], decode_frames(path, EVERY.video, *segment).values)
            np.testing.assert_array_equal(sample["audio"], encode_audio(path, EVERY.audio, *segment).values)
