"""Small feature stores written by the real writer, with values that follow from each clip's number."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import yaml

from features.corpus.manifest import Clip
from features.corpus.tasks import Task
from features.store import Feature, Store, StoreSpec, shard_name
from features.store.samples import Sample, pack
from features.store.shards import ShardWriter, create_store

LABELS = pa.schema([("label", pa.string()), ("mood", pa.float64())])
FEATURES = {
    "video": Feature((4, 4, 3), "uint8", 12.5, {"name": "frames", "size": 4}),
    "audio": Feature((8,), "float16", 50.0, {"name": "log_mel", "mels": 8}),
}
TASKS = (Task("label", "classification", ("a", "b")), Task("mood", "regression"))


def make_clip(clip_id, split="train", label="a", mood=0.5):
    return Clip(clip_id, "clips/x.mp4", None, None, None, None, None, split, None, None, {"label": label, "mood": mood})


def make_clips(train, val=0, test=0):
    """Clips numbered through; every fifth has no label, every seventh no mood."""
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    return [
        make_clip(f"clip/{n}.v1", split, None if n % 5 == 4 else "ab"[n % 2], None if n % 7 == 6 else n / 10)
        for n, split in enumerate(splits)
    ]


def make_sample(number):
    """One to three frames of brightness `number`, sound that counts up; every third sample has no sound."""
    tokens = 1 + number % 3
    features = {"video": np.full((tokens, 4, 4, 3), number % 256, np.uint8)}
    if number % 3:
        features["audio"] = (np.arange(tokens * 16).reshape(-1, 8) + number).astype(np.float16)
    return Sample(features, 0.25 * tokens)


def make_spec(clips, shard_rows=4, **changes):
    splits = {split: sum(c.split == split for c in clips) for split in ("train", "val", "test")}
    return StoreSpec(**{"features": FEATURES, "tasks": TASKS, "splits": splits, "shard_rows": shard_rows,
                        "corpus": "digest", **changes})  # fmt: skip


def shards_of(clips, shard_rows):
    """Shard names and their numbered clips."""
    for split in ("train", "val", "test"):
        rows = [(number, clip) for number, clip in enumerate(clips) if clip.split == split]
        for first in range(0, len(rows), shard_rows):
            yield shard_name(split, first // shard_rows), rows[first : first + shard_rows]


def write_shard(store_uri, name, rows, spec):
    with ShardWriter(str(store_uri), name, spec, LABELS) as writer:
        for number, clip in rows:
            writer.add(clip, pack(clip, make_sample(number)))
        writer.commit()


def write_store(uri, clips, shard_rows=4, **changes):
    spec = make_spec(clips, shard_rows, **changes)
    create_store(str(uri), spec)
    for name, rows in shards_of(clips, shard_rows):
        write_shard(uri, name, rows, spec)
    return Store(str(uri))


def write_mixture(folder, weights=(2, 1)):
    """A mixture of 29 + 3 + 5 clips and of 8 + 2 + 2, of whose tasks only `mood` is known."""
    write_store(folder / "whole", make_clips(29, 3, 5))
    few = [replace(clip, clip_id=f"few{clip.clip_id}") for clip in make_clips(8, 2, 2)]
    write_store(folder / "few", few, tasks=TASKS[1:], corpus="few")
    return write_yaml(folder / "mix.yaml", dict(zip(("whole", "few"), weights or (None, None), strict=True)))


def write_yaml(path, weights):
    """A mixture of the stores of these names beside it."""
    listed = [{"store": name} | ({} if weight is None else {"weight": weight}) for name, weight in weights.items()]
    path.write_text(yaml.safe_dump({"stores": listed}))
    return str(path)


def files_of(folder):
    """Every file below a folder by its relative path, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
