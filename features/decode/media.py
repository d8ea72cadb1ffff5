"""A media file handed to a decoder: where it lies, how FFmpeg opens it, its clock and its packets."""

import contextlib
import functools
import io
import posixpath
import tarfile
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

import av
from av.container import InputContainer
from av.stream import Stream
from av.video.stream import VideoStream
from pyarrow import ArrowException
from pyarrow.fs import FileType, LocalFileSystem

from features.errors import FeaturesError, MediaError, StorageError, one_line
from features.files import find_file, open_fs, split_place
from features.s3 import is_transient

PATIENCE = 60.0  # s; less than a clip's default timeout: storage that is away is not the clip's fault

av.logging.set_level(av.logging.PANIC)  # what matters arrives as an exception; the rest would flood a job's log

Source = str | io.BytesIO

SLACK = 0.5  # s by which the streams of a whole file may end before the duration that the file states
TAR_BUFFER = 1 << 20  # bytes read at once of a tar's headers, and of the small files between them
BEGINNING = -(2**62)  # ticks, before any timestamp
HEAD = 65_536  # bytes among which a file says how large it is
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # begins what says so in wma and wmv, 40 bytes later
STREAMED = 0x7FFF_F000  # bytes and more, or none, are written where the size is not known yet
PADDING = 0.1  # s by which one stream may: codecs pad, and not every last packet states how long it lasts


def open_source(uri: str) -> Source:
    """What a decoder opens: a local file's path, or the bytes of a file that lies elsewhere.

    Raises MediaError (stage open) for what is missing, a folder, empty or not readable, StorageError where the storage
    is away for longer than its patience.
    """
    try:
        file, member = split_place(uri)
        filesystem, path = open_fs(file, PATIENCE)
        info = find_file(filesystem, path)
        if info.type == FileType.NotFound:
            raise MediaError("open", f"{uri} does not exist; check the manifest's path")
        if info.type != FileType.File:
            raise MediaError("open", f"{uri} is not a file; check the manifest's path")
        if info.size == 0:
            raise MediaError("open", f"{uri} is empty (0 bytes); fetch it again")
        if member:
            return _read_member(uri, file, member[1:])
        if isinstance(filesystem, LocalFileSystem):
            return info.path
        with filesystem.open_input_file(info.path) as file:
            return io.BytesIO(file.read())
    except MediaError:
        raise
    except tarfile.TarError as error:
        raise MediaError(
            "open", f"{uri}: the tar does not read: {one_line(error)}; a tar must not be packed"
        ) from error
    except (FeaturesError, ArrowException, OSError) as error:
        cause = error.__cause__ or error  # the bucket's region is looked up where open_fs explains what fails
        if is_transient(cause):
            raise StorageError(f"{uri} cannot be read: {one_line(cause)}; run the same command again later") from error
        raise MediaError("open", f"{uri} cannot be read: {one_line(error)}") from error


def _read_member(uri: str, file: str, name: str) -> io.BytesIO:
    """The bytes of one member of a tar, of which only they are read."""
    places = _members(file)
    if (place := places.get(_normal(name))) is None:
        raise MediaError("open", f"{uri} does not exist: the tar has {len(places)} files, and none of that name")
    offset, size = place
    if not size:
        raise MediaError("open", f"{uri} is empty (0 bytes); fetch it again")
    filesystem, path = open_fs(file, PATIENCE)
    with filesystem.open_input_file(find_file(filesystem, path).path) as stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(size))


@functools.lru_cache(maxsize=64)  # a manifest's rows have their media in the same few tars
def _members(file: str) -> dict[str, tuple[int, int]]:
    """Where each file of a tar lies: `{name: (offset, size)}`, from its headers alone."""
    filesystem, path = open_fs(file, PATIENCE)
    with (
        filesystem.open_input_file(find_file(filesystem, path).path) as stream,
        io.BufferedReader(stream, TAR_BUFFER) as buffered,
        tarfile.open(fileobj=buffered, mode="r:") as tar,
    ):
        return {_normal(member.name): (member.offset_data, member.size) for member in tar if member.isfile()}


