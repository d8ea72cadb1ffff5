"""The feature store: WebDataset shards with a parquet index, described by one spec file.

    STORE/store.json             the spec: features, tasks, rows per split, digest of the corpus
    STORE/plan/*.arrow           the manifest's rows by shard, one file per split
    STORE/shards/*.tar           {clip_id}.{modality}.npy and {clip_id}.json, one split per shard
    STORE/index/*.parquet        one row per committed sample; the part is the shard's commit record
    STORE/failures/*.parquet     one row per clip that could not be used

Which clips share a shard follows from the manifest's order and `shard_rows` alone, so the same corpus gives the same
bytes on any cluster. Writing is in `features.store.shards`; this file is the one reader for every later job.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from features.errors import StoreError
from features.files import list_files, open_fs, path_of
from features.store.index import count_rows, open_kept, read_parts, schema_of, split_of
from features.store.samples import unpack
from features.store.spec import StoreSpec

MIXTURES = (".yaml", ".yml")
OPEN_SHARDS = 128  # files that one reader keeps open: a large store has more shards than a process may open files


Place = tuple[str, int, int]  # where a sample lies: shard, offset, nbytes


def is_mixture(uri: str) -> bool:
    """Whether a path or URI names a YAML file of several stores (`features.store.mixture`)."""
    return path_of(uri).endswith(MIXTURES)


def require_single(uri: str) -> None:
    """Raise StoreError where a path or URI names a mixture, and one store is meant."""
    if is_mixture(uri):
        raise StoreError(f"{uri}: a mixture of stores cannot be used here: name one of its stores")


class Store:
    """Read access to a feature store on any filesystem that pyarrow opens.

    shared: whether samples come from memory that processes share. Raises StoreError when there is no store at `uri`.
    """

    shared = False
    weights: tuple[float, ...] = ()  # of a mixture's stores

    def __init__(self, uri: str) -> None:
        require_single(uri)
        self.uri = uri
        self.fs, self.path = open_fs(uri)
        try:
            with self.fs.open_input_file(f"{self.path}/store.json") as f:
                self.spec = StoreSpec.from_dict(json.loads(f.read()))
        except FileNotFoundError:
            raise StoreError(f"no feature store at {uri}: make one with pipelines/extract.py --store {uri}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{uri}/store.json is damaged ({error!r}): extract the store again") from None
        self._shards: dict[str, pa.NativeFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # open files do not cross processes

    @property
    def remote(self) -> bool:
        """Whether it is elsewhere than on this machine's own disks."""
        return bool(self.fs.type_name != "local")

    @property
    def members(self) -> tuple["Store", ...]:
        """The store itself; of a mixture its stores."""
        return (self,)

    def index(self, split: str | None = None, columns: list[str] | None = None, fold: int | None = None) -> pa.Table:
        """One row per committed sample, ordered by shard and offset.

        fold: cross-validation: this fold is the test split, the next one the val split, all others train, whatever
        the manifest's splits are. Raises StoreError where there is no such fold.
        """
        return pa.concat_tables(self.index_tables(split, columns, fold))

    def index_tables(
        self, split: str | None = None, columns: list[str] | None = None, fold: int | None = None
    ) -> Iterator[pa.Table]:
        """The same rows, a large table of one split at a time, an empty one first: for an index of millions."""
        parts = self._parts("index")
        schema = schema_of(self.fs, parts[0])
        names = schema.names if columns is None else columns
        yield schema.empty_table().select(names)
        condition = None if split is None or fold is None else self._held_out(split, fold)
        read = names if condition is None else [*names, *{"fold"}.difference(names)]
        kept = open_kept(self.fs, parts)
        whole = split is None or condition is not None
        if kept and {*read} <= {*kept[0].schema.names}:
            own_batches = (batch for batch in kept if whole or batch["split"][0].as_py() == split)
            tables: Iterator[pa.Table] = map(pa.Table.from_batches, zip(own_batches, strict=True))
        else:
            own = (part for part in parts if whole or split_of(part) == split)
            tables = read_parts(self.fs, own, pa.schema([schema.field(name) for name in read]))
        for table in tables:
            yield (table if condition is None else table.filter(condition)).select(names)

    def folds(self) -> list[int]:
        """The folds of cross-validation. Raises StoreError where there are fewer than three, or a clip has none."""
        column = self.index(columns=["fold"])["fold"]
        folds = sorted(pc.unique(column.drop_null()).to_pylist())
        if len(folds) < 3 or column.null_count:
            lack = f"{column.null_count} clips have no fold" if column.null_count else f"it has {len(folds)} folds"
            raise StoreError(f"{self.uri} has no cross-validation: {lack}; its corpus needs 3 or more in column fold")
        return folds

    def _held_out(self, split: str, fold: int) -> pc.Expression:
        folds = self.folds()
        if fold not in folds:
            raise StoreError(f"{self.uri} has no fold {fold}; it has {', '.join(map(str, folds))}")
        test, val = fold, folds[(folds.index(fold) + 1) % len(folds)]
        held_out = {"test": pc.field("fold") == test, "val": pc.field("fold") == val}
        return held_out.get(split, ~pc.field("fold").isin([test, val]))

    def failures(self) -> pa.Table:
        """One row per clip that could not be used."""
        parts = self._parts("failures")
        schema = schema_of(self.fs, parts[0])
        return pa.concat_tables([schema.empty_table(), *read_parts(self.fs, parts, schema)])

    def committed(self) -> set[str]:
        """Names of the shards whose index part exists."""
        return {info.base_name.removesuffix(".parquet") for info in list_files(self.fs, f"{self.path}/index")}

    def part(self, folder: str, shard: str) -> pa.Table:
        """One committed shard's rows of `index` or `failures`. Raises FileNotFoundError for one that is not."""
        with self.fs.open_input_file(f"{self.path}/{folder}/{shard}.parquet") as file:
            return pq.read_table(file)

    def counts(self) -> tuple[int, int]:
        """Rows indexed and rows failed, from the parts' footers."""
        return self._count_indexed(), count_rows(self.fs, list_files(self.fs, f"{self.path}/failures"))

    def require_complete(self) -> None:
        """Raise StoreError unless every row of the manifest is indexed or failed."""
        if self._count_indexed() == self.spec.rows:
            return  # so that none failed
        indexed, failed = self.counts()
        if indexed + failed != self.spec.rows:
            raise StoreError(
                f"{self.uri} is incomplete: {indexed} indexed + {failed} failed of {self.spec.rows} rows; "
                "run pipelines/extract.py again with the same arguments to finish it"
            )

    def read(self, shard: str, offset: int, nbytes: int) -> dict[str, Any]:
        """One sample: `{modality: (T, *shape) array}` and its `json` dict; `offset`, `nbytes` as in the index."""
        return unpack(self.payload(shard, offset, nbytes))

    def read_many(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """Several samples, in this order."""
        return [self.read(*place) for place in places]

    def samples(self, split: str | None = None, fold: int | None = None) -> Iterator[dict[str, Any]]:
        """Every committed sample, or those of a split, in the index's order, read one by one as they are asked for.

        A sample is {"clip_id", "features": {modality: (T, *shape) array}, "labels": {column: value or None},
        "duration": seconds}: what a model's `predict` and `clcr.batches.collate` take. A modality that a clip lacks is
        not among its features. fold: as `index` takes it. Raises StoreError where another clip lies at a clip's place.
        """
        names = ["clip_id", "shard", "offset", "nbytes", "duration"]
        for row in self.index(split, names, fold).to_pylist():
            stored = self.read(row["shard"], row["offset"], row["nbytes"])
            about = stored["json"]
            if about["clip_id"] != row["clip_id"]:
                raise StoreError(
                    f"clip {row['clip_id']}: its place in {self.uri} holds {about['clip_id']}: the store was extracted "
                    "again while it was read; read it again"
                )
            yield {
                "clip_id": row["clip_id"],
                "features": {name: values for name, values in stored.items() if name != "json"},
                "labels": about["labels"],
                "duration": row["duration"],
            }

    def tar(self, shard: str) -> tuple[pafs.FileSystem, str]:
        """A shard's file: its filesystem, and the path in it."""
        return self.fs, f"{self.path}/shards/{shard}.tar"

    def payload(self, shard: str, offset: int, nbytes: int) -> bytes:
        """One sample's stretch of its tar."""
        if shard not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
            fs, path = self.tar(shard)
            self._shards[shard] = fs.open_input_file(path)
        return self._shards[shard].read_at(nbytes, offset)

    def _count_indexed(self) -> int:
        parts = list_files(self.fs, f"{self.path}/index")
        kept = open_kept(self.fs, parts)
        return count_rows(self.fs, parts) if kept is None else sum(batch.num_rows for batch in kept)

    def _parts(self, folder: str) -> list[pafs.FileInfo]:
        parts = list_files(self.fs, f"{self.path}/{folder}")
        if not parts:
            raise StoreError(f"{self.uri} has no {folder} parts yet: run pipelines/extract.py to the end first")
        return parts
