"""Logits of a model for some clips of a store under several conditions: here, or a shard at a time on a Ray cluster.

A split of up to `--here` clips is answered in this process, which costs seconds; a larger one by processes of Ray Data,
as pipelines/predict.py does it. Both run `answer_rows`, so the numbers are the same.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clcr.base import MultimodalModel
from features.errors import one_line
from features.store import Store, open_store
from pipelines.answering.batches import batch_of
from pipelines.common.cli import Progress
from pipelines.common.errors import JobError, find_user_error
from pipelines.evaluation.conditions import SPREAD_CLIPS, WHOLE, Condition, measure_spread
from pipelines.training.loading import AHEAD, prefetch

Row = Mapping[str, Any]  # of the store's index
Logits = dict[
    str, dict[str, list[np.ndarray]]
]  # by condition and task, one array per clip: (outputs,) or (bins, outputs)
PLACE = ["clip_id", "shard", "offset", "nbytes", "duration"]


@dataclass(frozen=True)
class Question:
    """What is asked of every clip. spread: of each modality, for noise; seed: of noise.

    robust: shards and offsets of the clips that are asked under every condition; the others are only asked as they
    are. None means all.
    """

    conditions: tuple[Condition, ...]
    spread: Mapping[str, np.ndarray]
    seed: int = 0
    batch_size: int = 64
    robust: frozenset[tuple[str, int]] | None = None


def spread_of(model: MultimodalModel, store: Store, rows: Sequence[Row], seed: int) -> dict[str, np.ndarray]:
    """Standard deviations of the modalities' tokens, measured on a seeded sample of the rows."""
    picked = np.sort(np.random.default_rng(seed).permutation(len(rows))[:SPREAD_CLIPS])
    return measure_spread(batch_of(model, store, [rows[i]]) for i in picked)


@torch.no_grad()
def answer_rows(model: MultimodalModel, store: Store, rows: Sequence[Row], question: Question) -> Logits:
    """Logits of each row under each condition, in the rows' order; of conditions for robust clips, theirs alone."""
    device = next(model.parameters()).device
    answers: Logits = {c.name: {task: [] for task in model.tasks} for c in question.conditions}
    parts = [rows[first : first + question.batch_size] for first in range(0, len(rows), question.batch_size)]
    for part, batch in prefetch(((part, batch_of(model, store, part)) for part in parts), AHEAD):
        asked = np.array([question.robust is None or (row["shard"], row["offset"]) in question.robust for row in part])
        for condition in question.conditions:
            keep = np.ones(len(part), bool) if condition.name == WHOLE else asked
            if not keep.any():
                continue
            changed = condition.apply(batch, question.spread, question.seed)
            logits = model(changed.to(device)).logits
            for task, values in logits.items():
                answers[condition.name][task] += list(values.cpu().numpy()[keep])
    return answers


def answer(
    model: MultimodalModel,
    store: Store,
    rows: Sequence[Row],
    question: Question,
    here: int,
    concurrency: int,
    gpus: float,
) -> Logits:
    """`answer_rows` in this process for up to `here` clips, else on the cluster (concurrency: 0 = all room)."""
    if len(rows) <= here:
        return answer_rows(model, store, rows, question)
    from infra.doctor import ray_access, require
    from pipelines.common.cluster import start_ray

    require(ray_access())
    start_ray()
    return _merged(_answer_on_cluster(model, store, rows, question, concurrency, gpus), rows, question, model)


def by_shard(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each shard."""
    shards: dict[str, list[Row]] = {}
    for row in rows:
        shards.setdefault(row["shard"], []).append(row)
    return shards


class Answerer:
    """One process of the cluster: it holds the model and answers shard after shard."""

    def __init__(self, shared: Any, store_uri: str, device: str) -> None:
        import ray

        torch.set_num_threads(1)
        model, self.question = ray.get(shared)
        self.model, self.store_uri = model.to(device).eval(), store_uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with one shard's rows in, its answers out; errors travel as text, for Ray would wrap them."""
        rows, answers, error = pickle.loads(batch["rows"][0].as_py()), {}, ""
        try:
            answers = answer_rows(self.model, open_store(self.store_uri), rows, self.question)
        except Exception as failure:
            known = isinstance(failure, OSError | torch.OutOfMemoryError) or find_user_error(failure) is not None
            if not known:
                raise
            error = f"shard {rows[0]['shard']} of {self.store_uri}: {one_line(failure)}"
        return pa.table(
            {"clips": [len(rows)], "answers": [pickle.dumps((rows[0]["shard"], answers))], "error": [error]}
        )


def _answer_on_cluster(
    model: MultimodalModel, store: Store, rows: Sequence[Row], question: Question, concurrency: int, gpus: float
) -> Iterator[tuple[str, Logits]]:
    import ray

    from pipelines.common.cluster import processes_for

    shards, progress = by_shard(rows), Progress("evaluate", len(rows))
    workers, gpus = processes_for(len(shards), concurrency, gpus)
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"rows": pickle.dumps([{name: row[name] for name in PLACE} for row in part])} for part in shards.values()]
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Answerer,
        fn_constructor_args=(ray.put((model, question)), store.uri, "cuda" if gpus else "cpu"),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise JobError(row["error"])
        progress.update(row["clips"])
        yield pickle.loads(row["answers"])


def _merged(
    parts: Iterator[tuple[str, Logits]], rows: Sequence[Row], question: Question, model: MultimodalModel
) -> Logits:
    """Shards' answers, which come in any order, as those of all rows."""
    answers = dict(parts)
    shards = by_shard(rows)
    if [row["clip_id"] for part in shards.values() for row in part] != [row["clip_id"] for row in rows]:
        raise JobError("the index's rows are not ordered by shard: the store is damaged; run features.store verify")
    return {
        c.name: {task: [x for shard in shards for x in answers[shard][c.name][task]] for task in model.tasks}
        for c in question.conditions
    }
