"""What a media file says, decided once for every decoder, whole rows and segments alike.

Which streams are the clip's picture and sound, how the picture is turned, when each frame is shown, and where a stream
should end. Containers disagree with their streams, and decoders with each other, so everything that reads a file asks
here:

- **streams**: of several, the one with the default flag, more than one picture (or any sound), and the most pixels (or
  channels); covers and thumbnails are no video; a track that is declared and has no packets is absent.
- **orientation**: all eight states of the display matrix, of the first frame that decodes: FFmpeg hands a stream's
  matrix to its frames, and some codecs state it in the frame alone.
- **times**: a packet's time is its frame's, with three exceptions (`Timing`).
- **end**: the duration of a fragmented file that does not begin at 0 may already be its end.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from av import FFmpegError, Packet, VideoFrame
from av import time_base as TIME_BASE
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from features.decode.media import (
    SLACK,
    MediaFile,
    clock_zero,
    held_share,
    media_file,
    packet_time,
    packets,
    single_threaded,
    stamp_of,
    tick_of,
)
from features.decode.times import TICK, Packets, Timing
from features.errors import MediaError

AnyStream = TypeVar("AnyStream", bound=Stream)

COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
GUESSED = ("aac", "ac3", "eac3", "amr", "h264", "hevc", "mp3")  # bare streams: FFmpeg guesses a duration from the size
CLIPPED = ("wav", "avi", "asf")  # of those that are cut off, FFmpeg takes what is left for the whole
JOINABLE = ("mpeg", "mpegts")  # files of these stay files when they are put behind each other
EARLIER = 10.0  # s that a file is sought to before a segment whose key frame a first seek did not find
# Codecs of which a packet may say that the picture before stays, or change only what others refer to: it shows nothing.
SPARSE = ("mpeg4", "h263", "flv", "vp8", "theora", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2")
# Codecs of which a program stream may state one time for several frames; of MPEG's own FFmpeg works out the others.
UNTIMED = ("h264", "hevc")
COUNTED = ("mpeg1video", "mpeg2video")  # a picture without a time is where the times of its neighbours leave a gap
PROGRESSIVE = 1  # FFmpeg's orders of fields: unknown, none, and the four that there are
OPENING = 64  # packets among which the first frame that decodes says how the picture is turned


class Orientation(NamedTuple):
    """How a decoded picture becomes upright: rows and columns change places, then it is mirrored, both or one way."""

    transposed: bool = False
    mirrored: bool = False  # left becomes right
    upside_down: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> "Orientation":
        """The nearest of the eight states to a frame's display matrix, upright where it has none."""
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    @property
    def is_rotation(self) -> bool:
        """Whether a picture is turned, or upright, and not mirrored."""
        return not (self.transposed ^ self.mirrored ^ self.upside_down)

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """A picture (height, width, 3) as it is to be looked at; a view."""
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        picture = picture[:, ::-1] if self.mirrored else picture
        return picture[::-1] if self.upside_down else picture


@dataclass(frozen=True)
class Shown:
    """A clip's picture as its file states it; times (s) are on the file's clock.

    times: when frames appear, sorted; end: when the last one goes; first: when the stream begins. share: how much of
    what the file declares is there, None where it declares nothing; declared: where it says that the stream ends.
    format: FFmpeg's name of the container; stream: the stream's number; alone: it is the only one with pictures.
    seekable: segments need not be read from the file's beginning. sparse: a packet of its codec may show nothing.
    plain: the whole stream was read, each packet of it is one picture that is shown, and the first one comes first.
    width, height: of the upright picture, in square pixels.
    """

    times: np.ndarray
    end: float
    first: float
    share: float | None
    declared: float | None
    format: str
    stream: int
    alone: bool
    seekable: bool
    orientation: Orientation
    timing: Timing
    sparse: bool
    plain: bool
    width: int
    height: int


def picture_stream(media: MediaFile, container: InputContainer) -> VideoStream | None:
    """The stream that is the clip's picture, None where there are only covers and thumbnails."""
    streams = [s for s in container.streams.video if not s.disposition & COVERS]
    streams.sort(key=lambda s: (not s.disposition & Disposition.default, -_pixels(s)))
    return _first_filled(media, streams, least=2)


def sound_stream(media: MediaFile, container: InputContainer) -> AudioStream | None:
    """The stream that is the clip's sound, None where there is none."""
    streams = list(container.streams.audio)
    streams.sort(key=lambda s: (not s.disposition & Disposition.default, -s.channels))
    return _first_filled(media, streams, least=1)


def has_sound(uri: str) -> bool:
    """Whether a file has a sound track, by its header alone. Raises MediaError (stage open)."""
    with media_file(uri) as media, media.opened() as container:
        return bool(container.streams.audio)


def _pixels(stream: VideoStream) -> int:
    return (stream.codec_context.width or 0) * (stream.codec_context.height or 0)


