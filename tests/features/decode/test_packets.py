"""Packets that are not one frame each, what only a frame says, and every decoder against FFmpeg from the beginning.

SEEDS=200 for more random files than the suite makes.
"""

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from mediafiles import noise, numbered, numbers, wreck_packet, write_media
from test_probe import corners, expected_corners, quadrants

from features.decode.media import MediaFile
from features.decode.probe import frame_times
from features.decode.specs import VideoSpec
from features.decode.video import decode_frames, decord
from features.errors import MediaError

NOTHING = b"\0\0\1\xb6\x50\x00\x7f"  # what is written behind a packet of two frames, that each has one again
DIVX = b"\0\0\1\xb2DivX503b1393p"  # by which decoders know that frames are packed
VOP = b"\0\0\1\xb6"

decoders = pytest.mark.parametrize("decoder", ["auto", "pyav"])


def rewritten(path, target, change):
    """The stream with other packets: what `change` makes of [(bytes, is a key frame)], one each 1/25 s."""
    with av.open(str(path)) as source, av.open(str(target), "w") as copy:
        stream = source.streams.video[0]
        out = copy.add_stream_from_template(stream)
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(stream) if packet.size]
        for number, (data, key) in enumerate(change(packets)):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = out, stream.time_base, key
            packet.dts = packet.pts = round(number / 25 / stream.time_base)
            copy.mux(packet)
    return str(target)


def packed(packets):
    """As DivX and XviD pack B-frames into AVI: the first of them lies in the packet of the frame that it waits for."""
    groups = []
    for data, key in packets:
        if data[data.index(VOP) + 4] >> 6 == 2:  # a B-frame
            groups[-1].append((data, False))
        else:
            groups.append([(data, key)])
    found = []
    for (data, key), *others in groups:
        found.append((data + others[0][0] if others else data, key))
        found += others[1:] + ([(NOTHING, False)] if others else [])
    return [(DIVX + found[0][0], True), *found[1:]]


def left_out(which):
    """What MPEG-4 writes for a frame that stays: its header, and that nothing is coded."""

    def change(packets):
        return [(uncoded(data), False) if n in which else (data, key) for n, (data, key) in enumerate(packets)]

    def uncoded(data):
        at = data.index(VOP) + 4
        bits = "".join(f"{byte:08b}" for byte in data[at : at + 8])
        end = bits.index("0", 2) + 8  # the kind, whole seconds, a marker, 5 bits of 1/25 s, a marker
        assert bits[end - 1 : end + 1] == "11"
        bits = bits[:end] + "00" + "1" * (-(end + 2) % 8)
        return VOP + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))

    return change


def decode(path, decoder, *segment):
    frames = decode_frames(path, VideoSpec(fps=25, size=32, decoder=decoder), *segment)
    assert frames.quality["good_frames"] == 1 and not frames.quality["salvaged"]
    return numbers(frames.values)


@decoders
@pytest.mark.parametrize("bframes", [1, 2])
def test_packed_b_frames_come_in_their_order(tmp_path, decoder, bframes):
    options = {"b": "4000000", "bf": str(bframes), "g": "12"}
    plain = write_media(tmp_path / "a.avi", numbered(40), codec="mpeg4", options=options, bframes=bframes)
    path = rewritten(plain, tmp_path / "packed.avi", packed)
    assert decode(path, decoder) == list(range(40))
    for start, end in ((0.0, 0.4), (0.8, 1.2), (1.2, None)):
        assert decode(path, decoder, start, end) == list(range(40))[round(start * 25) : end and round(end * 25)]


@decoders
@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_a_packet_may_say_that_the_picture_stays(tmp_path, decoder, suffix):
    plain = write_media(tmp_path / "a.avi", numbered(40), codec="mpeg4", options={"b": "4000000", "g": "12"})
    path = rewritten(plain, tmp_path / f"stays.{suffix}", left_out({5, 6, 20, 31}))
    wanted = [{5: 4, 6: 4, 20: 19, 31: 30}.get(n, n) for n in range(40)]
    assert decode(path, decoder) == wanted
    for first, last in ((0, 10), (20, 30), (6, 20)):
        assert decode(path, decoder, first / 25, last / 25) == wanted[first:last]
    with pytest.raises(MediaError, match="decord and FFmpeg take other pictures"):
        decode(path, "decord", 0.8, 1.2)


