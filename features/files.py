"""Files anywhere: local paths and URIs opened alike (pyarrow.fs), and small files written whole or not at all."""

import functools
import json
import os
import re
import unicodedata
import uuid
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow.fs as pafs
from pyarrow import ArrowException
from pyarrow.fs import FileSystem, LocalFileSystem

from features import s3
from features.errors import FeaturesError, one_line

SHOW_OPEN_FILES = ("local", "abfs")  # filesystems on which a file is seen, empty or half, while it is written
PROBE = 3.0  # seconds that storage may be away when a job starts
# `shard.tar#clip.mp4`; also of a packed tar, which is then refused by its name
MEMBER = re.compile(r"(.+?\.(?:tar|tgz|tar\.\w+)(?:\?[^#]*)?)(#.+)", re.DOTALL | re.IGNORECASE)
ROW = re.compile(r"(.+\.np[yz](?:\?[^#]*)?)(#[^#/]*)", re.DOTALL)  # `vectors.npz#key[row]`


def open_fs(uri: str, patience: float = s3.PATIENCE) -> tuple[FileSystem, str]:
    """The filesystem of a local path (relative or absolute) or a URI (file, s3, gs, abfs), and the path in it.

    patience: seconds that each call to S3 is retried while the storage is away. Raises FeaturesError for what pyarrow
    does not open.
    """
    if "://" not in uri:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        parts = urlsplit(uri)
        if parts.scheme == "s3":
            path = f"{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}".rstrip("/")
            return _connect(parts._replace(path="").geturl(), patience), path
        return FileSystem.from_uri(uri)
    except (ArrowException, OSError, ValueError) as error:
        advice = s3.explain(error) or f"{one_line(error)}; use a local path, s3://, gs:// or abfs://"
        raise FeaturesError(f"{uri} cannot be opened: {advice}") from error


# One client per bucket and options: each has connections of its own.
_connect = functools.lru_cache(maxsize=64)(s3.connect)


def require_reachable(uri: str) -> None:
    """Raise FeaturesError, within seconds, for an s3:// URI that will never work: host, credentials or bucket wrong."""
    if not uri.startswith("s3://"):
        return
    fs, path = open_fs(uri, PROBE)
    bucket = path.partition("/")[0]
    try:
        fs.get_file_info(path)  # a wrong key is refused here; a missing bucket looks like a missing file
        missing = fs.get_file_info(bucket).type == pafs.FileType.NotFound and "allow_bucket_creation" not in uri
    except OSError as error:
        raise FeaturesError(f"{uri} cannot be used: {s3.explain(error) or one_line(error)}") from error
    if missing:
        raise FeaturesError(f"{uri} cannot be used: there is no bucket {bucket}; make it, or check its name")


def parent(uri: str) -> str:
    """The folder of a file, as an absolute local path or a URI without a slash at its end; a URI keeps its options."""
    address, mark, options = uri.partition("?") if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "", "")
    return (address.rstrip("/").rpartition("/")[0] or "/") + mark + options


def resolve(uri: str, folder: str) -> str:
    """A manifest's own text for a file made absolute: relative paths are relative to the manifest's folder."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    if "://" not in folder:
        return f"{folder.rstrip('/')}/{uri}"
    address, mark, options = folder.partition("?")
    file, place = split_place(uri)
    return f"{address.rstrip('/')}/{quote(file)}{mark}{options}{place}"


def path_of(uri: str) -> str:
    """A URI without its options; a local path as it is, for in its name a question mark is a character like any."""
    return uri.partition("?")[0] if "://" in uri else uri


def find_file(fs: FileSystem, path: str) -> pafs.FileInfo:
    """A file's info; where there is none of that name, of the same name as another system writes it.

    macOS and some archives write an accented letter as two characters (NFD), and manifests mostly as one (NFC). A
    manifest that Windows wrote parts folders by backslashes.
    """
    info = fs.get_file_info(path)
    others = [unicodedata.normalize(form, name) for name in (path, path.replace("\\", "/")) for form in ("NFC", "NFD")]
    for other in dict.fromkeys(others):
        if info.type == pafs.FileType.NotFound and other != path:
            info = fs.get_file_info(other)
    return info


def split_place(uri: str) -> tuple[str, str]:
    """The file of `vectors.npz#key[row]` or `shard.tar#clip.mp4`, and the rest from # on; "" for a whole file."""
    match = MEMBER.fullmatch(uri) or ROW.fullmatch(uri)
    return (match[1], match[2]) if match else (uri, "")


def split_row(uri: str) -> tuple[str, str]:
    """As `split_place` of arrays alone: of `shard.tar#vectors.npz#key[row]` the array's file, which is in the tar."""
    match = ROW.fullmatch(uri)
    return (match[1], match[2]) if match else (uri, "")


def list_files(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Finished files of a folder by name; none where the folder is missing."""
    infos = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    files = [i for i in infos if i.type == pafs.FileType.File and not i.base_name.endswith(".tmp")]
    return sorted(files, key=lambda info: info.base_name)


def temporary_path(fs: pafs.FileSystem, path: str) -> str:
    """Where a file is written before it gets its name: two writers never share one. `path` where none is needed."""
    return f"{path}.{uuid.uuid4().hex}.tmp" if fs.type_name in SHOW_OPEN_FILES else path


def publish(fs: pafs.FileSystem, temporary: str, path: str, sync: bool = True) -> None:
    """Give a closed file its name. S3 and GCS show a file only when it is closed; local files need a rename.

    sync: wait until the disk has its bytes, for after a power cut the name alone may be there.
    """
    if temporary == path:
        return
    if fs.type_name == "abfs":  # pyarrow renames only in accounts with a hierarchical namespace; a copy shows up whole
        fs.copy_file(temporary, path)
        fs.delete_file(temporary)
        return
    if sync:
        file = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    fs.move(temporary, path)


def write_atomic(fs: pafs.FileSystem, path: str, payload: bytes, sync: bool = True) -> None:
    """Write a whole file or nothing. sync: as in `publish`."""
    temporary = temporary_path(fs, path)
    with fs.open_output_stream(temporary) as f:
        f.write(payload)
    publish(fs, temporary, path, sync)


def read_text(folder: str, name: str) -> str | None:
    """A file of a folder, None where it is missing."""
    fs, path = open_fs(folder)
    try:
        with fs.open_input_file(f"{path}/{name}") as f:
            return f.read().decode()
    except FileNotFoundError:
        return None


def read_json(folder: str, name: str) -> Any:
    """A JSON file of a folder, None where it is missing."""
    text = read_text(folder, name)
    return None if text is None else json.loads(text)


def write_text(folder: str, name: str, text: str) -> None:
    """A file of a folder, whole or not at all."""
    fs, path = open_fs(folder)
    write_atomic(fs, f"{path}/{name}", text.encode())
