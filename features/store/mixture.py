"""Several stores read as one: a YAML file of stores and weights, wherever a job takes `--store`.

    stores:
      - store: ../utd                 path or URI; a relative one is relative to the YAML's folder
        weight: 2                     its share of an epoch's training clips, relative to the others
      - store: s3://bucket/ravdess
        weight: 1

Weights are given for all stores or for none; without them an epoch has every clip once. Features of one name must be
the same in all stores, and tasks of one name of one kind; what a store does not have, its clips lack. Shard S of the
Nth store, from 0, is called N:S here.
"""

import hashlib
import json
import math
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import yaml

from features.corpus.events import BACKGROUND
from features.corpus.tasks import Task
from features.errors import StoreError
from features.files import open_fs, parent, path_of, resolve
from features.store.reader import Place, Store, is_mixture
from features.store.spec import Feature, StoreSpec, flatten

KEYS = ("store", "weight")


def open_store(uri: str, opened: Callable[[str], Store] = Store) -> Store:
    """The store at `uri`, or the mixture that a YAML file there describes; opened: what opens one store."""
    return Mixture(uri, opened) if is_mixture(uri) else opened(uri)


class Mixture(Store):
    """Several stores with the interface of one; its index has a column `store` more, each clip's store by name.

    stores: by name, in the file's order; weights: as given, () where none are. Raises StoreError, naming the store and
    the feature or task, where they do not go together.
    """

    def __init__(self, uri: str, opened: Callable[[str], Store] = Store) -> None:
        entries = _read(uri)
        self.uri, (self.fs, self.path) = uri, open_fs(uri)
        self.weights = tuple(weight for _, weight in entries if weight is not None)
        uris = [each for each, _ in entries]
        last = [path_of(each).rstrip("/").rpartition("/")[2] for each in uris]
        names = [name if last.count(name) == 1 else _public(each) for name, each in zip(last, uris, strict=True)]
        self.stores = {name: opened(each) for name, each in zip(names, uris, strict=True)}
        self.shared = any(store.shared for store in self.members)
        self.spec = _merged(uri, self.stores, self.weights)

    @property
    def members(self) -> tuple[Store, ...]:
        """Its stores, in the file's order."""
        return tuple(self.stores.values())

    @property
    def remote(self) -> bool:
        """Whether any of its stores is elsewhere than on this machine's own disks."""
        return any(store.remote for store in self.members)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # each store leaves its open files behind

    def index_tables(
        self, split: str | None = None, columns: list[str] | None = None, fold: int | None = None
    ) -> Iterator[pa.Table]:
        """As `Store.index_tables`, store by store; of cross-validation each has its own folds."""
        schema, known = self._schema
        names = schema.names if columns is None else columns
        wanted = pa.schema([schema.field(name) for name in names])
        yield wanted.empty_table()
        for number, store in enumerate(self.members):
            own = [name for name in names if name in known[number]] or ["clip_id"]
            for table in store.index_tables(split, own, fold):
                yield self._as_here(table, number, wanted)

    def failures(self) -> pa.Table:
        """As `Store.failures`, of all stores."""
        return pa.concat_tables([store.failures() for store in self.members])

    def tar(self, shard: str) -> tuple[pafs.FileSystem, str]:
        """As `Store.tar`."""
        store, name = self._locate(shard)
        return store.tar(name)

    def part(self, folder: str, shard: str) -> pa.Table:
        """As `Store.part`."""
        store, name = self._locate(shard)
        table = store.part(folder, name)
        if folder != "index":
            return table
        return self._as_here(table, self.members.index(store), self._schema[0])

    def committed(self) -> set[str]:
        """As `Store.committed`."""
        return {_shard(number, name) for number, store in enumerate(self.members) for name in store.committed()}

    def counts(self) -> tuple[int, int]:
        """As `Store.counts`, over all stores."""
        indexed, failed = zip(*(store.counts() for store in self.members), strict=True)
        return sum(indexed), sum(failed)

    def require_complete(self) -> None:
        """As `Store.require_complete`, of each store."""
        for store in self.members:
            store.require_complete()

    def read_many(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        """As `Store.read_many`; what one store holds is asked of it at once."""
        where = sorted(range(len(places)), key=lambda i: places[i][0].partition(":")[0])
        found: dict[int, dict[str, Any]] = {}
        for _, of_store in groupby(where, key=lambda i: places[i][0].partition(":")[0]):
            rows = [*of_store]
            located = [(*self._locate(places[i][0]), *places[i][1:]) for i in rows]
            samples = located[0][0].read_many([(name, offset, size) for _, name, offset, size in located])
            found |= dict(zip(rows, samples, strict=True))
        return [found[i] for i in range(len(places))]

    def payload(self, shard: str, offset: int, nbytes: int) -> bytes:
        """As `Store.payload`."""
        store, name = self._locate(shard)
        return store.payload(name, offset, nbytes)

    def contents(self) -> str:
        """Its stores by name, fingerprint and weight, in one line."""
        weights = [f" weight {weight:g}" for weight in self.weights] or [""] * len(self.stores)
        return ", ".join(
            f"{name} {store.spec.fingerprint[:12]}{weight}"
            for (name, store), weight in zip(self.stores.items(), weights, strict=True)
        )

    def _locate(self, shard: str) -> tuple[Store, str]:
        number, _, name = shard.partition(":")
        return self.members[int(number)], name

    @cached_property
    def _schema(self) -> tuple[pa.Schema, list[set[str]]]:
        """The index's columns, and which of them each store has; labels of tasks that it does not declare are none."""
        schemas, tasks = [], {task.name for task in self.spec.tasks}
        for store in self.members:
            lacks = {f"label_{name}" for name in tasks - {task.name for task in store.spec.tasks}}
            fields = next(store.index_tables()).schema
            schemas.append(pa.schema([field for field in fields if field.name not in lacks]))
        named = pa.schema([("store", pa.string())])
        return _unified(self.uri, [*schemas, named]), [{*schema.names} for schema in schemas]

    def _as_here(self, table: pa.Table, number: int, schema: pa.Schema) -> pa.Table:
        """A store's rows of the index with the columns of all: its name, its shards' names here, and what it lacks."""
        columns = []
        for field in schema:
            if field.name == "store":
                columns.append(pa.repeat([*self.stores][number], len(table)))
            elif field.name == "shard":
                columns.append(pc.binary_join_element_wise(str(number), table["shard"], ":"))
            elif field.name in table.column_names:
                columns.append(table[field.name].cast(field.type))
            elif field.name.startswith("tokens_"):
                columns.append(pa.repeat(pa.scalar(0, field.type), len(table)))
            else:
                columns.append(pa.nulls(len(table), field.type))
        return pa.table(columns, schema=schema)


def number_of(shard: str) -> int:
    """Which store of a mixture a shard is in."""
    return int(shard.partition(":")[0])


def _shard(number: int, name: str) -> str:
    return f"{number}:{name}"


def _unified(uri: str, schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all; one that is text in some stores and numbers in others is text."""
    kinds: dict[str, set[pa.DataType]] = {}
    for field in (field for schema in schemas for field in schema):
        kinds.setdefault(field.name, set()).add(field.type)
    texts = {name for name, types in kinds.items() if len(types) > 1 and pa.string() in types}
    plain = [pa.schema([f.with_type(pa.string()) if f.name in texts else f for f in schema]) for schema in schemas]
    try:
        if nested := [name for name in texts if any(map(pa.types.is_nested, kinds[name]))]:
            raise pa.ArrowTypeError(f"column {nested[0]}: text and lists")
        return pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(f"{uri}: the stores' indices differ: {' '.join(str(error).split())}") from None


def _read(uri: str) -> list[tuple[str, float | None]]:
    """The stores' absolute paths or URIs, and their weights. Raises StoreError for what is no such file."""
    fs, path = open_fs(uri)
    try:
        with fs.open_input_file(path) as file:
            tree = yaml.safe_load(file.read().decode())
    except (FileNotFoundError, IsADirectoryError):
        raise StoreError(f"{uri}: there is no such file; a mixture is a YAML file with a list `stores`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StoreError(f"{uri}: not YAML: {' '.join(str(error).split())}") from None
    listed = tree.get("stores") if isinstance(tree, Mapping) and tree.keys() == {"stores"} else None
    if not isinstance(listed, list) or not listed:
        raise StoreError(f"{uri}: expected one list, `stores`, of entries such as {{store: ../a, weight: 2}}")
    entries = [_entry(uri, number, entry) for number, entry in enumerate(listed, 1)]
    stores, weights = zip(*entries, strict=True)
    if twice := [store for store in stores if stores.count(store) > 1]:
        raise StoreError(f"{uri}: store {twice[0]} is named twice; raise its weight instead")
    if None in weights and any(weight is not None for weight in weights):
        raise StoreError(f"{uri}: store {stores[weights.index(None)]} has no weight: give all stores one, or none")
    return entries


def _entry(uri: str, number: int, entry: Any) -> tuple[str, float | None]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("store"), str):
        raise StoreError(f"{uri}: entry {number} of stores names no store: write {{store: ../a, weight: 2}}")
    if unknown := [key for key in entry if key not in KEYS]:
        raise StoreError(f"{uri}: entry {number} of stores has a key {unknown[0]}; known are {', '.join(KEYS)}")
    weight = entry.get("weight")
    numeric = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (numeric and 0 < weight < math.inf):
        raise StoreError(f"{uri}: weight {weight!r} of store {entry['store']}: must be a number above 0")
    store = _plain(resolve(entry["store"], parent(uri)))
    if is_mixture(store):
        raise StoreError(f"{uri}: {entry['store']} is a mixture itself: list its stores here")
    return store, weight


def _public(uri: str) -> str:
    """A URI without what only its owner should see: credentials, and the options of its storage."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl() if "://" in uri else uri


def _plain(uri: str) -> str:
    """A path or URI without `..`, which object stores would take for a name."""
    if "://" not in uri:
        return posixpath.normpath(uri)
    parts = urlsplit(uri)
    return parts._replace(path=posixpath.normpath(parts.path) if parts.path else "").geturl()


def _merged(uri: str, stores: Mapping[str, Store], weights: Sequence[float]) -> StoreSpec:
    """The spec of all stores together; its corpus is the digest of what they hold, and of their weights."""
    features: dict[str, Feature] = {}
    tasks: dict[str, Task] = {}
    first: dict[str, str] = {}  # which store each feature and task was seen in first
    for name, store in stores.items():
        for modality, feature in store.spec.features.items():
            here, there = flatten(asdict(features.setdefault(modality, feature))), flatten(asdict(feature))
            if differ := [key for key in sorted(here | there) if here.get(key) != there.get(key)]:
                what = "; ".join(f"{key} is {there.get(key)}, not {here.get(key)}" for key in differ[:3])
                raise StoreError(
                    f"{uri}: store {name}, feature {modality}: {what} as in {first[modality]}; extract one of them "
                    "again with --like and the other"
                )
            first.setdefault(modality, name)
        for task in store.spec.tasks:
            known = tasks.setdefault(task.name, task)
            if (known.kind, known.rate) != (task.kind, task.rate):
                kinds = (f"{t.kind}@{t.rate:g}" if t.rate else t.kind for t in (task, known))
                other = first[f"task {task.name}"]
                raise StoreError(f"{uri}: store {name}, task {task.name}: {' and not '.join(kinds)} as in {other}")
            first.setdefault(f"task {task.name}", name)
            tasks[task.name] = Task(task.name, task.kind, _classes(known, task), task.rate)
    specs = [store.spec for store in stores.values()]
    splits = {split: sum(s.splits.get(split, 0) for s in specs) for spec in specs for split in spec.splits}
    content = [[spec.fingerprint for spec in specs], list(weights)]
    return StoreSpec(
        features,
        tuple(tasks.values()),
        splits,
        max(spec.shard_rows for spec in specs),
        hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        decoding=max(spec.decoding for spec in specs),
    )


def _classes(one: Task, other: Task) -> tuple[str, ...]:
    """The classes of both, in the order in which a store of them all would have them; equal ones keep theirs."""
    if {*one.classes} == {*other.classes}:
        return one.classes
    first = (BACKGROUND,) if one.kind == "events" else ()
    if all(name.lstrip("-").isdecimal() for name in (*one.classes, *other.classes)):  # whole numbers
        return tuple(sorted({*one.classes, *other.classes}, key=int))
    return (*first, *sorted({*one.classes, *other.classes} - {*first}))
