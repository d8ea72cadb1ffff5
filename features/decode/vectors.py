"""Vectors given instead of media: a file per clip, or a row of one array for many clips.

    audio_features            what one clip has
    clips/a1.npy              (T, D) tokens of D numbers, (D,) a single one, or (T, layers, D)
    corpus.npz#audio[17]      row 17 of the array `audio` of all clips: (N, T, D) or (N, D)
    corpus.npy#[17]           the same of a file with one array
    shard.tar#clips/a1.npy    each of these may lie in a tar: shard.tar#corpus.npz#audio[17]

They are the clip's own: its `start` and `end` do not cut them. A value that is NaN, infinite or beyond the limit is
broken. It becomes the mean of the clip's other values of that number (0 where there is none), and a clip of which too
much is broken is a failure.
"""

import functools
import io
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from features.decode.media import open_source
from features.decode.specs import Encoded, VectorSpec
from features.errors import CorpusError, MediaError, StorageError, one_line
from features.files import path_of, split_place, split_row
from features.store.spec import Feature

if TYPE_CHECKING:
    from features.corpus.manifest import Corpus

LOOKED_AT = 32  # clips of a modality whose vectors decide what shape all of them have
DIMENSIONS = (1, 2)  # of one token: a vector, or the hidden layers of one


def find_features(corpus: "Corpus", modalities: Sequence[str], spec: VectorSpec) -> dict[str, Feature]:
    """What the given vectors of each modality are, from its first clips: the shape that most of them have.

    Raises CorpusError where none of them reads.
    """
    return {name: _find_feature(corpus, name, spec) for name in modalities}


def _find_feature(corpus: "Corpus", modality: str, spec: VectorSpec) -> Feature:
    shapes: Counter[tuple[int, ...]] = Counter()
    failed: list[MediaError] = []
    for uri in _uris(corpus, f"{modality}_features"):
        try:
            shapes[_read(uri).shape[1:]] += 1
        except MediaError as error:
            failed.append(error)
        if shapes.total() + len(failed) == LOOKED_AT:
            break
    if not shapes:
        tried = f"none of the first {len(failed)} {modality}_features reads"
        raise CorpusError(f"corpus {corpus.uri}: {tried}: {failed[0]}")
    ((shape, _),) = shapes.most_common(1)
    encoder = {"name": "vectors", **{name: value for name, value in vars(spec).items() if name != "rates"}}
    return Feature(shape, spec.dtype, spec.rate_of(modality), encoder)


def _uris(corpus: "Corpus", column: str) -> Iterator[str]:
    return (uri for clip in corpus.clips() if (uri := clip.media(corpus.folder).get(column)))


def read_vectors(uri: str, spec: VectorSpec, feature: Feature) -> Encoded | None:
    """A clip's vectors as tokens: values (T, *feature.shape) of the spec's dtype; None where there is no token.

    Raises MediaError (stage vectors) where they do not read or have another shape, (stage quality) where too much of
    them is broken.
    """
    values = _read(uri)
    if values.shape[1:] != tuple(feature.shape):
        raise MediaError(
            "vectors", f"{uri}: a token has shape {_shown(values.shape[1:])}, the corpus {_shown(feature.shape)}"
        )
    values = values.astype(np.float64)
    if spec.trim:
        values = _trim(values)
    if not len(values):
        return None
    sound = np.abs(values) <= min(spec.limit or math.inf, float(np.finfo(spec.dtype).max))  # NaN is not
    broken = float(1 - sound.mean())
    if broken > spec.max_broken:
        raise MediaError(
            "quality", f"{uri}: {broken:.4g} of the values are broken, above --vectors.max-broken {spec.max_broken:g}"
        )
    kept = np.where(sound, values, 0.0)
    mean = kept.sum(axis=0) / sound.sum(axis=0).clip(min=1)
    values = np.where(sound, kept, mean).astype(spec.dtype)
    return Encoded(values, len(values) / feature.rate if feature.rate else 0.0, {"broken_values": broken})


def _trim(values: np.ndarray) -> np.ndarray:
    """Without the tokens of zeros at both ends: the padding of corpora with clips of one length."""
    filled = np.flatnonzero(values.reshape(len(values), -1).any(axis=1))
    return values[filled[0] : filled[-1] + 1] if len(filled) else values[:0]


def _read(uri: str) -> np.ndarray:
    """(T, D) or (T, layers, D) numbers of one clip. Raises MediaError (stage open or vectors)."""
    file, place = split_row(uri)
    match = re.fullmatch(r"#?([^\[\]]*)(?:\[(\d+)\])?", place)
    if match is None or not _name(file).endswith((".npy", ".npz")):
        raise MediaError("vectors", f"{uri}: name an .npy file, or file.npz#key[row] with a row from 0 on")
    key, row = match[1], match[2]
    try:
        values = _load(file, key) if row is None else _shared(file, key)[int(row)]
    except (MediaError, StorageError, MemoryError):
        raise
    except IndexError:
        raise MediaError("vectors", f"{uri}: there is no such row; the array has {len(_shared(file, key))}") from None
    except Exception as error:  # a damaged header is parsed as Python, a damaged archive raises zlib's own errors
        raise MediaError("vectors", f"{uri} is no array that reads: {one_line(error)}") from error
    if values.dtype.kind not in "fiub":
        raise MediaError("vectors", f"{uri} holds {values.dtype} and no numbers")
    values = values[None] if values.ndim == 1 else values
    if values.ndim - 1 not in DIMENSIONS or 0 in values.shape[1:]:
        raise MediaError(
            "vectors", f"{uri} has shape {_shown(values.shape)}; it must be (T, D), (D,) or (T, layers, D)"
        )
    return np.asarray(values)


def _name(file: str) -> str:
    """The name that says what an array's file is: its own, or that of a tar's member."""
    tar, member = split_place(file)
    return member or path_of(tar)


def _load(file: str, key: str) -> np.ndarray:
    source = open_source(file)
    if _name(file).endswith(".npy"):
        if key:
            raise MediaError("vectors", f"{file} holds one array and none called {key!r}; write {file}#[row]")
        if isinstance(source, str):
            return np.lib.format.open_memmap(source, mode="r")  # of a large array only the rows asked for are read
        return np.lib.format.read_array(source, allow_pickle=False)
    with zipfile.ZipFile(source) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if key not in names:
            raise MediaError("vectors", f"{file} holds no array {key!r}; it has {', '.join(names) or 'none'}")
        with archive.open(names[key]) as member:
            return np.lib.format.read_array(io.BytesIO(member.read()), allow_pickle=False)


# An archive's array is unpacked whole, and the next clips have their rows in the same few.
_shared = functools.lru_cache(maxsize=6)(_load)


def _shown(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
