"""Writing one shard of a feature store so that it is either committed whole or not there.

Order of writing: tar, failures part, index part. The index part is the commit record; whatever lies in the store
without one is litter of a run that died, and `sweep_litter` removes it. A shard that is written again, because some of
its clips may succeed now, loses its index part first: an index never points into another tar.
"""

import contextlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from features.corpus.manifest import VECTORS, Clip
from features.errors import StoreError
from features.files import list_files, open_fs, publish, temporary_path, write_atomic
from features.store import Store, StoreSpec
from features.store.quality import quality_schema
from features.store.reader import require_single
from features.store.samples import PackedSample

FOLDERS = ("shards", "index", "failures")  # of one file per shard
PARQUET_END = b"PAR1"
TAR_END = 2 * tarfile.BLOCKSIZE  # zeros, and more of them until a record is full
FAILURE_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("split", pa.string()),
        ("uri", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be used."""

    stage: str
    error: str
    message: str
    attempts: int = 1

    def after(self, attempts: int) -> "Failure":
        """The same failure, counting the attempts of earlier runs."""
        return replace(self, attempts=self.attempts + attempts)


@dataclass(frozen=True)
class Earlier:
    """What a committed shard holds that stays, by clip_id: index rows and failures; attempts of those to try again."""

    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: Mapping[str, Failure] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)


def index_schema(spec: StoreSpec, labels: pa.Schema) -> pa.Schema:
    """Columns of an index part: the sample's place, its size in tokens, its labels and where it came from."""
    return pa.schema(
        [
            ("clip_id", pa.string()),
            ("split", pa.string()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("nbytes", pa.int64()),
            ("sha256", pa.string()),
            ("duration", pa.float64()),
            *[(f"tokens_{modality}", pa.int32()) for modality in spec.features],
            *quality_schema(spec.features),
            *[(f"uri_{source}", pa.string()) for source in _sources(spec)],
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("fold", pa.int64()),
            ("group", pa.string()),
            *[(f"label_{field.name}", field.type) for field in labels],
        ]
    )


def _sources(spec: StoreSpec) -> list[str]:
    """Columns of the manifest that name the files of a store's modalities; video and audio in any case."""
    given = [f"{m}{VECTORS}" for m, feature in spec.features.items() if feature.encoder.get("name") == "vectors"]
    media = [m for m in ("image", "text") if m in spec.features and m + VECTORS not in given]
    return ["video", "audio", *media, *given]


class ShardWriter:
    """Collects one shard's samples and failures; `commit` makes them count. Use as a context manager."""

    def __init__(self, store_uri: str, name: str, spec: StoreSpec, labels: pa.Schema) -> None:
        self.fs, self.root = open_fs(store_uri)
        self.name = name
        self.split = name.rsplit("-", 1)[0]
        self.modalities = tuple(spec.features)
        self.schema = index_schema(spec, labels)
        self.quality, self.sources = quality_schema(spec.features).names, _sources(spec)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        # A name of its own per writer: a task that Ray runs again never meets the half of its dead twin.
        self._tar_path = f"{self.root}/shards/{name}.tar"
        self._temporary = temporary_path(self.fs, self._tar_path)
        self._tar: pa.NativeFile | None = None

    def add(self, clip: Clip, sample: PackedSample) -> None:
        """Append a sample to the tar; it counts from `commit` on."""
        files = clip.files()
        row = {
            "clip_id": clip.clip_id,
            "split": self.split,
            "shard": self.name,
            "nbytes": len(sample.payload),
            "sha256": sample.sha256,
            "duration": sample.duration,
            **{f"tokens_{m}": sample.tokens.get(m, 0) for m in self.modalities},
            **{name: sample.quality.get(name) for name in self.quality},
            **{f"uri_{source}": files.get(source) for source in self.sources},
            "start": clip.start,
            "end": clip.end,
            "fold": clip.fold,
            "group": clip.group,
            **{f"label_{name}": value for name, value in clip.labels.items()},
        }
        self.keep(row, sample.payload)

    def keep(self, row: Mapping[str, Any], payload: bytes) -> None:
        """Append a sample as it is. row: its index row, but for the offset; payload: its stretch of the tar."""
        if self._tar is None:
            if self.fs.type_name == "gcs":  # a stream that is dropped shows what there was of it, in place of the tar
                self._uncount()
            self._tar = self.fs.open_output_stream(self._temporary)
        self.rows.append({**row, "offset": self._tar.tell()})
        self._tar.write(payload)

    def fail(self, clip: Clip, failure: Failure) -> None:
        """Record a clip that cannot be used."""
        uri = next(iter(clip.files().values()), None)
        self.failed.append({"clip_id": clip.clip_id, "split": self.split, "uri": uri, **vars(failure)})

    def commit(self) -> None:
        """Tar, then failures, then index: after the last of them the shard counts."""
        self._uncount()
        if self._tar is not None:
            self._tar.write(bytes(TAR_END + -(self._tar.tell() + TAR_END) % tarfile.RECORDSIZE))
            self._tar.close()
            publish(self.fs, self._temporary, self._tar_path)
            self._tar = None
        self._write_part("failures", self.failed, FAILURE_SCHEMA)
        self._write_part("index", self.rows, self.schema)

    def _uncount(self) -> None:
        index = f"{self.root}/index/{self.name}.parquet"
        if self.fs.get_file_info(index).type == pafs.FileType.File:
            self.fs.delete_file(index)

    def _write_part(self, folder: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
        write_atomic(self.fs, f"{self.root}/{folder}/{self.name}.parquet", buffer.getvalue().to_pybytes())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._tar is not None and self._temporary != self._tar_path:  # not committed: leave nothing behind
            with contextlib.suppress(OSError):  # a full disk, the reason why we are here
                self._tar.close()
            self.fs.delete_file(self._temporary)


def read_earlier(store: Store, name: str, retry: Sequence[str]) -> Earlier:
    """A committed shard's content, without the failures to try again: those of a class or stage in retry, or all."""
    try:
        rows = store.part("index", name).to_pylist()
    except FileNotFoundError:  # not committed: a run that was to try it again died
        return Earlier()
    failures = store.part("failures", name).to_pylist()
    again = {row["clip_id"]: row["attempts"] for row in failures if is_retried(row, retry)}
    kept = {
        row["clip_id"]: Failure(row["stage"], row["error"], row["message"], row["attempts"])
        for row in failures
        if row["clip_id"] not in again
    }
    return Earlier({row["clip_id"]: row for row in rows}, kept, again)


def failed_shards(store: Store, retry: Sequence[str]) -> dict[str, int]:
    """Committed shards with failures to try again, and how many."""
    counts = {}
    for name in sorted(store.committed()):
        if number := sum(is_retried(row, retry) for row in store.part("failures", name).to_pylist()):
            counts[name] = number
    return counts


def is_retried(failure: Mapping[str, Any], retry: Sequence[str]) -> bool:
    """Whether a row of failures is of a class or stage that is named; none named = all."""
    return not retry or failure["error"] in retry or failure["stage"] in retry


def find_any_store(uri: str) -> Store | None:
    """The store at `uri`, None where there is none. Raises StoreError where other files lie there."""
    require_single(uri)
    fs, path = open_fs(uri)
    if fs.get_file_info(f"{path}/store.json").type != pafs.FileType.NotFound:
        return Store(uri)
    # What lies in a store's folders without a commit record is deleted: not somebody else's files.
    if foreign := [info.path for folder in (*FOLDERS, "plan") for info in list_files(fs, f"{path}/{folder}")]:
        raise StoreError(f"{uri} holds files but no store ({foreign[0]}): give --store a new or empty folder")
    return None


def find_store(uri: str, spec: StoreSpec) -> Store | None:
    """The store at `uri`, None where there is none. Raises StoreError when it was made with another spec."""
    store = find_any_store(uri)
    if store is None:
        return None
    # Of another version of the decoders it is still a store of this corpus, and so it is when its corpus has grown.
    alike = replace(spec, decoding=store.spec.decoding, extends=store.spec.extends)
    if changed := alike.difference(store.spec):
        raise StoreError(
            f"{uri} holds a store with another spec ({'; '.join(changed)}): "
            "give another --store, or the corpus and options that this one was made with"
            + ("; if clips were added to the corpus, --extend" if _is_of_rows(changed) else "")
        )
    return store


def _is_of_rows(changed: Sequence[str]) -> bool:
    """Whether two specs differ in the corpus alone, and in what follows from it."""
    return all(line.startswith(("corpus:", "splits.", "tasks:")) for line in changed)


def require_same_decoding(store: Store, decoding: int) -> None:
    """Raise StoreError where more clips of a store would be decoded in another way than those that it has."""
    if store.spec.decoding != decoding:
        raise StoreError(
            f"{store.uri} was extracted by decoders of version {store.spec.decoding}, and these are of version "
            f"{decoding}: extract all of it into another --store; this one can still be read and trained on"
        )


def create_store(uri: str, spec: StoreSpec) -> Store:
    """The store at `uri`, made if missing. Raises StoreError when another spec's store lies there."""
    if (store := find_store(uri, spec)) is not None:
        return store
    fs, path = open_fs(uri)
    for folder in FOLDERS:
        fs.create_dir(f"{path}/{folder}", recursive=True)
    write_atomic(fs, f"{path}/store.json", (json.dumps(spec.to_dict(), indent=2) + "\n").encode())
    return Store(uri)


def sweep_litter(store: Store) -> int:
    """Delete what dead runs left and return how many files: temporary ones, tars and failures without an index part.

    Also an index part whose tar or failures are gone: a worker that outlived its job by a moment wrote it, a copy broke
    off, or the power was cut.
    """
    files = {folder: _every_file(store, folder) for folder in FOLDERS}
    tars, parts, failures = ({_stem(i): i for i in infos if _is_whole(store, i)} for infos in files.values())
    committed = {name for name, part in parts.items() if name in failures and (name in tars or not _rows(store, part))}
    litter = [info for infos in files.values() for info in infos if _stem(info) not in committed]
    litter += [info for info in _every_file(store, "") if info.base_name.startswith("store.json.")]
    litter += [info for info in _every_file(store, "plan") if info.base_name.endswith(".tmp")]
    for info in litter:
        store.fs.delete_file(info.path)
    return len(litter)


def _every_file(store: Store, folder: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(f"{store.path}/{folder}".rstrip("/"), allow_not_found=True)
    return [info for info in store.fs.get_file_info(selector) if info.type == pafs.FileType.File]


def _stem(info: pafs.FileInfo) -> str:
    return info.base_name.rsplit(".", 1)[0]


def _is_whole(store: Store, info: pafs.FileInfo) -> bool:
    """False for what a power cut leaves of a file. Object stores have whole ones alone, and each look costs a request.

    A parquet file ends in its footer.
    """
    if not info.size or info.extension != "parquet" or store.fs.type_name != "local":
        return info.size > 0
    with store.fs.open_input_file(info.path) as file:
        return file.read_at(len(PARQUET_END), max(0, info.size - len(PARQUET_END))) == PARQUET_END


def _rows(store: Store, part: pafs.FileInfo) -> int:
    with store.fs.open_input_file(part.path) as file:
        return pq.read_metadata(file).num_rows
