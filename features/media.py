"""A media file handed to a decoder: where it lies, how FFmpeg opens it, and its clock."""

import io

import av
import av.container
from pyarrow import ArrowException
from pyarrow.fs import FileType, LocalFileSystem

from features.errors import FeaturesError, MediaError, one_line
from features.files import open_fs

av.logging.set_level(av.logging.PANIC)  # what matters arrives as an exception; the rest would flood a job's log


def open_source(uri: str) -> str | io.BytesIO:
    """What a decoder opens: a local file's path, or the bytes of a file that lies elsewhere.

    Raises MediaError (stage open) for what is missing, a folder, empty or not readable.
    """
    try:
        filesystem, path = open_fs(uri)
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
        raise MediaError("open", f"{uri} cannot be read: {one_line(error)}") from error


def open_container(source: str | io.BytesIO, uri: str) -> av.container.InputContainer:
    """A media file opened by FFmpeg (PyAV); uri is for the message. Raises MediaError (stage open)."""
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
            return av.open(source, metadata_errors="replace")
        return av.open(f"file:{source}", metadata_errors="replace")  # 'a:b.mp4' is a name here, not a protocol
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError("open", f"{uri} is not a media file that FFmpeg reads: {one_line(error)}") from error


def clock_zero(container: av.container.InputContainer) -> float:
    """The file's time, in seconds, that counts as 0: where its earliest stream begins."""
    return (container.start_time or 0) / av.time_base


def check_segment(stage: str, uri: str, start: float | None, end: float | None) -> tuple[float, float | None]:
    """A segment's start (0 where none is named) and end in seconds. Raises MediaError where it is none."""
    begin = start or 0.0
    if begin < 0 or (end is not None and not end > begin):
        raise MediaError(stage, f"{uri}: no segment from {start} s to {end} s; 0 <= start < end is needed")
    return begin, end
