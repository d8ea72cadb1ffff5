"""One sample of a store: its stretch of a shard's tar, written and read.

    {key}.{modality}.npy ... {key}.json       in the order of their names, as WebDataset's own writer lays them down

Stretches simply follow one another, so a sample is packed where it was decoded, kept as it is when its shard is written
again, and read alone by its offset.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
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
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:") as tar:
        for member in tar:
            name, extension = member.name.split(".", 1)[1], member.name.rsplit(".", 1)[1]
            file = tar.extractfile(member)
            assert file is not None  # the writer makes nothing but regular files
            content = file.read()
            if extension == "json":
                sample["json"] = json.loads(content)
            else:
                sample[name.removesuffix(".npy")] = decode_array(content)
    return sample


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
    return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
