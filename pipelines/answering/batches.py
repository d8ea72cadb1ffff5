"""Rows of a store's index as a batch without labels: what a model reads of clips that it answers."""

from collections.abc import Iterator, Sequence
from typing import Any

from clcr import Batch
from clcr.base import MultimodalModel
from clcr.batches import collate
from features.corpus.events import bin_events
from features.store import Store
from pipelines.answering.table import Row
from pipelines.training.loading import sample


def batch_of(model: MultimodalModel, store: Store, rows: Sequence[Row]) -> Batch:
    """What the model reads of some clips. Of events the targets are unknown, but they say how many bins there are."""
    rates = {name: task.rate for name, task in model.tasks.items() if task.rate}

    def samples() -> Iterator[dict[str, Any]]:
        stored = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
        for row, found in zip(rows, stored, strict=True):
            unknown = {name: bin_events(None, row["duration"], rate, {}) for name, rate in rates.items()}
            yield sample(row["clip_id"], found, model.features, unknown)

    return collate(list(samples()), model.features, model.tasks)
