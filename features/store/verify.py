"""Is a feature store what it says it is? Every part there, every byte of every tar accounted for by the index.

The store is walked shard by shard, a few at a time, and a tar clip by clip, so that a store of any size needs the
memory of some clips; what is kept is 8 bytes per clip_id, to find one that lies in the store twice.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from features.errors import one_line
from features.store.reader import Store
from features.store.samples import decode_array, sample_key
from features.store.shards import FAILURE_SCHEMA, FOLDERS, index_schema
from features.store.spec import StoreSpec

BUFFER = 8 << 20  # bytes that one tar is read ahead: object storage answers few large requests faster than many small
END = 2 * tarfile.BLOCKSIZE  # a tar ends in two blocks of zeros, and more of them up to a whole record
PLACE = ["clip_id", "split", "shard", "offset", "nbytes"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be: a file of the store, the row of that part (from 0) if it is about one."""

    file: str
    message: str
    row: int | None = None

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f' row {self.row}'}: {self.message}"


@dataclass
class Verdict:
    """What was counted so far; indexed and failed are rows by split."""

    shards: int
    indexed: dict[str, int]
    failed: dict[str, int]
    done: int = 0
    nbytes: int = 0
    problems: int = 0


@dataclass
class Checked:
    """What one shard turned out to hold; hashes: (indexed + failed,) int64, one per clip_id."""

    split: str
    indexed: int = 0
    failed: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def verify(
    store: Store,
    report: Callable[[Problem], None],
    fast: bool = False,
    threads: int = 8,
    progress: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdict:
    """Check the whole store; `report` is called with each problem, `progress` after each shard.

    fast: parts, counts and sizes only, no byte of a tar is read. threads: shards that are read at once.
    """
    plan = planned_rows(store.spec)
    verdict = Verdict(len(plan), dict.fromkeys(store.spec.splits, 0), dict.fromkeys(store.spec.splits, 0))

    def found(problem: Problem) -> None:
        verdict.problems += 1
        report(problem)

    sizes = _file_sizes(store)
    for problem in (*_check_spec(store), *_check_files(store, plan, sizes)):
        found(problem)
    hashes = []
    with ThreadPoolExecutor(threads) as pool:
        tasks: Any = pool.map(lambda name: check_shard(store, name, plan[name], sizes, fast), plan)
        with closing(tasks):  # an interrupted run does not wait for the shards that are still to come
            for checked in tasks:
                verdict.done += 1
                verdict.indexed[checked.split] += checked.indexed
                verdict.failed[checked.split] += checked.failed
                verdict.nbytes += checked.nbytes
                hashes.append(checked.hashes)
                for problem in checked.problems:
                    found(problem)
                progress(verdict)
    for problem in _find_repeated(store, plan, hashes):
        found(problem)
    return verdict


def planned_rows(spec: StoreSpec) -> dict[str, int]:
    """Rows of the manifest that each planned shard covers, indexed and failed together."""
    return {shard: spec.rows_of(shard) for shard in spec.shards()}


def check_shard(store: Store, name: str, planned: int, sizes: Mapping[str, int], fast: bool = False) -> Checked:
    """Check one shard: both parts, the tar, and each of its clips. sizes: bytes of every file of the store."""
    split = name.rsplit("-", 1)[0]
    checked = Checked(split)
    expected = index_schema(store.spec, pa.schema([])).names + [f"label_{task.name}" for task in store.spec.tasks]
    index = _read_part(store, "index", name, expected, PLACE if fast else None, checked.problems)
    failures = _read_part(store, "failures", name, FAILURE_SCHEMA.names, ["clip_id", "split"], checked.problems)
    ids = []
    for folder, table in (("index", index), ("failures", failures)):
        if table is not None:
            ids += table["clip_id"].to_pylist()
            checked.problems += _foreign_rows(f"{folder}/{name}.parquet", table, split, name)
    checked.hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    checked.indexed, checked.failed = len(index or ()), len(failures or ())
    if index is not None and failures is not None and checked.indexed + checked.failed != planned:
        message = f"{checked.indexed} indexed + {checked.failed} failed of the {planned} rows planned"
        checked.problems.append(Problem(f"index/{name}.parquet", message))
    if index is not None:
        checked.problems += _check_tar(store, name, index, sizes.get(f"shards/{name}.tar"), fast)
        checked.nbytes = 0 if fast else pc.sum(index["nbytes"]).as_py() or 0
    return checked


def check_sample(stretch: bytes, row: Mapping[str, Any], spec: StoreSpec) -> Iterator[str]:
    """What is wrong with one sample: its stretch of the tar against its row of the index."""
    try:
        members = _members(stretch)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        yield f"its bytes are damaged: {one_line(error)}"
        return
    key, modalities = sample_key(row["clip_id"]), [m for m in spec.features if row[f"tokens_{m}"]]
    stored, listed = list(members), sorted([f"{key}.json", *(f"{key}.{m}.npy" for m in modalities)])
    if stored != listed:
        yield f"its bytes hold {', '.join(stored) or 'nothing'} instead of {', '.join(listed)}"
        return
    checksum = hashlib.sha256()
    for name in stored:
        checksum.update(members[name])
    if checksum.hexdigest() != row["sha256"]:
        yield f"the sha256 of its bytes is {checksum.hexdigest()}, the index says {row['sha256']}"
        return
    for modality in modalities:
        array, feature, tokens = (
            decode_array(members[f"{key}.{modality}.npy"]),
            spec.features[modality],
            row[f"tokens_{modality}"],
        )
        if (array.shape, str(array.dtype)) != ((tokens, *feature.shape), feature.dtype):
            expected = f"{feature.dtype} {[tokens, *feature.shape]}"
            yield f"{modality} is {array.dtype} {list(array.shape)}; index and store.json say {expected}"
    record = json.loads(bytes(members[f"{key}.json"]))
    labels = {name.removeprefix("label_"): value for name, value in row.items() if name.startswith("label_")}
    wanted = {"clip_id": row["clip_id"], "split": row["split"], "duration": row["duration"], "labels": labels}
    wanted = json.loads(json.dumps(wanted, default=str))  # as the writer writes it
    for entry in sorted(wanted.keys() | record.keys()):
        if wanted.get(entry) != record.get(entry):
            yield f"{entry} is {record.get(entry)!r} in the tar, {wanted.get(entry)!r} in the index"


def _check_spec(store: Store) -> Iterator[Problem]:
    with store.fs.open_input_file(f"{store.path}/store.json") as file:
        written = json.loads(file.read()).get("fingerprint")
    if written != store.spec.fingerprint:
        message = f"its fingerprint {written} is not that of its content ({store.spec.fingerprint}): it was changed"
        yield Problem("store.json", message)


def _file_sizes(store: Store) -> dict[str, int]:
    """Bytes of every file in the store's folders, of the lock, and of what a killed job left next to store.json."""
    root = store.path.rstrip("/")
    infos = store.fs.get_file_info(pafs.FileSelector(root))
    infos = [info for info in infos if info.base_name.startswith(("lock.json", "store.json."))]
    plan = store.fs.get_file_info(pafs.FileSelector(f"{root}/plan", allow_not_found=True))
    infos += [info for info in plan if info.base_name.endswith(".tmp")]
    for folder in FOLDERS:
        infos += store.fs.get_file_info(pafs.FileSelector(f"{root}/{folder}", recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{root}/"): info.size for info in infos if info.type == pafs.FileType.File}


def _check_files(store: Store, plan: Mapping[str, int], sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Parts that are missing, and litter."""
    for name in plan:
        for folder in ("index", "failures"):
            if f"{folder}/{name}.parquet" not in sizes:
                yield Problem(f"{folder}/{name}.parquet", "is missing")
    ending = {"shards": "tar", "index": "parquet", "failures": "parquet"}
    belongs = {f"{folder}/{name}.{ending[folder]}" for folder in FOLDERS for name in plan}
    for file in sorted(sizes.keys() - belongs):
        if file == "lock.json":
            yield Problem(file, "a job is writing to this store, or died before it let go")
        else:
            yield Problem(file, "is litter: no shard that store.json plans has such a file")


def _read_part(
    store: Store,
    folder: str,
    name: str,
    expected: Sequence[str],
    columns: list[str] | None,
    problems: list[Problem],
) -> pa.Table | None:
    """A part's rows; None, with the reason among the problems, where it cannot be used (missing: known already)."""
    file = f"{folder}/{name}.parquet"
    try:
        with store.fs.open_input_file(f"{store.path}/{file}") as source:
            part = pq.ParquetFile(source)
            if missing := [column for column in expected if column not in part.schema_arrow.names]:
                problems.append(Problem(file, f"lacks the columns {', '.join(missing)}"))
                return None
            table = part.read(columns)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        problems.append(Problem(file, f"does not read: {one_line(error)}"))
        return None
    needed = [c for c in table.schema.names if c in PLACE or c == "sha256" or c.startswith("tokens_")]
    if empty := [column for column in needed if table[column].null_count]:
        problems.append(Problem(file, f"has empty cells in {', '.join(empty)}"))
        return None
    return table


def _foreign_rows(file: str, table: pa.Table, split: str, name: str) -> Iterator[Problem]:
    for column, value in (("split", split), ("shard", name)):
        if column in table.schema.names:
            for row in np.flatnonzero(pc.not_equal(table[column], value).to_numpy()):
                yield Problem(file, f"{column} is {table[column][row].as_py()!r}, the file is of {value!r}", int(row))


def _check_tar(store: Store, name: str, index: pa.Table, size: int | None, fast: bool) -> Iterator[Problem]:
    """The index's stretches cover the tar, each once, and each holds its clip."""
    file, tar_file = f"index/{name}.parquet", f"shards/{name}.tar"
    if size is None:
        if len(index):
            yield Problem(tar_file, f"is missing, with the {len(index)} clips that {file} lists")
        return
    if not len(index):
        yield Problem(tar_file, f"is litter: {file} lists no clip in it")
        return
    offsets, lengths = index["offset"].to_numpy(), index["nbytes"].to_numpy()
    inside = (offsets >= 0) & (lengths > 0) & (offsets + lengths <= size)
    for row in np.flatnonzero(~inside):
        message = f"{lengths[row]} bytes at {offsets[row]} do not lie within {tar_file}, which has {size}"
        yield Problem(file, message, int(row))
    end, holes = 0, []
    for row in np.argsort(offsets, kind="stable"):
        if inside[row]:
            if offsets[row] < end:
                yield Problem(file, f"offset {offsets[row]} lies inside another clip, which ends at {end}", int(row))
            elif offsets[row] > end:
                holes.append((end, int(offsets[row])))
            end = max(end, int(offsets[row] + lengths[row]))
    if not END <= size - end < END + tarfile.RECORDSIZE:
        yield Problem(tar_file, f"has {size} bytes, but its last clip in the index ends at {end}")
    for first, last in holes:
        yield Problem(tar_file, f"bytes {first} to {last} belong to no row of {file}")
    if not fast:
        yield from _check_content(store, name, index, np.flatnonzero(inside).tolist(), end)


def _check_content(store: Store, name: str, index: pa.Table, rows: Sequence[int], end: int) -> Iterator[Problem]:
    """Read the tar once, a clip at a time, and what is behind the last one."""
    tar_file = f"shards/{name}.tar"
    try:
        # A buffer of our own: pyarrow reads exactly what is asked for, on S3 with a request for each clip.
        with io.BufferedReader(store.fs.open_input_file(f"{store.path}/{tar_file}"), BUFFER) as tar:
            for number, row in zip(rows, index.take(pa.array(rows)).to_pylist(), strict=True):
                tar.seek(row["offset"])
                for message in check_sample(tar.read(row["nbytes"]), row, store.spec):
                    yield Problem(f"index/{name}.parquet", f"{row['clip_id']} in {tar_file}: {message}", int(number))
            tar.seek(end)
            while rest := tar.read(BUFFER):
                if rest.count(0) != len(rest):
                    yield Problem(tar_file, f"holds more than zeros behind its last clip in the index, from {end} on")
                    return
    except (pa.ArrowException, OSError) as error:
        yield Problem(tar_file, f"does not read: {one_line(error)}")


def _members(stretch: bytes) -> dict[str, memoryview]:
    """Names and payloads in a stretch of a tar. Raises tarfile.TarError where it is not whole members throughout."""
    view, members, end = memoryview(stretch), {}, 0
    with tarfile.open(fileobj=io.BytesIO(stretch), mode="r:") as tar:
        for member in tar:
            if view[end : member.offset_data] != _header(member):  # tarfile reads over damage that it can do without
                raise tarfile.TarError(f"the header of {member.name} is not as it was written")
            last = member.offset_data + member.size
            end = last + -last % tarfile.BLOCKSIZE
            if any(view[last:end]):
                raise tarfile.TarError(f"there is more than zeros behind {member.name}")
            if member.name in members:
                raise tarfile.TarError(f"{member.name} is there twice")
            members[member.name] = view[member.offset_data : last]
    if end != len(stretch):  # tarfile takes a damaged header for the end
        raise tarfile.TarError(f"no whole members behind byte {end} of {len(stretch)}")
    return members


def _header(member: tarfile.TarInfo) -> bytes:
    """The bytes in front of a member's payload: a shard's members have no owner and no time."""
    header = tarfile.TarInfo(member.name)
    header.size, header.mode, header.mtime = member.size, member.mode, 0.0 if "mtime" in member.pax_headers else 0
    return header.tobuf(tarfile.PAX_FORMAT)


def _find_repeated(store: Store, plan: Mapping[str, int], hashes: list[np.ndarray]) -> Iterator[Problem]:
    """Clips that are in the store more than once; the parts are read again only where hashes say so."""
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.int64)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first: dict[str, str] = {}
    for name in plan if suspects else ():
        for folder in ("index", "failures"):
            table = _read_part(store, folder, name, ["clip_id"], ["clip_id"], [])
            for row, clip_id in enumerate(table["clip_id"].to_pylist() if table is not None else ()):
                if hash(clip_id) in suspects:
                    place = f"{folder}/{name}.parquet row {row}"
                    if first.setdefault(clip_id, place) != place:
                        yield Problem(f"{folder}/{name}.parquet", f"{clip_id} is also in {first[clip_id]}", row)