def _normal(name: str) -> str:
    """A member's name however it was written: `tar -cf shard.tar .` puts ./ before it, macOS takes accents apart."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


class MediaFile:
    """A file that pictures and sound are decoded from, read from its storage once: a local path, or its bytes.

    FFmpeg decodes some frames of each file that it opens. So what has read a container's picture may leave it to the
    next that does. Sound needs one of its own: a seek to where the picture begins leaves out what is heard before.
    """

    def __init__(self, uri: str, source: Source | None = None) -> None:
        """The file at a URI; source: what it is, where that is known. Raises as `open_source` does."""
        self.uri, self.source = uri, open_source(uri) if source is None else source
        self._left: InputContainer | None = None

    @contextlib.contextmanager
    def opened(self, fresh: bool = False, leave: bool = False) -> Iterator[InputContainer]:
        """The file as FFmpeg's container, at its beginning. Raises MediaError (stage open).

        fresh: not one that another has left, with decoders that are set up already; leave: the next reader of the
        picture may have it.
        """
        left, self._left = None if fresh else self._left, self._left if fresh else None
        container = left or self._open()
        try:
            yield container
        except BaseException:
            container.close()
            raise
        if leave and self._left is None and _is_rewound(container):
            self._left = container
        else:
            container.close()

    def handle(self) -> Source:
        """The path, or the bytes from their beginning: each reader has a place of its own."""
        return self.source if isinstance(self.source, str) else io.BytesIO(self.source.getvalue())

    @functools.cached_property
    def share(self) -> float:
        """How much (0-1) is there of the bytes that a RIFF file (wav, avi) or an ASF (wma, wmv) says that it has."""
        source = self.handle()
        with open(source, "rb") if isinstance(source, str) else source as file:
            head, size = file.read(HEAD), file.seek(0, io.SEEK_END)
        stated = 0
        if head.startswith(b"RIFF"):
            rest = int.from_bytes(head[4:8], "little")
            stated = rest + 8 if 0 < rest < STREAMED else 0
        elif (at := head.find(ASF)) >= 0:
            was_sent = head[at + 88] & 1 if len(head) > at + 88 else 1  # as it was recorded: no size was known
            stated = 0 if was_sent else int.from_bytes(head[at + 40 : at + 48], "little")
        return min(1.0, size / stated) if stated else 1.0

    def close(self) -> None:
        """Close what is left open."""
        if self._left is not None:
            self._left.close()
            self._left = None

    def _open(self) -> InputContainer:
        handle = self.handle()
        try:  # 'a:b.mp4' is a name here, not a protocol
            place = f"file:{handle}" if isinstance(handle, str) else handle
            return av.open(place, "r", metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)  # the rest would name the file once more
            raise MediaError("open", f"{self.uri} is not a media file that FFmpeg reads: {reason}") from error


@contextlib.contextmanager
def media_file(file: str | MediaFile) -> Iterator[MediaFile]:
    """The file at a URI, closed at the end; one that is shared already stays as it is."""
    if isinstance(file, MediaFile):
        yield file
    else:
        with contextlib.closing(MediaFile(file)) as own:
            yield own


def _is_rewound(container: InputContainer) -> bool:
    """Whether a container is at its picture's beginning again: mp4's tables know where that is, others guess."""
    if not container.format.name.startswith("mov") or len(container.streams.video) != 1:
        return False
    try:
        container.seek(BEGINNING, stream=container.streams.video[0])
    except av.FFmpegError:
        return False
    return True


def clock_zero(container: InputContainer) -> float:
    """The file's time, in seconds, that counts as 0: where its earliest stream begins."""
    return (container.start_time or 0) / av.time_base


def tick_of(stream: Stream) -> Fraction:
    """Seconds of a stream's tick: what is in a container has one."""
    assert stream.time_base is not None
    return stream.time_base


def stamp_of(item: av.Packet | av.VideoFrame) -> int | None:
    """When a packet or frame is shown, in ticks of its stream; some files state only when it is decoded."""
    return item.dts if item.pts is None else item.pts


def packet_time(packet: av.Packet) -> float | None:
    """When a packet is shown (or heard), in s on its stream's clock."""
    return None if (stamp := stamp_of(packet)) is None else float(stamp * packet.time_base)


def packets(container: InputContainer, stream: Stream) -> Iterator[av.Packet]:
    """A stream's packets up to the file's end, or to where the file's structure is damaged."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        last = av.Packet()  # empty: the decoder gives what it still holds
        last.stream = stream
        yield last


def single_threaded(stream: VideoStream, strict: bool) -> None:
    """Let a stream decode in this thread; strict: what is damaged does not decode, else FFmpeg paints over it.

    Where another has left the container its decoder is set up already, and strict.
    """
    context = stream.codec_context
    if not context.is_open:
        context.thread_type, context.thread_count = "NONE", 1
        context.options = {"err_detect": "explode"} if strict else {}


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
