"""Files anywhere: local paths and URIs opened alike (pyarrow.fs), and small files written whole or not at all."""

import json
import os
import uuid
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs
from pyarrow import ArrowException
from pyarrow.fs import FileSystem, LocalFileSystem

from features.errors import FeaturesError, one_line


def open_fs(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of a local path (relative or absolute) or a URI (file://, s3://, gs://), and the path in it.

    Raises FeaturesError for a scheme that pyarrow does not open.
    """
    if "://" not in uri:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return FileSystem.from_uri(uri)
    except (ArrowException, OSError, ValueError) as error:
        raise FeaturesError(f"{uri} cannot be opened: {one_line(error)}; use a local path, s3:// or gs://") from error


def parent(uri: str) -> str:
    """The folder of a file, as an absolute local path or a URI without a slash at its end."""
    address = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
    return address.partition("?")[0].rstrip("/").rpartition("/")[0] or "/"


def resolve(uri: str, folder: str) -> str:
    """A manifest's own text for a file made absolute: relative paths are relative to the manifest's folder."""
    if "://" in uri or os.path.isabs(uri):
        return uri
    return f"{folder.rstrip('/')}/{quote(uri) if '://' in folder else uri}"


def list_files(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Finished files of a folder by name; none where the folder is missing."""
    infos = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    files = [i for i in infos if i.type == pafs.FileType.File and not i.base_name.endswith(".tmp")]
    return sorted(files, key=lambda info: info.base_name)


def write_atomic(fs: pafs.FileSystem, path: str, payload: bytes) -> None:
    """Write a whole file or nothing. Object stores show a file only when it is closed; local ones need a rename."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp" if fs.type_name == "local" else path  # two writers never share one
    with fs.open_output_stream(temporary) as f:
        f.write(payload)
    if temporary != path:
        fs.move(temporary, path)


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
