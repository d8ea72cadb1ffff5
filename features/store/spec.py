"""What a store holds, in one file: `store.json`. Two stores with equal specs hold the same bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from features.corpus.tasks import Task
from features.errors import StoreError

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Feature:
    """One modality as stored: `shape` and `dtype` of one token, `rate` in tokens per second, how it was encoded."""

    shape: tuple[int, ...]
    dtype: str
    rate: float
    encoder: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds. Two stores with equal specs hold the same bytes; of
    networks' vectors a GPU's differ from a CPU's in the last bits.

    splits: rows of the manifest per split; corpus: sha256 of the manifest's normalised content.
    """

    features: Mapping[str, Feature]
    tasks: tuple[Task, ...]
    splits: Mapping[str, int]
    shard_rows: int
    corpus: str
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the content of store.json."""
        plain = json.loads(json.dumps(asdict(self)))
        for task in plain["tasks"]:
            if not task["rate"]:  # only events have one: the fingerprints of stores without any stay as they were
                del task["rate"]
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
        return cls(features, tasks, spec["splits"], spec["shard_rows"], spec["corpus"])

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
        for split, rows in self.splits.items():
            for number in range(-(-rows // self.shard_rows)):
                yield shard_name(split, number)

    def rows_of(self, shard: str) -> int:
        """Rows of the manifest that a shard holds."""
        split, number = shard.rsplit("-", 1)
        return min(self.shard_rows, self.splits[split] - int(number) * self.shard_rows)

    def difference(self, other: "StoreSpec") -> list[str]:
        """Each entry that differs, as `key: mine != theirs`."""
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        keys = sorted((mine.keys() | theirs.keys()) - {"fingerprint"})
        return [f"{k}: {mine.get(k)} != {theirs.get(k)}" for k in keys if mine.get(k) != theirs.get(k)]


def shard_name(split: str, number: int) -> str:
    """Name of a shard, shared by its tar, index part and failures part."""
    return f"{split}-{number:06d}"


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
