"""Small real media files, written with PyAV: frames whose brightness is their number, and known sounds."""

import csv
import io
import struct
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 6  # grey levels from one numbered frame to the next


def numbered(count, width=64, height=48):
    """Grey frames; frame n has brightness 10 + 6 n."""
    return [np.full((height, width, 3), 10 + STEP * n, np.uint8) for n in range(count)]


def numbers(values):
    """Which numbered frames these are."""
    return np.round((values.astype(float).mean((1, 2, 3)) - 10) / STEP).astype(int).tolist()


def write_media(
    path,
    frames=(),
    fps=25,
    pts=None,
    sound=None,
    rate=16_000,
    layout="mono",
    sound_at=0.0,
    gop=12,
    bframes=None,
    faststart=False,
    codec="libx264",
    pixels="yuv420p",
    options=None,
):
    """Write frames and sound ((channels, N) float32). pts: ms per frame, for a variable rate; sound_at: s.

    gop: frames from one key frame to the next; bframes: how many in a row may be B-frames;
    options: of the codec, instead of these.
    """
    plain = {".wav": "pcm_s16le", ".flac": "flac", ".mp3": "libmp3lame", ".mpg": "mp2"}
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        if len(frames):
            usual = {"crf": "8", "g": str(gop), "sc_threshold": "0"} | ({} if bframes is None else {"bf": str(bframes)})
            options = options or (usual if codec == "libx264" else {"crf": "8"})
            video = container.add_stream(codec, rate=1000 if pts else fps, options=options)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = pixels
        if sound is not None:
            audio = container.add_stream(plain.get(path.suffix, "aac"), rate=rate, layout=layout)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(video.encode(frame))
        if len(frames):
            container.mux(video.encode(None))
        if sound is not None:
            _write_sound(
                container, audio, np.atleast_2d(sound).astype(np.float32), rate, layout, round(sound_at * rate)
            )
    return str(path)


def _write_sound(container, stream, sound, rate, layout, first):
    for at in range(0, sound.shape[1], 1000):
        block = np.ascontiguousarray(sound[:, at : at + 1000])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, first + at
        frame.time_base = Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def sine(hertz, seconds, rate=16_000, gain=0.5):
    return (gain * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def rotate(path, quarter_turns):
    """Write a phone's rotation into an mp4's track header: clockwise quarter turns that a player makes."""
    data = bytearray(Path(path).read_bytes())
    a, b = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarter_turns]
    matrix = struct.pack(">9i", *(v << 16 for v in (a, b, 0, -b, a, 0, 0, 0)), 1 << 30)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = matrix
    Path(path).write_bytes(data)
    return path


def noise(count, width=64, height=48):
    """Frames that compress badly: every packet has bytes to damage."""
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), np.uint8)


def wreck_packet(path, stamp, kind="video"):
    """Overwrite the packet that is shown at a stamp (ticks of its stream) with bytes that mean nothing."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        packet = next(p for p in container.demux(stream) if p.size and p.pts == stamp)
        at, size = packet.pos, packet.size
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * size)
    return path


def cut(path, share):
    """Keep the first share of a file's bytes."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: round(len(data) * share)])
    return path


def damage(data, generator):
    """Bytes of a media file, damaged at random: cut off, bits flipped, a stretch overwritten, or the header broken."""
    data = bytearray(data)
    kind = generator.choice(["truncated", "bits", "overwritten", "header"])
    if kind == "truncated":
        data = data[: generator.integers(len(data))]
    elif kind == "bits":
        for at in generator.integers(len(data), size=generator.integers(1, 60)):
            data[at] ^= 1 << generator.integers(8)
    elif kind == "overwritten":
        at, size = generator.integers(len(data)), generator.integers(1, 5000)
        data[at : at + size] = generator.bytes(len(data[at : at + size]))
    else:
        for at in generator.integers(min(len(data), 400), size=8):
            data[at] = generator.integers(256)
    return bytes(data)


def write_tar(path, content):
    """An uncompressed tar of files given as `{name: bytes}`."""
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_manifest(path, rows):
    """Write dicts as a csv manifest; None and missing keys become empty fields."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
    return str(path)
