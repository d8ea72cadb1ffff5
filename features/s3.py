"""S3 that outlives an outage: every call that met a refused connection or a busy server is made again.

The AWS SDK's own retries wait twice as long each time, without a limit and at random: ten attempts took anything from
one to seven minutes, and slept on long after the storage was back. So the SDK tries once, and the waiting is here.
"""

import functools
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileInfo,
    FileSelector,
    FileSystem,
    FileSystemHandler,
    PyFileSystem,
    S3FileSystem,
)
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

PATIENCE = 120.0  # seconds that storage may be away before a call fails
SPOOL = 64 << 20  # bytes of a file being written that stay in memory; beyond them it waits on the local disk
CONNECT = 5.0  # seconds for a connection; the SDK's 1 s is short for a busy machine

# NO_SUCH_UPLOAD: the answer to a completed upload got lost and it was completed again; the file is sent anew.
_TRANSIENT = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING"
    r"|NO_SUCH_UPLOAD)|\(HTTP status (5\d\d|408|429)\)"
)
_NEVER = {
    "NO_SUCH_BUCKET|Bucket '[^']*' not found": "there is no such bucket; make it, or check its name",
    "INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN": (
        "the storage refuses these credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    "ACCESS_DENIED|HTTP status 403": "access is denied; check the credentials and their rights to this bucket",
    "Could not resolve host": "its host is unknown; check endpoint_override or AWS_ENDPOINT_URL, and the network",
    "NETWORK_CONNECTION": "nothing answers there; check endpoint_override or AWS_ENDPOINT_URL",
}
T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, OSError) and _TRANSIENT.search(str(error)) is not None


def explain(error: BaseException) -> str | None:
    """What a person can do about a call that S3 will never answer otherwise; None for any other error."""
    return next((advice for pattern, advice in _NEVER.items() if re.search(pattern, str(error))), None)


def patiently(call: Callable[..., T], *args: Any, patience: float = PATIENCE) -> T:
    """`call(*args)`, again after each transient error for `patience` seconds; 0 = once. Raises what it raised last."""
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_delay(patience),
        wait=wait_exponential_jitter(multiplier=0.2, max=2.0, jitter=0.5),
        reraise=True,
    )
    return retrying(call, *args)


def connect(uri: str, patience: float = PATIENCE) -> FileSystem:
    """The patient filesystem of an s3:// URI's bucket and options, or else of the AWS_* environment variables."""
    # from_uri asks AWS for the bucket's region where none is given: a call like any other.
    plain, _ = patiently(FileSystem.from_uri, uri, patience=patience)
    _, (options,) = plain.__reduce__()  # the options of the URI and the environment together
    # Arrow's I/O threads call us (copy_files); a write in the background would need one of them, and wait for ever.
    ours = {"background_writes": False, "allow_delayed_open": True, "connect_timeout": CONNECT}
    return PyFileSystem(PatientS3({**options, **ours}, patience))


class PatientS3(FileSystemHandler):
    """S3FileSystem's calls, each repeated while its error is transient. Pickles, with the options it was made with.

    A file is read by ranges, so a read repeats alone; it is written when it is closed, whole, so that a writer that
    died or gave up leaves nothing and an upload can be repeated.
    """

    def __init__(self, options: Mapping[str, Any], patience: float) -> None:
        self.options, self.patience = dict(options), patience
        self._s3 = S3FileSystem(**options, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1))
        self._call = functools.partial(patiently, patience=patience)

    def __reduce__(self) -> tuple:
        return PatientS3, (self.options, self.patience)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientS3) and (self.options, self.patience) == (other.options, other.patience)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # object's own type leaves no room for what has no hash

    def get_type_name(self) -> str:  # noqa: D102 (the methods below are pyarrow's)
        return "s3"

    def normalize_path(self, path: str) -> str:  # noqa: D102
        return self._s3.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:  # noqa: D102
        return self._call(self._s3.get_file_info, paths)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:  # noqa: D102
        return self._call(self._s3.get_file_info, selector)

    def create_dir(self, path: str, recursive: bool) -> None:  # noqa: D102
        self._call(lambda: self._s3.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:  # noqa: D102
        self._call(self._s3.delete_dir, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:  # noqa: D102
        self._call(lambda: self._s3.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:  # noqa: D102
        raise NotImplementedError("every bucket of an account is not deleted in one go")

    def delete_file(self, path: str) -> None:  # noqa: D102
        self._call(self._s3.delete_file, path)

    def move(self, source: str, target: str) -> None:  # noqa: D102
        self._call(self._s3.move, source, target)

    def copy_file(self, source: str, target: str) -> None:  # noqa: D102
        self._call(self._s3.copy_file, source, target)

    def open_input_file(self, path: str) -> pa.NativeFile:  # noqa: D102
        return pa.PythonFile(_Reader(self._call(self._s3.open_input_file, path), self._call), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:  # noqa: D102
        return self.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:  # noqa: D102
        return pa.PythonFile(_Writer(functools.partial(self._upload, path, metadata or None)), mode="w")

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:  # noqa: D102
        raise NotImplementedError("S3 appends to no file")

    def _upload(self, path: str, metadata: Mapping[str, str] | None, source: io.IOBase) -> None:
        def upload() -> None:
            source.seek(0)
            with self._s3.open_output_stream(path, metadata=metadata) as target:
                shutil.copyfileobj(source, target, 8 << 20)

        self._call(upload)


class _Reader(io.RawIOBase):
    """A file's ranges, each asked for again while its error is transient."""

    def __init__(self, file: pa.NativeFile, call: Callable[..., Any]) -> None:
        self._file, self._call, self._at, self._size = file, call, 0, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._call(self._file.read_at, left if size is None or size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data


class _Writer(io.RawIOBase):
    """What is written waits here until it is closed, and is uploaded then."""

    def __init__(self, upload: Callable[[io.IOBase], None]) -> None:
        self._upload, self._spool = upload, tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115 (closed by `close`)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._spool.tell()

    def write(self, data: Any) -> int:
        return self._spool.write(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._spool:
                self._upload(self._spool)

    def __del__(self) -> None:
        """Dropped without `close`: the writer failed, and nothing is uploaded."""
        self._spool.close()
