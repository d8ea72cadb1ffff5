"""Rows of a store's index as a batch without labels: what a model reads of clips that it answers."""

from collections.abc import Sequence

from clcr import Batch
from clcr.answers import unlabelled
from clcr.base import MultimodalModel
from clcr.batches import collate
from features.store import Store
from pipelines.answering.table import Row
from pipelines.training.dataset import sample


def batch_of(model: MultimodalModel, store: Store, rows: Sequence[Row]) -> Batch:
    """What the model reads of some clips. Of events the targets are unknown, but they say how many bins there are."""
    stored = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
    samples = [
        sample(row["clip_id"], found, model.features, {}) | {"duration": row["duration"]}
        for row, found in zip(rows, stored, strict=True)
    ]
    return collate([unlabelled(each, model.tasks) for each in samples], model.features, model.tasks)
