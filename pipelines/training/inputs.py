"""What a run reads: checked before anything is started or written, and told in a few lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clcr.base import MultimodalModel
from features.corpus.events import BACKGROUND
from features.corpus.manifest import SPLITS
from features.store import Mixture, Store, open_store
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe, build_model
from pipelines.training.loading import check_names
from pipelines.training.order import shares

SORTED = 0.5  # of the classes that a shard of shuffled clips would hold: with fewer its manifest counts as sorted


@dataclass(frozen=True)
class Inputs:
    """What a run reads, and what of it is missing."""

    store: str
    model: MultimodalModel
    """not yet trained"""
    clips: Mapping[str, int]
    """by split"""
    missing: Mapping[str, int]
    """clips without a modality or a task's label, by its column of the index"""
    stores: Sequence[str]
    """of a mixture, a line about each"""

    def lines(self) -> list[str]:
        """Which clips, modalities and tasks these are, and in how many clips each of them is missing."""
        counts = ", ".join(f"{count} {split}" for split, count in self.clips.items())
        named = {f"tokens_{name}": f"modality {name}" for name in self.model.features}
        for name, task in self.model.tasks.items():
            kind = f"{task.kind}, {len(task.classes)} classes" if task.has_classes else task.kind
            named[f"label_{name}"] = f"task {name} ({kind})"
        lines = [f"reading {self.store}: {counts} clips", *self.stores]
        for column, what in named.items():
            missing = self.missing[column]
            where = f"missing in {missing} of {sum(self.clips.values())}" if missing else "in all"
            lines.append(f"  {what}: {where} clips")
        return lines


def check(store_uri: str, recipe: Recipe) -> Inputs:
    """Everything about the input that can be wrong, before anything is started or written.

    Raises JobError for what cannot be learned; prints what can be learned in part only.
    """
    store = open_store(store_uri)
    store.require_complete()
    model = build_model(store, recipe)
    check_names(recipe.loader, store, model.tasks)
    stores = mixture_lines(store, recipe)
    columns = [*(f"label_{task}" for task in model.tasks), *(f"tokens_{name}" for name in model.features)]
    clips, missing = dict.fromkeys(SPLITS, 0), dict.fromkeys(columns, 0)
    for split in SPLITS:
        by_window = split == "train" and recipe.loader.window > 0
        index = store.index(split, [*columns, *["shard"] * by_window], recipe.loader.fold)
        check_split(store_uri, split, model, index)
        if by_window:
            check_shards(model, index)
        clips[split] = len(index)
        for column in columns:
            values = index[column]
            absent = values.is_null() if column.startswith("label_") else pc.invert(pc.greater(values, 0))
            missing[column] += pc.sum(pc.fill_null(absent, True)).as_py() or 0
    return Inputs(store_uri, model, clips, missing, stores)


def check_split(store_uri: str, split: str, model: MultimodalModel, index: pa.Table) -> None:
    """Whether a split's clips can be learned from, or judged by: as `check`."""
    if not len(index):
        raise JobError(f"{store_uri}: no usable clip in split {split}; see its failures")
    missing = [task for task in model.tasks if index[f"label_{task}"].null_count == len(index)]
    if len(missing) == len(model.tasks):
        raise JobError(f"{store_uri}: no clip in split {split} has a label of {', '.join(missing)}")
    if missing and split == "train":
        raise JobError(
            f"task {missing[0]}: no training clip has a label of it, so nothing would be learned; leave it out with "
            "--tasks"
        )
    for task in missing:
        where = "counts for nothing in val/score" if split == "val" else "is not tested"
        print(f"task {task}: no clip in split {split} has a label of it, so it {where}", flush=True)
    if split == "train":
        check_training_clips(model, index)


def check_shards(model: MultimodalModel, index: pa.Table) -> None:
    """Say of which tasks a shard holds few classes, as it does where the manifest is sorted by them."""
    for name in (name for name, task in model.tasks.items() if task.kind == "classification"):
        labels = index.select(["shard", f"label_{name}"]).drop_null()
        pairs = labels.group_by(["shard", f"label_{name}"]).aggregate([])
        clips = labels.group_by("shard").aggregate([([], "count_all")])["count_all"].to_numpy()
        shares = labels[f"label_{name}"].value_counts().field("counts").to_numpy() / len(labels)
        shuffled = np.mean([(1 - (1 - shares) ** count).sum() for count in clips])
        if (own := len(pairs) / len(clips)) < SORTED * shuffled:
            print(f"task {name}: a shard holds {own:.1f} of its {len(shares)} classes, and one of shuffled clips would "
                  f"hold {shuffled:.1f}, so batches by --loader.window have few of them: shuffle the manifest's rows "
                  "before it is extracted, or take more shards", flush=True)  # fmt: skip


def mixture_lines(store: Store, recipe: Recipe) -> list[str]:
    """What each store of a mixture gives to an epoch, in a line each; nothing for a store alone.

    Raises JobError for a weighted store without a training clip.
    """
    if not isinstance(store, Mixture):
        return []
    index = store.index("train", ["store"], recipe.loader.fold)
    clips = {name: pc.sum(pc.equal(index["store"], name)).as_py() or 0 for name in store.stores}
    if empty := [name for name, count in clips.items() if store.weights and not count]:
        raise JobError(f"{store.uri}: store {empty[0]} has no training clip to make up its weight: leave it out")
    drawn = shares(len(index), store.weights) if store.weights else [*clips.values()]
    each = zip(clips.items(), drawn, strict=True)
    return [f"  store {name}: {share} clips of an epoch, from {count} training clips" for (name, count), share in each]


def check_training_clips(model: MultimodalModel, index: pa.Table) -> None:
    """Say which modalities and classes no training clip has; raises JobError for a target that does not vary."""
    unseen = [name for name in model.features if not pc.any(pc.greater(index[f"tokens_{name}"], 0)).as_py()]
    if len(unseen) == len(model.features):
        raise JobError(f"modality {', '.join(unseen)}: no training clip has any of it, so nothing would be learned")
    for name in unseen:
        print(f"modality {name}: no training clip has it, so the model learns nothing of it", flush=True)
    for name, task in model.tasks.items():
        labels = index[f"label_{name}"].drop_null()
        if not task.has_classes:
            values = labels.cast(pa.float64()).to_numpy()
            model.units.fit({**dict.fromkeys(model.units.names, ()), name: values})
            continue
        if task.rate:
            found = {event["label"] for events in labels.to_pylist() for event in events}
            found |= {BACKGROUND}
        else:
            found = set(map(str, labels.unique().to_pylist()))
        if absent := [label for label in task.classes if label not in found]:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            print(f"task {name}: no training clip has class {', '.join(absent[:5])}{more}", flush=True)