def _first_filled(media: MediaFile, ranked: Sequence[AnyStream], least: int) -> AnyStream | None:
    """The first stream with so many packets or more; else the first one with any, or the first of all.

    Only where there is a choice the file is read for that, up to where the choice is made.
    """
    if len(ranked) < 2:
        return ranked[0] if ranked else None
    counts = dict.fromkeys((stream.index for stream in ranked), 0)
    with media.opened(fresh=True) as container:
        try:
            for packet in container.demux(*(container.streams[index] for index in counts)):
                counts[packet.stream.index] += packet.size > 0
                if counts[ranked[0].index] >= least:
                    break
        except FFmpegError:  # damaged from here on
            pass
    return max(ranked, key=lambda stream: min(counts[stream.index], least))


def is_declared_filled(stream: Stream) -> bool:
    """Whether a file says that a stream has content; of one without packets, that it is damaged and not just empty."""
    return bool(stream.frames) or bool(_tagged_seconds(stream))


def stamped(container: InputContainer, stream: VideoStream, uri: str) -> Iterator[Packet]:
    """A stream's packets; those of a bare stream, which states no time at all, are timed by their durations.

    Raises MediaError (stage video) where there is neither a time nor a frame rate.
    """
    bare, clock = stream.start_time is None, 0
    for packet in packets(container, stream):
        if bare and packet.size:
            bare = stamp_of(packet) is None or clock > 0
        if bare and packet.size:
            packet.pts = packet.dts = clock
            clock += packet.duration or _frame_ticks(stream, uri)
        yield packet


def _frame_ticks(stream: VideoStream, uri: str) -> int:
    """Ticks from one frame to the next by the stream's frame rate."""
    rate = stream.guessed_rate or stream.average_rate
    if not rate:
        raise MediaError("video", f"{uri} has neither timestamps nor a frame rate; remux it")
    return round(1 / (rate * tick_of(stream)))


def frame_times(
    media: MediaFile,
    begin: float,
    stop: float | None,
    margin: float = 0.0,
    timing: Timing | None = None,
    seekable: bool = True,
) -> Shown | None:
    """When each frame from begin to stop is shown, from the packets alone; None where there is no picture.

    margin: s before begin that the file is sought to; infinite: it is read from its beginning. timing: what decoding
    has shown, where the packets do not tell. seekable: a seek has not failed yet. Raises MediaError (stage open or
    video).
    """
    with media.opened(leave=True) as container:
        stream = picture_stream(media, container)
        if stream is None:
            return None
        tick, zero = float(tick_of(stream)), clock_zero(container)
        first = (stream.start_time or 0) * tick - zero
        if container.format.name == "mpeg":  # its packets' times are right only a while after a seek
            margin = max(margin, EARLIER)
        seekable = seekable and stream.start_time is not None and timing != "ordered"
        seek = seekable and begin - margin > max(first, 0.0)
        opening = _Opening(stream)
        if seek:
            for packet in packets(container, stream):
                if opening.look(packet):
                    break
            try:
                container.seek(round((begin - margin + zero) / tick), stream=stream)
            except FFmpegError:  # a format, or a file without an index, that cannot
                return frame_times(media, begin, stop, timing=timing, seekable=False)
        read = Packets(tick, zero, begin, stop, _longest(container), seek)
        for packet in stamped(container, stream, media.uri):
            if not seek:
                opening.look(packet)
            if not read.add(packet):
                break
        if seek and (
            not read.stamps or read.key is None or read.key > begin + TICK
        ):  # some formats seek past the time asked for
            return frame_times(media, begin, stop, math.inf if margin else EARLIER, timing, seekable)
        if not read.stamps and not read.hidden and not is_declared_filled(stream):
            return None
        if not opening.decoded:
            opening = _opening_of_damaged(media, stream.index)
        timing, codec = timing or _timing(stream, opening), stream.codec_context.name
        if read.untimed and timing == "stated" and container.format.name == "mpeg" and codec in UNTIMED:
            raise MediaError("video", f"{media.uri} holds {codec} without the times of most frames; convert it to mp4")
        if container.format.name in JOINABLE and read.restart() is not None:
            raise MediaError("video", f"{media.uri}: the times of its frames begin anew, as of joined files; remux it")
        if timing == "stated" and codec in COUNTED and read.counted() is not None:
            timing = "ordered"
        if timing == "ordered" and seek:
            return frame_times(media, begin, stop, timing=timing)
        leading = read.leading() if timing != "ordered" else None
        if leading is not None and not _is_shown_from(media, stream.index, round((leading + zero) / tick)):
            read.drop_before(leading)
        stamps, end = read.finish(stream.start_time, timing)
        declared = declared_end(media, container, stream, end)
        aimed = stop if stop is not None and end >= stop else declared
        share = held_share(begin, stop, end, aimed)
        if read.whole and share is not None and stream.frames:  # a header may tell more truth of one than of the other
            share = min(1.0, max(share, (len(stamps) + read.hidden) / stream.frames))
        alone, number = len(container.streams.video) == 1, stream.index
        name, seekable = container.format.name, seekable and timing != "ordered"
        sparse, size = codec in SPARSE, _square_pixels(stream, opening.orientation)
        # Some pictures of H.264 may be coded as two fields, in a packet each.
        is_progressive = codec != "h264" or stream.codec_context.field_order == PROGRESSIVE
        plain = read.whole and read.begins and is_progressive and leading is None and not read.hidden + read.untimed
    if not len(stamps):
        raise MediaError("video", f"{media.uri} holds no video frame; it is damaged or incomplete, fetch it again")
    turned = opening.orientation
    return Shown(
        stamps, end, first, share, declared, name, number, alone, seekable, turned, timing, sparse, plain, *size
    )