@decoders
@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_frames_that_only_others_refer_to_are_not_shown(tmp_path, decoder, suffix):
    options = {"b": "300000", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
    path = write_media(tmp_path / f"a.{suffix}", numbered(40), codec="libvpx", options=options)
    assert decode(path, decoder) == list(range(40))
    assert decode(path, decoder, 0.0, 0.4) == list(range(10))
    assert decode(path, decoder, 0.8, 1.2) == list(range(20, 30))


@decoders
@pytest.mark.parametrize(("codec", "suffix"), [("mpeg2video", "ts"), ("mpeg2video", "mpg"), ("libx264", "ts")])
def test_the_beginning_of_a_transport_stream_is_that_of_the_whole(tmp_path, decoder, suffix, codec):
    options = {"b": "4000000", "bf": "2", "g": "12", "crf": "8"}
    path = write_media(tmp_path / f"a.{suffix}", numbered(40), codec=codec, options=options, bframes=2)
    whole = decode(path, decoder)
    assert whole == list(range(40))
    assert decode(path, decoder, 0.0, 0.4) == whole[:10] and decode(path, decoder, 0.0, 1.2) == whole[:30]


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize(("codec", "bframes"), [("mpeg1video", 2), ("mpeg2video", 0), ("mpeg2video", 2)])
def test_pictures_that_share_a_packet_of_a_program_stream_are_shown_one_by_one(tmp_path, codec, bframes, decoder):
    """FFmpeg gives a picture whose packet states no time of its own that of its neighbour."""
    options = {"bf": str(bframes), "b": "1500k", "g": "12", "qmax": "2"}
    path = write_media(tmp_path / "a.vob", numbered(40), codec=codec, options=options)
    spec = VideoSpec(fps=25, size=32, decoder=decoder)
    assert numbers(decode_frames(path, spec).values) == list(range(40))
    for start, end in ((0.5, 1.2), (1.0, 1.5), (0.2, 0.6)):
        first = round(start * 25 + 0.5 + 1e-6)
        shown = numbers(decode_frames(path, spec, start, end).values)
        assert shown == list(range(shown[0], shown[0] + len(shown))) and abs(shown[0] - first) <= 1


@decoders
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_program_stream_that_times_few_of_its_frames_is_refused(tmp_path, decoder, codec):
    options = {"crf": "30", "x265-params": "log-level=none"} if codec == "libx265" else {"crf": "30"}
    path = write_media(tmp_path / "a.mpg", numbered(40), codec=codec, options=options)
    for segment in ((None, None), (0.4, 0.8)):
        with pytest.raises(MediaError, match="without the times of most frames; convert it to mp4"):
            decode_frames(path, VideoSpec(decoder=decoder), *segment)


FLIPS = {"rotate=90": (0, -1, 1, 0), "flip=horizontal": (-1, 0, 0, 1), "flip=vertical": (1, 0, 0, -1),
         "rotate=270:flip=horizontal": None, "rotate=180": (-1, 0, 0, -1)}  # fmt: skip


@decoders
@pytest.mark.parametrize("turn", FLIPS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
def test_an_orientation_may_be_in_the_first_frame_alone(tmp_path, decoder, turn, suffix):
    """H.264's own message on how its pictures are to be turned, which no header of the file repeats."""
    plain = write_media(tmp_path / "a.h264", quadrants(50))
    path = tmp_path / f"turned.{suffix}"
    with av.open(plain) as source, av.open(str(path), "w") as copy:
        stream = source.streams.video[0]
        out = copy.add_stream_from_template(stream)
        turned = av.BitStreamFilterContext(f"h264_metadata=display_orientation=insert:{turn}", stream, out)
        for number, packet in enumerate(turned.filter(p) for p in source.demux(stream) if p.size):
            for each in packet:
                each.stream, each.pts, each.dts = out, number * 48_000, number * 48_000
                copy.mux(each)
    assert frame_times(MediaFile(str(path)), 0.0, None).orientation.is_rotation == ("flip" not in turn)
    seen = [
        corners(decode_frames(str(path), VideoSpec(fps=25, size=32, decoder=decoder), *segment).values[-1])
        for segment in ((None, None), (0.4, 0.8), (1.2, None))
    ]
    assert seen[0] == seen[1] == seen[2]
    if FLIPS[turn] is not None:
        assert seen[0] == expected_corners(FLIPS[turn])


def open_groups(path):
    """Groups of pictures of which the first ones refer to the group before."""
    options = {"crf": "8", "bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"}
    return write_media(path, numbered(40), options=options)


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("fps", [25, 5, 1])
def test_a_file_may_begin_with_pictures_that_refer_to_what_was_cut_away(tmp_path, decoder, fps):
    whole, path = open_groups(tmp_path / "whole.mkv"), tmp_path / "part.mkv"
    with av.open(whole) as source, av.open(str(path), "w") as copy:
        stream = source.streams.video[0]
        out = copy.add_stream_from_template(stream)
        keys = 0
        for packet in source.demux(stream):
            keys += packet.is_keyframe
            if keys > 1 and packet.size:
                packet.stream = out
                copy.mux(packet)
    for start, end in ((None, None), (0.0, 0.6), (0.6, None)):
        frames = decode_frames(str(path), VideoSpec(fps=fps, size=32, decoder=decoder), start, end)
        assert numbers(frames.values) == (12 + np.floor(frames.times * 25 + 1e-2)).tolist(), start
        assert frames.quality["good_frames"] == 1 and not frames.quality["salvaged"]


@pytest.mark.skipif(decord is None, reason="decord has no wheel for this machine")
@pytest.mark.parametrize("begin", [0.2, 0.52, 1.0])
def test_decord_does_not_seek_to_key_frames_that_refer_to_what_is_before(tmp_path, begin):
    path = open_groups(tmp_path / "a.mp4")
    assert decode(path, "decord", begin, begin + 0.4) == list(range(round(begin * 25), round(begin * 25) + 10))


@decoders
@pytest.mark.parametrize("hidden", [5, 17])
def test_what_an_edit_list_cuts_away_is_not_shown(tmp_path, decoder, hidden):
    path = edited(write_media(tmp_path / "a.mp4", numbered(40), bframes=0), 40, hidden)
    for fps in (25, 5):
        for start, end in ((None, None), (0.0, 0.4), (0.4, 0.8)):
            frames = decode_frames(path, VideoSpec(fps=fps, size=32, decoder=decoder), start, end)
            assert numbers(frames.values) == (np.floor(frames.times * 25) + hidden).tolist(), (fps, start)


@pytest.mark.parametrize("sampling", ["exact", "nonref"])
def test_damage_of_what_an_edit_list_hides_is_damage_of_what_refers_to_it(tmp_path, sampling):
    path = edited(write_media(tmp_path / "a.mp4", noise(40), bframes=0, gop=40), 40, 5)
    with av.open(path) as container:
        stream = container.streams.video[0]
        hidden = sorted(p.pts for p in container.demux(stream) if p.size)[3]
    wreck_packet(path, hidden)
    frames = decode_frames(path, VideoSpec(fps=25, size=32, sampling=sampling))
    assert frames.quality["salvaged"] and frames.quality["good_frames"] == 0


def edited(path, count, hidden):
    """The mp4 of so many frames with an edit list that hides the first ones."""
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"elst") + 12  # its version, how many, then the duration and where in the track it begins
    with av.open(path) as container:
        tick = container.streams.video[0].time_base
    data[at : at + 8] = struct.pack(">Ii", round((count - hidden) * 40), round(hidden / 25 / tick))
    Path(path).write_bytes(data)
    return path


def straightforward(path, times):
    """What FFmpeg shows at the times: every frame decoded from the beginning, each until the next one's own time."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        zero = container.start_time / av.time_base
        frames = [(frame.time - zero, frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(stream)]
    shown = np.searchsorted([time for time, _ in frames], np.asarray(times) + 1e-3, side="right") - 1
    return [round((frames[max(n, 0)][1] - 10) / 6) for n in shown]


CODECS = [
    ("libx264", ("mp4", "mkv", "mov", "ts", "flv")),
    ("libx265", ("mp4", "mkv", "ts")),
    ("mpeg4", ("mp4", "mkv", "mov")),
    ("mpeg2video", ("ts", "mkv", "mpg")),
    ("libvpx-vp9", ("webm", "mkv")),
    ("libvpx", ("webm",)),
    ("mjpeg", ("avi", "mov")),
]


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS", 24))))
def test_what_is_decoded_is_what_ffmpeg_shows(tmp_path, seed):
    """Random codec, container, distance of key frames, B-frames, rate (or a variable one); whole and in segments."""
    rng = np.random.default_rng(seed)
    codec, suffixes = CODECS[seed % len(CODECS)]
    suffix = str(rng.choice(suffixes))
    gop, bframes = int(rng.integers(2, 20)), int(rng.integers(0, 4)) if "vp" not in codec else 0
    options = {"g": str(gop), "b": "4000000"} | ({"bf": str(bframes)} if codec != "mjpeg" else {})
    options |= {"crf": "8"} if codec in ("libx264", "libx265") else {}
    options |= {"x265-params": "log-level=none"} if codec == "libx265" else {}
    options |= {"deadline": "realtime", "cpu-used": "8"} if codec.startswith("libvpx") else {}
    varies = suffix in ("mp4", "mkv", "mov", "webm") and codec.startswith("lib") and rng.random() < 0.5
    # Even milliseconds: none is just as far from a sampled time as clocks may be apart.
    pts = np.cumsum(2 * rng.integers(10, 60, 36)).tolist() if varies else None
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_media(
        Path(tmp_path, f"a.{suffix}"),
        numbered(36),
        pts=pts,
        codec=codec,
        options=options,
        bframes=bframes,
        pixels=pixels,
    )
    last = frame_times(MediaFile(path), 0.0, None).end
    begin = float(rng.uniform(0.1, 0.6)) * last
    for decoder in ("auto", "pyav"):
        spec = VideoSpec(fps=float(rng.choice([8, 12.5, 25])), size=32, decoder=decoder)
        for start, end in ((None, None), (0.0, begin), (begin, begin + 0.4 * last), (begin, None)):
            frames = decode_frames(path, spec, start, end)
            assert numbers(frames.values) == straightforward(path, frames.times), (codec, suffix, decoder, start, pts)
            assert frames.quality["good_frames"] == 1
