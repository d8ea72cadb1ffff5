"""A manifest that changed after its store was begun: it grew, or the sources of failed clips were replaced.

Nothing that is extracted may change, so every row of the plan is compared with the manifest. New rows come after the
old ones of their split, and begin shards of their own: the shards that are there stay as they are.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from features.corpus.manifest import MEDIA, VECTORS, Corpus
from features.corpus.tasks import Task
from features.errors import StoreError
from features.files import write_atomic
from features.store.plan import planned_clips, planned_schema, write_plan
from features.store.reader import Store
from features.store.spec import StoreSpec


def changed_spec(store: Store, spec: StoreSpec, corpus: Corpus, extend: bool) -> StoreSpec | None:
    """The spec of a store whose manifest changed, None where something else than the manifest changed too.

    extend: rows may have been added. The sources of failed clips may have changed in any case. Raises StoreError for a
    row that changed otherwise.
    """
    earlier = store.spec
    tasks = spec.tasks if extend else earlier.tasks  # what is new may be of new classes
    same = replace(earlier, corpus=spec.corpus, splits=spec.splits, decoding=spec.decoding, tasks=tasks, extends=())
    if spec.difference(same):
        return None
    if extend:
        _require_same_tasks(store, spec, corpus)
    failed = set(store.failures().column("clip_id").to_pylist()) if store.counts()[1] else set()
    for split in earlier.splits:
        _compare(store, corpus, split, failed, extend)
    if spec.splits == earlier.splits:
        return replace(earlier, corpus=spec.corpus)
    grown = {"corpus": earlier.corpus, "splits": dict(earlier.splits)}
    return replace(spec, decoding=earlier.decoding, extends=(*earlier.extends, grown))


def apply_change(store: Store, spec: StoreSpec, corpus: Corpus) -> Store:
    """Give a store the spec and the plan of its changed manifest; killed in between, the same command does the rest."""
    store.spec = spec
    write_plan(store, corpus)
    write_atomic(store.fs, f"{store.path}/store.json", (json.dumps(spec.to_dict(), indent=2) + "\n").encode())
    return Store(store.uri)


def _require_same_tasks(store: Store, spec: StoreSpec, corpus: Corpus) -> None:
    """Raise StoreError where rows that were added make another task of a label: its classes alone may grow."""
    now, begun = {task.name: task for task in spec.tasks}, planned_schema(store)
    for task in store.spec.tasks:
        if task.name not in now or (task.kind, task.rate) != (now[task.name].kind, now[task.name].rate):
            kind = _asked(now[task.name]) if task.name in now else "no label"
            raise StoreError(
                f"{corpus.uri}: {task.name!r} is {kind} now, and was {_asked(task)} when {store.uri} was begun: give "
                f"--tasks {task.name}:{_asked(task)}, or write the new labels as the old ones are"
            )
        types = [schema.field(task.name).type for schema in (begun, corpus.schema)] if begun is not None else []
        if types and types[0] != types[1]:
            raise StoreError(
                f"{corpus.uri}: column {task.name!r} holds {types[1]} now, and held {types[0]} when {store.uri} was "
                "begun: extract it anew, into another store"
            )


def _asked(task: Task) -> str:
    """A task's kind as --tasks takes it."""
    return f"{task.kind}@{task.rate:g}" if task.rate else task.kind


def _compare(store: Store, corpus: Corpus, split: str, failed: set[str], extend: bool) -> None:
    """Raise StoreError for the first row of a split that changed and must not."""
    rows = planned_clips(store, split)
    for before, now in itertools.zip_longest(rows, _rows(corpus, split)):
        if before is None and extend:
            return  # all that follow are new
        if before is None or now is None:
            what, clip = ("has been added", now) if before is None else ("is gone", before)
            advice = "; --extend extracts clips that were added" if before is None else ""
            raise StoreError(f"{corpus.uri}: clip {clip['clip_id']!r} {what} since {store.uri} was begun{advice}")
        if before["clip_id"] != now["clip_id"]:
            raise StoreError(
                f"{corpus.uri}: clip {now['clip_id']!r} stands where {before['clip_id']!r} stood when {store.uri} was "
                "begun; add new clips after the old ones of their split"
            )
        changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
        free = now["clip_id"] in failed
        if fixed := sorted(name for name in changed if not (free and (name in MEDIA or name.endswith(VECTORS)))):
            raise StoreError(
                f"{corpus.uri}: column {fixed[0]!r} of clip {now['clip_id']!r} has changed since {store.uri} was "
                "begun; only the sources of failed clips may"
            )


def _rows(corpus: Corpus, split: str) -> Iterator[dict[str, Any]]:
    for batch in corpus.batches():
        yield from batch.filter(pc.equal(batch.column("split"), split)).to_pylist()
