"""Which word is being spoken at each video frame: events on GRID, clcr against concat and sound alone, over seeds.

    python -m tests.benchmarks.events --corpus grid/corpus.csv --words grid/words.csv --out DIR --seeds 3 --epochs 40

Makes a manifest with a column of events from words.csv (clip_id, start, end, word), in JSON as any csv manifest has
them; extracts and trains as tests/benchmarks/accuracy.py does; ends with the share of frames right, over the frames of
the test split, compared with always naming the most frequent class. Run it again to resume.

A frame's class is the slot of GRID's six-word sentences that is being spoken (command, color, ...; silence is
background), or with `--label color` the colour itself while it is spoken and background otherwise.
"""

import csv
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro

from features.store import Store
from tests.benchmarks.accuracy import AccuracyConfig, compare

SLOTS = ("command", "color", "preposition", "letter", "digit", "adverb")


@dataclass(frozen=True)
class EventsConfig:
    """What is compared."""

    corpus: Path
    """manifest of the clips"""
    words: Path
    """csv of clip_id, start, end (seconds), word: the words of each clip in their order"""
    out: Path
    """folder for manifest, store, runs and mlflow.db"""
    label: str = "slot"
    """slot, or one of the slots: its word while it is spoken"""
    rate: float = 25.0
    """bins per second; 25 is one per video frame"""
    models: str = "concat,audio"
    """models to train alongside clcr, separated by commas"""
    seeds: int = 3
    """seeds 0, 1, ... of each model"""
    epochs: int = 40
    """epochs of each training"""
    extract: str = "--video.size 32 --video.crop .30,.47,.70,.92"
    """further options of pipelines/extract.py, in one string; the crop holds the mouth"""


def main() -> int:
    """Manifest, then extract and train all, then the table and the majority's accuracy."""
    config = tyro.cli(EventsConfig, description=__doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    manifest = write_manifest(config)
    code = compare(
        AccuracyConfig(
            corpus=str(manifest),
            out=config.out,
            tasks=config.label,
            models=config.models,
            seeds=config.seeds,
            epochs=config.epochs,
            extract=f"--tasks {config.label}:events@{config.rate:g} {config.extract}",
        )
    )
    if code == 0:
        print("always the most frequent class: {:.3f} ({}, {} test bins)".format(*majority(config)))
    return code


def write_manifest(config: EventsConfig) -> Path:
    """The clips' media and splits as they are, and one column of events in place of the labels."""
    spoken = defaultdict(list)
    with open(config.words, newline="") as file:
        for row in csv.DictReader(file):
            spoken[row["clip_id"]].append(row)
    with open(config.corpus, newline="") as file:
        rows = list(csv.DictReader(file))
    path = config.out / "corpus.csv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, ["clip_id", "video", "split", config.label])
        table.writeheader()
        for row in rows:
            video = os.path.join(config.corpus.resolve().parent, row["video"])
            events = json.dumps(to_events(spoken[row["clip_id"]], config.label))
            table.writerow({"clip_id": row["clip_id"], "video": video, "split": row["split"], config.label: events})
    return path


def to_events(words: list[dict[str, str]], label: str) -> list[dict[str, str | float]]:
    """A clip's six words as events: of every slot, or of the one that label names."""
    return [
        {"start": float(word["start"]), "end": float(word["end"]), "label": slot if label == "slot" else word["word"]}
        for slot, word in zip(SLOTS, words, strict=True)
        if label in ("slot", slot)
    ]


def majority(config: EventsConfig) -> tuple[float, str, int]:
    """Test accuracy of the training split's most frequent class, its name, and the number of test bins."""
    store = Store(str(config.out / "store"))
    (task,) = store.spec.tasks
    counts = {}
    for split in ("train", "test"):
        index = store.index(split, ["duration", f"label_{task.name}"]).to_pylist()
        bins = (task.encode_events(row[f"label_{task.name}"], row["duration"]).tolist() for row in index)
        counts[split] = Counter(value for clip in bins for value in clip)
    ((most, _),) = counts["train"].most_common(1)
    return counts["test"][most] / counts["test"].total(), task.classes[most], counts["test"].total()


if __name__ == "__main__":
    sys.exit(main())
