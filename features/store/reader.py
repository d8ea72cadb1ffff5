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
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import StoreError
from features.files import list_files, open_fs
from features.store.samples import unpack
from features.store.spec import StoreSpec

if TYPE_CHECKING:
    import pyarrow.dataset as ds

OPEN_SHARDS = 128  # files that one reader keeps open: a large store has more shards than a process may open files


Place = tuple[str, int, int]  # where a sample lies: shard, offset, nbytes


class Store:
    """Read access to a feature store on any filesystem that pyarrow opens.

    Raises StoreError when there is no store at `uri`.
    """

    def __init__(self, uri: str) -> None:
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

    def index(self, split: str | None = None, columns: list[str] | None = None, fold: int | None = None) -> pa.Table:
        """One row per committed sample, ordered by shard and offset.

        fold: cross-validation: this fold is the test split, the next one the val split, all others train, whatever
        the manifest's splits are. Raises StoreError where there is no such fold.
        """
        return self._table("index", columns, None if split is None else self._condition(split, fold))

    def folds(self) -> list[int]:
        """The folds of cross-validation. Raises StoreError where there are fewer than three, or a clip has none."""
        column = self._table("index", ["fold"])["fold"]
        folds = sorted(pc.unique(column.drop_null()).to_pylist())
        if len(folds) < 3 or column.null_count:
            lack = f"{column.null_count} clips have no fold" if column.null_count else f"it has {len(folds)} folds"
            raise StoreError(f"{self.uri} has no cross-validation: {lack}; its corpus needs 3 or more in column fold")
        return folds

    def _condition(self, split: str, fold: int | None) -> pc.Expression:
        if fold is None:
            return pc.field("split") == split
        folds = self.folds()
        if fold not in folds:
            raise StoreError(f"{self.uri} has no fold {fold}; it has {', '.join(map(str, folds))}")
        test, val = fold, folds[(folds.index(fold) + 1) % len(folds)]
        held_out = {"test": pc.field("fold") == test, "val": pc.field("fold") == val}
        return held_out.get(split, ~pc.field("fold").isin([test, val]))

    def failures(self) -> pa.Table:
        """One row per clip that could not be used."""
        return self._table("failures")

    def committed(self) -> set[str]:
        """Names of the shards whose index part exists."""
        return {info.base_name.removesuffix(".parquet") for info in list_files(self.fs, f"{self.path}/index")}

    def part(self, folder: str, shard: str) -> pa.Table:
        """One committed shard's rows of `index` or `failures`. Raises FileNotFoundError for one that is not."""
        with self.fs.open_input_file(f"{self.path}/{folder}/{shard}.parquet") as file:
            return pq.read_table(file)

    def counts(self) -> tuple[int, int]:
        """Rows indexed and rows failed, from the parts' footers."""
        return self._rows("index"), self._rows("failures")

    def require_complete(self) -> None:
        """Raise StoreError unless every row of the manifest is indexed or failed."""
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

    def payload(self, shard: str, offset: int, nbytes: int) -> bytes:
        """One sample's stretch of its tar."""
        if shard not in self._shards:
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
            self._shards[shard] = self.fs.open_input_file(f"{self.path}/shards/{shard}.tar")
        return self._shards[shard].read_at(nbytes, offset)

    def _parts(self, folder: str) -> "ds.Dataset | None":
        import pyarrow.dataset as ds  # here, for it loads pandas, which no decoding process needs

        paths = [info.path for info in list_files(self.fs, f"{self.path}/{folder}")]
        return ds.dataset(paths, filesystem=self.fs, format="parquet") if paths else None

    def _table(self, folder: str, columns: list[str] | None = None, condition: pc.Expression | None = None) -> pa.Table:
        parts = self._parts(folder)
        if parts is None:
            raise StoreError(f"{self.uri} has no {folder} parts yet: run pipelines/extract.py to the end first")
        return parts.to_table(columns=columns, filter=condition)

    def _rows(self, folder: str) -> int:
        parts = self._parts(folder)
        return 0 if parts is None else parts.count_rows()
