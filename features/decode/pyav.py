"""Pictures of one video stream by PyAV: at exact times without concealment, or the latest ones with all that is left.

Every function takes wanted times (sorted, s on the file's clock), the size that the whole picture is scaled to, and
what `probe` found out about the file.
"""

import bisect
from typing import Literal, NamedTuple

import numpy as np
from av import FFmpegError, Packet, VideoFrame
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from features.decode.media import MediaFile, clock_zero, single_threaded, stamp_of, tick_of
from features.decode.probe import Orientation, Shown, Timing, stamped
from features.decode.specs import Sampling

# What the decoder leaves out.
SKIPPED: dict[Sampling, Literal["DEFAULT", "NONREF", "NONKEY"]]
SKIPPED = {"exact": "DEFAULT", "nonref": "NONREF", "keyframes": "NONKEY"}


class Mistimed(Exception):
    """Decoding shows that the packets' times are not the frames'; timing: what they are instead."""

    def __init__(self, timing: Timing) -> None:
        super().__init__(timing)
        self.timing: Timing = timing


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


class Scale(NamedTuple):
    """Pixels that a whole picture is scaled to once it is upright, and how it becomes upright."""

    width: int
    height: int
    orientation: Orientation

    def nothing(self) -> np.ndarray:
        """No picture: (0, height, width, 3) uint8."""
        return np.empty((0, self.height, self.width, 3), np.uint8)


def exact_pictures(media: MediaFile, shown: Shown, wanted: np.ndarray, scale: Scale, margin: float) -> np.ndarray:
    """The pictures at the wanted times, (N, height, width, 3) uint8, without those that are damaged.

    margin: s before the first one that the file is sought to; infinite: it is read from its beginning. No picture
    where the first key frame from there on comes too late. Raises FFmpegError where a packet does not decode, Mistimed
    where the frames come out in another order than that of their times, or where packets turn out to be no frames.
    """
    nothing = scale.nothing()
    with media.opened(leave=True) as container:
        stream = _stream(container, shown, strict=True)
        context = stream.codec_context
        clock, screen = _Clock(container, stream, shown), _Screen(_ticks(container, stream, wanted), scale)
        # Others drop the wrong frames, or delay the setting; where frames are counted none may be left out.
        skips = context.name in ("h264", "hevc") and shown.timing == "stated"
        stamps = set(screen.ticks)
        first, key = screen.ticks[0], None
        (opens,) = _ticks(container, stream, shown.times[:1])
        begun = not wanted[0] > margin  # by a key frame: some indexes call others one, whose pictures are wrong
        if not begun:
            container.seek(first - round(margin / float(tick_of(stream))), stream=stream)
        sparse, before = shown.sparse, None
        for packet in stamped(container, stream, media.uri) if shown.timing == "ordered" else container.demux(stream):
            stamp = stamp_of(packet)
            if key is None and packet.is_keyframe:
                key = stamp
            if skips:  # a frame that is neither wanted nor needed by another is not decoded at all
                context.skip_frame = "DEFAULT" if stamp in stamps or packet.size == 0 else "NONREF"
            try:
                frames = packet.decode()
            except FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                if _is_leading(stamp, opens, key, shown):
                    continue
                if begun:
                    raise
                if key is None or (stamp is not None and stamp < key):  # needs what lies before the key frame
                    continue
                return nothing
            for frame in frames:
                now = clock.stamp(frame)
                if not begun:
                    if now is None or now > first:
                        return nothing
                    begun = frame.key_frame
                if not begun or now is None:
                    continue
                if shown.timing == "stated" and before is not None and now < before:
                    raise Mistimed("ordered")
                before, sparse = now, sparse or frame.interlaced_frame
                screen.show(now, frame)
            if screen.full:
                break
        screen.close()
    if shown.timing == "fields":
        return screen.stacked() if screen.stamps and screen.stamps[0] <= first and not screen.corrupt else nothing
    if shown.timing == "stated" and screen.stamps != screen.ticks and sparse and not screen.corrupt:
        raise Mistimed("fields")
    return screen.stacked() if screen.stamps == screen.ticks and not screen.corrupt else nothing


