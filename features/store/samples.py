"""One sample of a store: its stretch of a shard's tar, written and read.

    {key}.{modality}.npy ... {key}.json       in the order of their names, as WebDataset's own writer lays them down

Stretches simply follow one another, so a sample is packed where it was decoded, kept as it is when its shard is written
again, and read alone by its offset.
"""

import functools
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

if TYPE_CHECKING:
    from features.corpus.manifest import Clip


@dataclass(frozen=True)
class Sample:
    """features: `{modality: (T, *shape)}`, absent modalities left out; duration in seconds; quality: see quality.py."""

    features: Mapping[str, np.ndarray]
    duration: float
    quality: Mapping[str, float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedSample:
    """A sample's bytes in the tar, and what the index says of it. tokens: by modality; sha256: of the members alone."""

    payload: bytes
    sha256: str
    duration: float
    tokens: Mapping[str, int]
    quality: Mapping[str, Any]


def pack(clip: "Clip", sample: Sample) -> PackedSample:
    """A decoded clip as bytes, the same on any machine."""
    import webdataset as wds  # here, for it loads torch, which reading a store does not need

    record = {"clip_id": clip.clip_id, "split": clip.split, "duration": sample.duration, "labels": clip.labels}
    members = {f"{modality}.npy": encode_array(values) for modality, values in sample.features.items()}
    members["json"] = json.dumps(record, default=str).encode()
    checksum = hashlib.sha256()
    for name in sorted(members):  # the order in which they lie in the tar
        checksum.update(members[name])
    stretch = io.BytesIO()
    # Fixed owner and time: the same sample gives the same bytes.
    with wds.TarWriter(stretch, encoder=False, compress=False, mtime=0.0, user="", group="") as tar:
        tar.write({"__key__": sample_key(clip.clip_id), **members})
        end = tar.tarstream.offset  # what closing adds ends a whole tar, and that is the shard's to write
    tokens = {modality: len(values) for modality, values in sample.features.items()}
    return PackedSample(stretch.getvalue()[:end], checksum.hexdigest(), sample.duration, tokens, sample.quality)


def unpack(payload: bytes | memoryview) -> dict[str, Any]:
    """The members of one sample's stretch of a tar: arrays by modality, and `json`."""
    sample: dict[str, Any] = {}
    for name, content in _members(memoryview(payload)):
        if name.rsplit(".", 1)[1] == "json":
            sample["json"] = json.loads(bytes(content))
        else:
            sample[name.split(".", 1)[1].removesuffix(".npy")] = decode_array(content)
    return sample


def _members(payload: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Name and content of every member. Ours have plain headers, which this reads at four times tarfile's speed."""
    at, found = 0, []
    while at + tarfile.BLOCKSIZE <= len(payload):
        header = bytes(payload[at : at + tarfile.BLOCKSIZE])
        size, checksum = header[124:135], header[148:154]
        plain = header[156:157] == b"0" and not header[345] and size.isdigit() and checksum.isdigit()
        if not plain or sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(checksum, 8):
            yield from _any_members(payload)  # long names, or damage, of which tarfile says what it is
            return
        at += tarfile.BLOCKSIZE
        found.append((header[:100].rstrip(b"\0").decode(), payload[at : at + int(size, 8)]))
        at += -(-int(size, 8) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    yield from found


def _any_members(payload: memoryview) -> Iterator[tuple[str, memoryview]]:
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None  # the writer makes nothing but regular files
            yield member.name, memoryview(file.read())


def sample_key(clip_id: str) -> str:
    """WebDataset key of a clip: percent-encoded, dots included, because WebDataset splits names at the first dot."""
    return quote(clip_id, safe="").replace(".", "%2E")


def encode_array(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def decode_array(payload: bytes | memoryview) -> np.ndarray:
    """The array in the bytes of a .npy file."""
    known = _npy_header(bytes(payload[: 10 + int.from_bytes(payload[8:10], "little")]))
    if known is None:
        return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    shape, dtype, begin = known
    # A copy, for a view would keep all that was read along with it.
    return np.frombuffer(payload, dtype, math.prod(shape), begin).reshape(shape).copy()


@functools.lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype, int] | None:
    """Shape, dtype and length of a header of version 1, which all of ours are; None for any other."""
    stream = io.BytesIO(header)
    if not header.startswith(b"\x93NUMPY\x01\x00"):
        return None
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    return None if fortran_order or dtype.hasobject else (shape, dtype, len(header))
