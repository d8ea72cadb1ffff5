"""Every model, tuned alike, on published features, texts and memes: the tables of clcr/README.md.

    python -m tests.benchmarks.field ravdess --data ../shared/data --out DIR --trials 12 --seeds 5

The data are not part of the repository; each function below names the files that it reads. Writes the manifest, then
runs pipelines/extract.py and tuning/compare.py as a user would; run again, it resumes with what is missing. ravdess:
1,200 clips, a vector of the face and one of the voice, 8 emotions, tested actor by actor (5 folds of 4), and beside the
models a logistic regression on the same vectors and folds. pom: 903 films, sequences of 20, 17 traits. mosi: 2,199
segments, their text and a vector of the sound, official folds. memes: 950 images with text, 8 techniques.
"""

import csv
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from features.corpus.manifest import SPLITS
from features.store import Store
from tests.benchmarks.accuracy import job
from tuning.report import half_width

Row = dict[str, Any]


@dataclass(frozen=True)
class FieldConfig:
    """What is compared, on what."""

    name: Annotated[Literal["ravdess", "pom", "mosi", "memes"], tyro.conf.Positional]
    """which data"""
    data: Path
    """folder of the data, one folder in it for each"""
    out: Path
    """folder for manifest, store, runs and mlflow.db"""
    models: str = "all"
    """models, separated by commas; the others are tested against the first"""
    trials: int = 12
    """trials of each model's sweep"""
    seeds: int = 5
    """trainings of each best recipe (with folds: of each fold)"""
    epochs: int = 30
    """epochs of each training"""
    train: str = "--model.width 64"
    """further options of tuning/compare.py, in one string"""


def ravdess(folder: Path) -> Iterable[Row]:
    """Facial action units and MFCC statistics of a performance; four actors to a fold.

    ravdess/ravdess.npz: clip_id, actor and emotion (N,), action_units (N, 35), mfcc (N, 259).
    """
    path = folder / "ravdess/ravdess.npz"
    archive = np.load(path)
    for n, (clip_id, actor, emotion) in enumerate(
        zip(archive["clip_id"], archive["actor"], archive["emotion"], strict=True)
    ):
        fold = (int(actor) - 1) % 5
        yield {
            "clip_id": clip_id,
            "face_features": f"{path}#action_units[{n}]",
            "voice_features": f"{path}#mfcc[{n}]",
            "split": ("test", "val", "train", "train", "train")[fold],
            "fold": fold,
            "group": f"actor {actor}",
            "emotion": f"emotion {emotion}",
        }


def pom(folder: Path) -> Iterable[Row]:
    """Twenty steps of sound and picture of a review; its speaker's traits on scales of 1 to 7.

    pom/pom.npz: for each split audio_SPLIT (N, 20, 43), video_SPLIT (N, 20, 41), y_SPLIT (N, 17).
    """
    path = folder / "pom/pom.npz"
    archive = np.load(path)
    for split in SPLITS:
        for n, traits in enumerate(archive[f"y_{split}"].tolist()):
            features = {f"{name}_features": f"{path}#{name}_{split}[{n}]" for name in ("audio", "video")}
            yield {"clip_id": f"{split} {n}", **features, "split": split} | {
                f"trait{i:02}": trait for i, trait in enumerate(traits)
            }


def mosi(folder: Path) -> Iterable[Row]:
    """What was said in a segment, one vector of how it sounded, and its sentiment from -3 to 3.

    mosi/segments.csv: clip_id, split, text, sentiment; mosi/audio.npz: clip_id (N,), audio (N, 73).
    """
    path = folder / "mosi/audio.npz"
    places = {clip_id: n for n, clip_id in enumerate(np.load(path)["clip_id"])}
    for row in _table(folder / "mosi/segments.csv"):
        yield {**row, "audio_features": f"{path}#audio[{places[row['clip_id']]}]"}


def memes(folder: Path) -> Iterable[Row]:
    """An image, its text, and which of the frequent techniques of persuasion it uses.

    semeval_memes/corpus.csv: clip_id, split, text, image (a path below it), techniques, and 0 or 1 for each technique.
    """
    for row in _table(folder / "semeval_memes/corpus.csv"):
        del row["techniques"]
        yield {**row, "image": str(folder / "semeval_memes" / row["image"])}


def _table(path: Path) -> Iterable[Row]:
    with open(path, newline="") as file:
        yield from csv.DictReader(file)


SETS: dict[str, tuple[Callable[[Path], Iterable[Row]], str]] = {  # rows, and the kind of all their labels
    "ravdess": (ravdess, "classification"),
    "pom": (pom, "regression"),
    "mosi": (mosi, "sentiment"),
    "memes": (memes, "classification"),
}
NO_LABEL = {"clip_id", "image", "text", "split", "fold", "group"}


def main(config: FieldConfig) -> int:
    """Manifest, store, comparison; the exit code."""
    read, kind = SETS[config.name]
    out, rows = config.out.resolve(), list(read(config.data.resolve()))
    tasks = [name for name in rows[0] if name not in NO_LABEL and not name.endswith("_features")]
    corpus, store = str(out / "corpus.csv"), str(out / "store")
    out.mkdir(parents=True, exist_ok=True)
    with open(corpus, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    kinds = ",".join(f"{task}:{kind}" for task in tasks)
    options = ["--tasks", ",".join(tasks), "--models", config.models, "--trials", str(config.trials)]
    options += ["--seeds", str(config.seeds), "--epochs", str(config.epochs), *config.train.split()]
    options += ["--folds"] * ("fold" in rows[0])
    code = job("pipelines/extract.py", "--corpus", corpus, "--store", store, "--tasks", kinds) or job(
        "tuning/compare.py", "--store", store, "--out", str(out / "comparison"), *options
    )
    if not code and config.name == "ravdess":
        probe(Store(store), "emotion")
    return code


def probe(store: Store, task: str) -> None:
    """Print what a logistic regression makes of every modality's one vector, and of all side by side, over the folds.

    As in the comparison: each fold is tested once, the next one chooses the penalty, the others train.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = store.index(columns=["clip_id", "shard", "offset", "nbytes", f"label_{task}"]).to_pylist()
    samples = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
    clips = {row["clip_id"]: (sample, row[f"label_{task}"]) for row, sample in zip(rows, samples, strict=True)}
    splits = {
        (fold, split): [clips[clip_id] for clip_id in store.index(split, ["clip_id"], fold)["clip_id"].to_pylist()]
        for fold, split in product(store.folds(), SPLITS)
    }
    for name in [*store.spec.features, "all"]:
        names, scores = list(store.spec.features) if name == "all" else [name], []
        for fold in store.folds():
            sets = {}
            for split in SPLITS:
                samples, labels = zip(*splits[fold, split], strict=True)
                sets[split] = np.nan_to_num([np.concatenate([s[n][0] for n in names]) for s in samples]), labels
            found = [
                make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(*sets["train"])
                for c in (1e-3, 1e-2, 1e-1, 1.0)
            ]
            scores.append(max(found, key=lambda model: model.score(*sets["val"])).score(*sets["test"]))
        print(f"logistic regression, {name}: {np.mean(scores):.3f} ± {half_width(np.array(scores)):.3f}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(FieldConfig, description=__doc__)))