def latest_pictures(
    media: MediaFile,
    shown: Shown,
    wanted: np.ndarray,
    scale: Scale,
    sampling: Sampling,
    strict: bool,
    seek: bool,
) -> Latest:
    """For each wanted time the latest frame at or before it among those that sampling decodes; else the first one.

    strict: what is damaged does not decode; else FFmpeg conceals what it can.
    """
    with media.opened(fresh=True) as container:
        stream = _stream(container, shown, strict)
        stream.codec_context.skip_frame = SKIPPED[sampling]
        clock = _Clock(container, stream, shown)
        screen = _Screen(_ticks(container, stream, wanted), scale)
        if seek:
            container.seek(screen.ticks[0], stream=stream)
        order, keys, damaged = {}, [], []  # numbers of packets, in the order of decoding
        (opens,), key = _ticks(container, stream, shown.times[:1]), None
        for number, packet in enumerate(stamped(container, stream, media.uri)):
            order[stamp_of(packet)] = number
            if key is None and packet.is_keyframe:
                key = stamp_of(packet)
            for frame in _decode(packet):
                stamp = stamp_of(packet if frame is None else frame)
                if _is_leading(stamp, opens, key, shown):
                    continue
                if frame is None or frame.is_corrupt:
                    damaged.append(number if frame is None else order.get(stamp, number))
                elif frame.key_frame:
                    keys.append(order.get(stamp, number))
                if frame is not None and stamp is not None:
                    now = clock.stamp(frame) if sampling == "exact" else stamp
                    assert now is not None  # a frame that has a time of its own
                    screen.show(now, frame)
            if screen.full:
                break
    screen.close()
    if seek and (not screen.stamps or screen.stamps[0] > screen.ticks[0]):  # some formats seek past the time asked for
        return latest_pictures(media, shown, wanted, scale, sampling, strict, seek=False)
    exact = np.array([a == b for a, b in zip(screen.stamps, screen.ticks, strict=False)], bool)
    if shown.timing == "fields":  # a wanted time may be that of a frame's second field
        exact[:] = True
    if shown.timing == "ordered":  # as many packets are decoded before a frame's as frames are shown before it
        assert clock.times is not None
        order = {tick: number for number, tick in enumerate(clock.times)}
    wanted = np.array([order.get(tick, -1) for tick in screen.ticks])
    return Latest(screen.stacked(), exact, _intact(wanted, np.sort(keys), np.sort(damaged)), bool(damaged))


def _is_leading(stamp: int | None, opens: int, key: int | None, shown: Shown) -> bool:
    """Whether a packet is shown before the first key frame and before the file opens: it refers to what was cut away.

    What an edit list hides is shown before the file opens too, but after its key frame: what is shown refers to it.
    """
    return stamp is not None and key is not None and stamp < min(opens, key) and shown.timing != "ordered"


class _Clock:
    """Gives each frame, in the order in which they come out, the time at which it is shown (ticks)."""

    def __init__(self, container: InputContainer, stream: VideoStream, shown: Shown) -> None:
        self.times = _ticks(container, stream, shown.times) if shown.timing == "ordered" else None
        self.last, self.delay = -1, 0

    def stamp(self, frame: VideoFrame) -> int | None:
        """The frame's own time; where frames have none, that of its place among all frames.

        A frame comes out with the time of decoding of a later packet, and always as many packets late: so a place is
        found again after packets that hold no frame.
        """
        if self.times is None:
            return stamp_of(frame)
        place = self.last + 1
        if frame.dts is not None:
            decoded = bisect.bisect_left(self.times, frame.dts)
            self.delay = decoded if self.last < 0 else self.delay
            place = max(place, decoded - self.delay)
        self.last = min(place, len(self.times) - 1)
        return self.times[self.last]


class _Screen:
    """Frames pass in the order of display; each stays until the next, and is scaled where that is a wanted time."""

    def __init__(self, ticks: list[int], scale: Scale) -> None:
        self.ticks, self.scale = ticks, scale
        self.pictures: list[np.ndarray] = []
        self.stamps: list[int] = []
        self.corrupt = False  # a picture that was wanted is
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
        if stamp == self.ticks[-1]:
            self.close()

    def close(self) -> None:
        """The last frame stays to the end."""
        if self.held is not None:
            self._fill(len(self.ticks) - len(self.pictures))

    def stacked(self) -> np.ndarray:
        """(N, height, width, 3) uint8, N = 0 where no frame passed."""
        return np.stack(self.pictures) if self.pictures else self.scale.nothing()

    def _fill(self, count: int) -> None:
        if count > 0:
            assert self.held is not None
            stamp, frame = self.held
            self.pictures += [_scale(self.scaler, frame, self.scale)] * count
            self.stamps += [stamp] * count
            self.corrupt |= frame.is_corrupt


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
        return [*packet.decode()]
    except MemoryError:
        raise
    except FFmpegError:
        return [None]


def _stream(container: InputContainer, shown: Shown, strict: bool) -> VideoStream:
    stream = container.streams[shown.stream]
    assert isinstance(stream, VideoStream)
    single_threaded(stream, strict)
    return stream


def _ticks(container: InputContainer, stream: VideoStream, times: np.ndarray) -> list[int]:
    zero, tick = clock_zero(container), float(tick_of(stream))
    return [round((time + zero) / tick) for time in times.tolist()]


def _scale(scaler: VideoReformatter, frame: VideoFrame, scale: Scale) -> np.ndarray:
    """The whole picture, turned upright, as (height, width, 3) uint8."""
    size = (scale.height, scale.width) if scale.orientation.transposed else (scale.width, scale.height)
    picture = scaler.reformat(frame, *size, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return scale.orientation.upright(picture)
