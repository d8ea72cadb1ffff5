"""What a store holds, in one file: `store.json`. Two stores with equal specs hold the same bytes."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from features.corpus.tasks import Task
from features.errors import StoreError

SCHEMA_VERSION = 2
SHARD_ROWS, MOST_SHARDS = 64, 20_000  # where nobody chooses; opening a store costs some .25 ms for each shard


@dataclass(frozen=True)
class Feature:
    """One modality as stored: `shape` and `dtype` of one token, `rate` in tokens per second, how it was encoded."""

    shape: tuple[int, ...]
    dtype: str
    rate: float
    encoder: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds. Two stores with equal specs hold the same bytes.

    Of networks' vectors a GPU's differ from a CPU's in the last bits.

    splits: rows of the manifest per split; corpus: sha256 of the manifest's normalised content. decoding: the version
    of the decoders (`specs.DECODING`) that read its media; a store of another version is read, but not extended.
    extends: the corpora that this one grew from, in order, each with its digest (`corpus`) and its rows per split
    (`splits`); what each added began shards of its own.
    """

    features: Mapping[str, Feature]
    tasks: tuple[Task, ...]
    splits: Mapping[str, int]
    shard_rows: int
    corpus: str
    schema_version: int = SCHEMA_VERSION
    decoding: int = 1
    extends: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the content of store.json."""
        plain = json.loads(json.dumps(asdict(self)))
        for task in plain["tasks"]:
            if not task["rate"]:  # only events have one: the fingerprints of stores without any stay as they were
                del task["rate"]
        if plain["decoding"] == 1:  # the version of stores that do not name theirs
            del plain["decoding"]
        if not plain["extends"]:
            del plain["extends"]
        return {**plain, "fingerprint": _digest(plain)}

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> "StoreSpec":
        """Inverse of `to_dict`. Raises StoreError for a schema version that this code does not know."""
        if spec.get("schema_version") != SCHEMA_VERSION:
            raise StoreError(
                f"store schema version {spec.get('schema_version')} is not {SCHEMA_VERSION}: extract the store again"
            )
        features = {
            name: Feature(tuple(f["shape"]), f["dtype"], f["rate"], f["encoder"])
            for name, f in spec["features"].items()
        }
        tasks = tuple(Task(t["name"], t["kind"], tuple(t["classes"]), t.get("rate", 0.0)) for t in spec["tasks"])
        rows = spec["splits"], spec["shard_rows"], spec["corpus"]
        return cls(features, tasks, *rows, decoding=spec.get("decoding", 1), extends=tuple(spec.get("extends", ())))

    @property
    def fingerprint(self) -> str:
        """Sha256 of the spec: names the store's content."""
        return self.to_dict()["fingerprint"]

    @property
    def rows(self) -> int:
        """Rows of the manifest, over all splits."""
        return sum(self.splits.values())

    def shards(self) -> Iterator[str]:
        """Names of all planned shards, in order."""
        for split in self.splits:
            for number in range(len(self._sizes(split))):
                yield shard_name(split, number)

    def rows_of(self, shard: str) -> int:
        """Rows of the manifest that a shard holds."""
        split, number = shard.rsplit("-", 1)
        return self._sizes(split)[int(number)]

    def _sizes(self, split: str) -> tuple[int, ...]:
        """Rows of each shard of a split."""
        earlier = tuple(corpus["splits"][split] for corpus in self.extends)
        return _shard_sizes(self.shard_rows, earlier, self.splits[split])

    def difference(self, other: "StoreSpec") -> list[str]:
        """Each entry that differs, as `key: this one's != the other's`."""
        own, others = flatten(self.to_dict()), flatten(other.to_dict())
        keys = sorted((own.keys() | others.keys()) - {"fingerprint"})
        return [f"{k}: {own.get(k)} != {others.get(k)}" for k in keys if own.get(k) != others.get(k)]


def default_shard_rows(clips: int) -> int:
    """Clips per shard where nobody chooses: few, so that little is lost with one; more for corpora of millions."""
    return max(SHARD_ROWS, math.ceil(clips / MOST_SHARDS))


def shard_name(split: str, number: int) -> str:
    """Name of a shard, shared by its tar, index part and failures part."""
    return f"{split}-{number:06d}"


@functools.lru_cache(maxsize=64)
def _shard_sizes(shard_rows: int, earlier: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Whole shards and one with the rest, for each corpus that the last one grew from and for what it added."""
    sizes, before = [], 0
    for until in (*earlier, rows):
        added, before = until - before, until
        sizes += [shard_rows] * (added // shard_rows) + [added % shard_rows] * (added % shard_rows > 0)
    return tuple(sizes)


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
