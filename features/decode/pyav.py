"""Pictures of one video stream by PyAV: at exact times without concealment, or the latest ones with all that is left.

Every function takes wanted times (sorted, s on the file's clock) and the size that the whole picture is scaled to.
"""

import bisect
from typing import NamedTuple

import numpy as np
from av import FFmpegError, Packet, VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from features.decode.media import Source, clock_zero, open_container, packets, stamp_of
from features.decode.specs import Sampling

SKIPPED = {"exact": "DEFAULT", "nonref": "NONREF", "keyframes": "NONKEY"}  # what the decoder leaves out


class Latest(NamedTuple):
    """What one pass over a file gives for N wanted frames: the latest ones that decode, and where damage lies.

    values: (N, height, width, 3) uint8, N = 0 where nothing decodes.
    exact: (N,) bool, values holds the wanted frame itself. intact: (N,) bool, nothing is damaged from its key frame
    up to the wanted frame, in the order of decoding: damage lives on in what refers to it. damaged: anything was.
    """

    values: np.ndarray
    exact: np.ndarray
    intact: np.ndarray
    damaged: bool


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is not a music file's cover."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def exact_pictures(source: Source, uri: str, wanted: np.ndarray, width: int, height: int, margin: float) -> np.ndarray:
    """The pictures at the wanted times, (N, height, width, 3) uint8, without those that are damaged.

    margin: s before the first one that the file is sought to; infinite: it is read from its beginning. No picture
    where the first key frame from there on comes too late. Raises FFmpegError where a packet does not decode.
    """
    scaler, pictures, nothing = VideoReformatter(), [], np.empty((0, height, width, 3), np.uint8)
    with open_container(source, uri) as container:
        stream = _single_threaded(container, strict=True)
        context = stream.codec_context
        skips = context.name in ("h264", "hevc")  # others drop the wrong frames, or delay the setting
        stamps = set(_ticks(container, stream, wanted))
        first, key = min(stamps), None
        begun = not wanted[0] > margin  # by a key frame: some indexes call others one, whose pictures are wrong
        if not begun:
            container.seek(first - round(margin / float(stream.time_base)), stream=stream)
        for packet in container.demux(stream):
            stamp = stamp_of(packet)
            if key is None and packet.is_keyframe:
                key = stamp
            if skips:  # a frame that is neither wanted nor needed by another is not decoded at all
                context.skip_frame = "DEFAULT" if stamp in stamps or packet.size == 0 else "NONREF"
            try:
                frames = packet.decode()
            except FFmpegError:
                if begun:
                    raise
                if key is None or (stamp is not None and stamp < key):  # needs what lies before the key frame
                    continue
                return nothing
            for frame in frames:
                if not begun:
                    if stamp_of(frame) is None or stamp_of(frame) > first:
                        return nothing
                    begun = frame.key_frame
                if begun and stamp_of(frame) in stamps and not frame.is_corrupt:
                    stamps.discard(stamp_of(frame))
                    pictures.append(_scale(scaler, frame, width, height))
            if not stamps:
                break
    return np.stack(pictures) if pictures else nothing


def latest_pictures(
    source: Source, uri: str, wanted: np.ndarray, width: int, height: int, sampling: Sampling, strict: bool, seek: bool
) -> Latest:
    """For each wanted time the latest frame at or before it among those that sampling decodes; else the first one.

    strict: what is damaged does not decode; else FFmpeg conceals what it can.
    """
    with open_container(source, uri) as container:
        stream = _single_threaded(container, strict)
        stream.codec_context.skip_frame = SKIPPED[sampling]
        screen = _Screen(_ticks(container, stream, wanted), width, height)
        if seek:
            container.seek(screen.ticks[0], stream=stream)
        order, keys, damaged = {}, [], []  # numbers of packets, in the order of decoding
        for number, packet in enumerate(packets(container, stream)):
            order[stamp_of(packet)] = number
            for frame in _decode(packet):
                if frame is None or frame.is_corrupt:
                    damaged.append(number if frame is None else order.get(stamp_of(frame), number))
                elif frame.key_frame:
                    keys.append(order.get(stamp_of(frame), number))
                if frame is not None and stamp_of(frame) is not None:
                    screen.show(stamp_of(frame), frame)
            if screen.full:
                break
    screen.close()
    if seek and (not screen.stamps or screen.stamps[0] > screen.ticks[0]):  # some formats seek past the time asked for
        return latest_pictures(source, uri, wanted, width, height, sampling, strict, seek=False)
    values = np.stack(screen.pictures) if screen.pictures else np.empty((0, height, width, 3), np.uint8)
    exact = np.array([a == b for a, b in zip(screen.stamps, screen.ticks, strict=False)], bool)
    wanted = np.array([order.get(tick, -1) for tick in screen.ticks])
    return Latest(values, exact, _intact(wanted, np.sort(keys), np.sort(damaged)), bool(damaged))


class _Screen:
    """Frames pass in the order of display; each stays until the next, and is scaled where that is a wanted time."""

    def __init__(self, ticks: list[int], width: int, height: int) -> None:
        self.ticks, self.size = ticks, (width, height)
        self.pictures: list[np.ndarray] = []
        self.stamps: list[int] = []
        self.scaler = VideoReformatter()
        self.held: tuple[int, VideoFrame] | None = None

    @property
    def full(self) -> bool:
        return len(self.pictures) == len(self.ticks)

    def show(self, stamp: int, frame: VideoFrame) -> None:
        """The next frame."""
        if self.held is not None:
            self._fill(bisect.bisect_left(self.ticks, stamp) - len(self.pictures))
        self.held = stamp, frame

    def close(self) -> None:
        """The last frame stays to the end."""
        if self.held is not None:
            self._fill(len(self.ticks) - len(self.pictures))

    def _fill(self, count: int) -> None:
        if count > 0:
            stamp, frame = self.held
            self.pictures += [_scale(self.scaler, frame, *self.size)] * count
            self.stamps += [stamp] * count


def _intact(wanted: np.ndarray, keys: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """Which wanted packets have a key frame before them and nothing damaged in between; all are packet numbers."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    key = np.searchsorted(keys, wanted, side="right") - 1
    before = np.searchsorted(damaged, keys[np.maximum(key, 0)])
    return (key >= 0) & (np.searchsorted(damaged, wanted, side="right") == before)


def _decode(packet: Packet) -> list[VideoFrame | None]:
    """The frames that a packet gives, None where it does not decode."""
    try:
        return packet.decode()
    except FFmpegError:
        return [None]


def _single_threaded(container: InputContainer, strict: bool) -> VideoStream:
    stream = video_stream(container)
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    if strict:
        stream.codec_context.options = {"err_detect": "explode"}  # else FFmpeg paints over what is damaged
    return stream


def _ticks(container: InputContainer, stream: VideoStream, times: np.ndarray) -> list[int]:
    return [round((time + clock_zero(container)) / float(stream.time_base)) for time in times]


def _scale(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """The whole picture, turned upright, as (height, width, 3) uint8."""
    turns = round(frame.rotation / 90)
    size = (height, width) if turns % 2 else (width, height)
    return np.rot90(scaler.reformat(frame, *size, "rgb24", interpolation="BILINEAR").to_ndarray(), turns)