def _square_pixels(stream: VideoStream, orientation: Orientation) -> tuple[int, int]:
    """Width and height of a stream's upright picture; one whose pixels are no squares is made wider, or narrower."""
    context, ratio = stream.codec_context, stream.sample_aspect_ratio
    width, height = round(context.width * float(ratio or 1)) or 1, context.height or 1
    return (height, width) if orientation.transposed else (width, height)


def _opening_of_damaged(media: MediaFile, number: int) -> "_Opening":
    """What the first frames tell where none of them is whole."""
    with media.opened(fresh=True) as container:
        stream = container.streams[number]
        assert isinstance(stream, VideoStream)
        opening = _Opening(stream, strict=False)
        for packet in packets(container, stream):
            if opening.look(packet):
                break
    return opening


def _is_shown_from(media: MediaFile, number: int, key: int) -> bool:
    """Whether the pictures decode that are shown before the key frame (shown at a tick) with which a stream begins.

    Those of a file that was cut out of another may refer to what is not there, and are not shown.
    """
    with media.opened(fresh=True) as container:
        stream = container.streams[number]
        assert isinstance(stream, VideoStream)
        single_threaded(stream, strict=True)
        try:
            first = next(container.decode(stream), None)
        except MemoryError:
            raise
        except FFmpegError:
            return False
    stamp = None if first is None else stamp_of(first)
    return first is not None and not first.is_corrupt and stamp is not None and stamp < key


def _longest(container: InputContainer) -> float:
    """Seconds beyond which a timestamp must be a broken one."""
    return 2 * container.duration / TIME_BASE + 10 if container.duration else math.inf


def _timing(stream: VideoStream, opening: "_Opening") -> Timing:
    # AVI states when packets are decoded, and its frames are as far apart; FFmpeg shows those that refer to later ones
    # some frames late. What else gives wrong times shows when frames come out in another order (pyav.Mistimed).
    by_place = stream.container.format.name == "avi" and stream.codec_context.has_b_frames
    if stream.start_time is None or by_place:
        return "ordered"
    return "fields" if opening.interlaced else "stated"


class _Opening:
    """Looks at a stream's first frame that decodes, for what only frames tell."""

    def __init__(self, stream: VideoStream, strict: bool = True) -> None:
        self.context, self.left = stream.codec_context, OPENING
        self.orientation, self.decoded = Orientation(), False
        self.interlaced = self.context.field_order > PROGRESSIVE
        single_threaded(stream, strict)

    def look(self, packet: Packet) -> bool:
        """Decode one more packet where no frame came yet; whether nothing is to be looked at any more."""
        if not self.left:
            return True
        if not packet.size:
            return False
        self.left -= 1
        try:
            frames = packet.decode() + self.context.decode(None)  # at once, instead of after those that refer to it
        except MemoryError:
            raise
        except FFmpegError:
            frames = []
        self.context.flush_buffers()
        if frames:
            self.left, self.decoded, self.orientation = 0, True, Orientation.of(frames[0])
            self.interlaced = self.interlaced or frames[0].interlaced_frame
        return not self.left


def declared_end(media: MediaFile, container: InputContainer, stream: Stream, held: float) -> float | None:
    """When the stream ends by the file's own word (s on the file's clock); None where the file has none on that.

    held: where it ends by its packets, on the same clock.
    """
    zero, start = clock_zero(container), stream.start_time or 0
    if container.format.name in GUESSED and not start:  # an mp3 that begins after 0 has a header that counts it
        return None
    if container.format.name in CLIPPED and media.share < 1:
        return held / media.share
    if stream.duration:
        end = float(stream.duration * tick_of(stream)) - zero
        is_end = _is_fragmented(container, stream) and start > 0 and held <= end + SLACK
        return end if is_end else end + float(start * tick_of(stream))
    if seconds := _tagged_seconds(stream):
        return seconds - zero
    if not container.duration:
        return None
    end = container.duration / TIME_BASE  # of the longest stream: says nothing on the others, if that is whole
    with media.opened(fresh=True) as again:
        ends = ((packet_time(p) or 0.0) + float((p.duration or 0) * p.time_base) for p in again.demux() if p.size)
        last = max(ends, default=0.0) - zero
    return end if last < end - SLACK else None


def _is_fragmented(container: InputContainer, stream: Stream) -> bool:
    """Whether an mp4's header lists no frame of its own: they come in fragments, each with its own header."""
    return container.format.name.startswith("mov") and not stream.frames


def _tagged_seconds(stream: Stream) -> float | None:
    """Matroska's DURATION of a stream: where it ends (s on its own clock)."""
    clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if clock is None:
        return None
    hours, minutes, seconds = map(float, clock.groups())
    return (hours * 60 + minutes) * 60 + seconds
