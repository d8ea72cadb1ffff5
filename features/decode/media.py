"""A media file handed to a decoder: where it lies, how FFmpeg opens it, its clock, and how long it says it is."""

import io
import re
from collections.abc import Iterator

import av
import av.container
from av.stream import Stream
from pyarrow import ArrowException
from pyarrow.fs import FileType, LocalFileSystem

from features.errors import FeaturesError, MediaError, StorageError, one_line
from features.files import open_fs
from features.s3 import is_transient

PATIENCE = 60.0  # s; less than a clip's default timeout: storage that is away is not the clip's fault

av.logging.set_level(av.logging.PANIC)  # what matters arrives as an exception; the rest would flood a job's log

Source = str | io.BytesIO

GUESSED = ("aac", "ac3", "eac3", "amr", "h264", "hevc", "mp3")  # bare streams: FFmpeg guesses a duration from the size
SLACK = 0.5  # s by which the streams of a whole file may end before the duration that the file states
PADDING = 0.1  # s by which one stream may: codecs pad, and not every last packet states how long it lasts


def open_source(uri: str) -> Source:
    """What a decoder opens: a local file's path, or the bytes of a file that lies elsewhere.

    Raises MediaError (stage open) for what is missing, a folder, empty or not readable, StorageError where the storage
    is away for longer than its patience.
    """
    try:
        filesystem, path = open_fs(uri, PATIENCE)
        info = filesystem.get_file_info(path)
        if info.type == FileType.NotFound:
            raise MediaError("open", f"{uri} does not exist; check the manifest's path")
        if info.type != FileType.File:
            raise MediaError("open", f"{uri} is not a file; check the manifest's path")
        if info.size == 0:
            raise MediaError("open", f"{uri} is empty (0 bytes); fetch it again")
        if isinstance(filesystem, LocalFileSystem):
            return path
        with filesystem.open_input_file(path) as file:
            return io.BytesIO(file.read())
    except MediaError:
        raise
    except (FeaturesError, ArrowException, OSError) as error:
        cause = error.__cause__ or error  # the bucket's region is looked up where open_fs explains what fails
        if is_transient(cause):
            raise StorageError(f"{uri} cannot be read: {one_line(cause)}; run the same command again later") from error
        raise MediaError("open", f"{uri} cannot be read: {one_line(error)}") from error


def open_container(source: Source, uri: str) -> av.container.InputContainer:
    """A media file opened by FFmpeg (PyAV); uri is for the message. Raises MediaError (stage open)."""
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
            return av.open(source, metadata_errors="replace")
        return av.open(f"file:{source}", metadata_errors="replace")  # 'a:b.mp4' is a name here, not a protocol
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)  # the rest would name the file once more
        raise MediaError("open", f"{uri} is not a media file that FFmpeg reads: {reason}") from error


def clock_zero(container: av.container.InputContainer) -> float:
    """The file's time, in seconds, that counts as 0: where its earliest stream begins."""
    return (container.start_time or 0) / av.time_base


def stamp_of(item: av.Packet | av.VideoFrame) -> int | None:
    """When a packet or frame is shown, in ticks of its stream; some files state only when it is decoded."""
    return item.dts if item.pts is None else item.pts


def packet_time(packet: av.Packet) -> float | None:
    """When a packet is shown (or heard), in s on its stream's clock."""
    return None if (stamp := stamp_of(packet)) is None else float(stamp * packet.time_base)


def packets(container: av.container.InputContainer, stream: Stream) -> Iterator[av.Packet]:
    """A stream's packets up to the file's end, or to where the file's structure is damaged."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        last = av.Packet()  # empty: the decoder gives what it still holds
        last.stream = stream
        yield last


def declared_end(source: Source, uri: str, container: av.container.InputContainer, stream: Stream) -> float | None:
    """When the stream ends by the file's own word (s on the file's clock); None where the file has none on that."""
    zero, start = clock_zero(container), stream.start_time or 0
    if container.format.name in GUESSED and not start:  # an mp3 that begins after 0 has a header that counts it
        return None
    if stream.duration:
        return float((start + stream.duration) * stream.time_base) - zero
    if clock := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):  # Matroska
        hours, minutes, seconds = map(float, clock.groups())
        return (hours * 60 + minutes) * 60 + seconds - zero
    if not container.duration:
        return None
    end = container.duration / av.time_base  # of the longest stream: says nothing on the others, if that is whole
    with open_container(source, uri) as again:
        ends = ((packet_time(p) or 0.0) + float((p.duration or 0) * p.time_base) for p in again.demux() if p.size)
        held = max(ends, default=0.0) - zero
    return end if held < end - SLACK else None


def held_share(
    begin: float, stop: float | None, held: float, declared: float | None, lost: float = 0.0
) -> float | None:
    """How much of what the file declares from begin to stop is there (0-1); None where it declares no end.

    held, declared: where the stream ends and should end, s on the file's clock; lost: s in between that do not decode.
    """
    if declared is None:
        return None
    until = declared if stop is None else min(stop, declared)
    return min(1.0, max(0.0, min(held + PADDING, until) - begin - lost) / (until - begin)) if until > begin else 1.0


def check_segment(stage: str, uri: str, start: float | None, end: float | None) -> tuple[float, float | None]:
    """A segment's start (0 where none is named) and end in seconds. Raises MediaError where it is none."""
    begin = start or 0.0
    if begin < 0 or (end is not None and not end > begin):
        raise MediaError(stage, f"{uri}: no segment from {start} s to {end} s; 0 <= start < end is needed")
    return begin, end
