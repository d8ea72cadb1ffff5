"""What fusion is worth on real data: recipes over folds and seeds, one process, resumable; results/*.csv is its output.

    python -m tests.benchmarks.fusion --store STORE --out tests/benchmarks/results/utd_inner.csv --folds inner \
        --common "epochs=40 model.width=64 lr=2e-3" --seeds 1,2 "clcr" "clcr model.exchange=none" "concat"

A recipe is a model's name and options by dotted name, `clcr loader.drop=[audio=.2]`; the word `last` in it takes the
last layer alone of modalities that have several, and `pretrained` starts from models of each modality alone, trained
first with the options of --common. `linear`, or `linear MODALITY`, is a logistic regression on the clips'
statistics (linear.py). --folds: `inner` leaves out one group (subject) of the training split at a time and never opens
the others: recipes are chosen there; `parts` does so with four random parts of it, where clips have no group. `outer`
leaves out one fold of the corpus, chooses the epoch on the next and tests it; a corpus without folds is divided into
five at random, by its groups where it has any. `official` takes the corpus's splits.
--summary prints means, tests paired over folds, and the interval of a bootstrap over clips.

Trains by the project's own loop (clcr.training.Trainer) on samples held in memory. A row is a run: `val` is the
validation score of the best epoch, `last` that of the last one, which nothing was chosen by; `test` that of the best
epoch; `alone` the test score (inner: the validation score) where one modality is left, whole clips keep all theirs;
`right`, of a single task, how many clips that score is of, and which were answered rightly, as hexadecimal bits.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

import clcr
from clcr import metrics as M
from clcr.averaging import AveragedTrainer
from clcr.batches import Batch, collate
from clcr.class_loss import class_loss
from clcr.training import Trainer
from features.store import Store
from pipelines.common.cli import flatten, override
from pipelines.training.learner import Recipe, modalities_of
from pipelines.training.loading import altered, feature_specs, task_specs
from pipelines.training.order import bucketed, chances, count_classes
from pipelines.training.start import take_weights
from tests.benchmarks.linear import fit_linear

KEY = ["corpus", "folds", "recipe", "fold", "seed"]
COLUMNS = ["commit", "command", *KEY, "epochs", "val", "last", "test", "alone", "participation", "seconds", "right"]
PARTS, FOLDS, DRAWS = 4, 5, 2000
Sample = dict[str, Any]


class Memory:
    """Samples in memory as the loop's loader: shuffled by (seed, epoch) in training, where --loader's options count."""

    def __init__(
        self, samples: list[Sample], model: clcr.base.MultimodalModel, size: int, recipe: Recipe | None = None
    ) -> None:
        self.samples, self.model, self.size, self.recipe = samples, model, size, recipe
        self.steps = -(-len(samples) // size)
        self.lengths = np.array([sum(map(len, sample["features"].values())) for sample in samples])

    def targets(self, task: str) -> np.ndarray:
        """Class indices of every sample, -1 where there is none."""
        return np.array([-1 if (index := sample["targets"][task]) is None else index for sample in self.samples])

    def counts(self) -> dict[str, list[int]]:
        """Clips of each class, by task."""
        known = {name: task for name, task in self.model.tasks.items() if task.kind == "classification"}
        return {name: count_classes(task, self.targets(name)) for name, task in known.items()}

    def order(self, epoch: int, recipe: Recipe) -> np.ndarray:
        """The rows of a training epoch."""
        rng, rows = np.random.default_rng((recipe.seed, epoch + 1)), len(self.samples)
        balance, buckets = recipe.loader.balance, recipe.loader.buckets
        order = rng.choice(rows, rows, p=chances(self.targets(balance))) if balance else rng.permutation(rows)
        return bucketed(order, self.lengths, self.size, buckets, recipe.seed, epoch) if buckets else order

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch."""
        order = self.order(epoch, self.recipe) if self.recipe else np.arange(len(self.samples))
        for start in range(first * self.size, len(order), self.size):
            rows = order[start : start + self.size]
            batch = collate([self.samples[row] for row in rows], self.model.features, self.model.tasks)
            yield altered(batch, self.recipe.loader, self.recipe.seed, epoch) if self.recipe and epoch >= 0 else batch

    def sample_batches(self, clips: int) -> Iterator[Batch]:
        """So many clips, in a seeded order."""
        part = Memory(self.samples, self.model, self.size, Recipe(seed=self.recipe.seed if self.recipe else 0))
        yield from (batch for batch, _ in zip(part.batches(-1), range(-(-clips // self.size)), strict=False))


def read(store: Store, tasks: dict[str, clcr.TaskSpec]) -> tuple[list[Sample], list[dict]]:
    """All samples of a store, and their rows of the index."""
    rows = store.index().to_pylist()
    stored = store.read_many([(row["shard"], row["offset"], row["nbytes"]) for row in rows])
    declared = {task.name: task for task in store.spec.tasks}
    samples = []
    for row, found in zip(rows, stored, strict=True):
        targets = {name: declared[name].encode(row[f"label_{name}"]) for name in tasks}
        features = {m: found[m] for m in store.spec.features if m in found}
        samples.append({"clip_id": row["clip_id"], "features": features, "targets": targets})
    return samples, rows


def divisions(rows: list[dict], folds: str) -> Iterator[tuple[str, list[str]]]:
    """Name of each division, and the part of every clip in it: train, val, test, or nothing."""
    if folds == "official":
        yield "official", [row["split"] for row in rows]
    elif folds == "inner":
        training = sorted({row["group"] for row in rows if row["split"] in ("train", "val")})
        for left_out in training:
            yield left_out, [_part(row["group"], training, left_out) for row in rows]
    elif folds == "parts":
        opened = [row["split"] in ("train", "val") for row in rows]
        part = np.random.default_rng(0).permutation(len(rows)) % PARTS
        for left_out in range(PARTS):
            yield (
                str(left_out),
                [("val" if p == left_out else "train") if o else "" for o, p in zip(opened, part, strict=True)],
            )
    else:
        of_row = _folds(rows)
        known = sorted(set(of_row))
        for number, fold in enumerate(known):
            after = known[(number + 1) % len(known)]
            yield str(fold), [{fold: "test", after: "val"}.get(own, "train") for own in of_row]


def _folds(rows: list[dict]) -> list[int]:
    """The fold of every clip: the corpus's, or a random one of its group, or of itself."""
    if any(row["fold"] is not None for row in rows):
        return [row["fold"] for row in rows]
    grouped = any(row["group"] is not None for row in rows)
    units = sorted({row["group"] for row in rows}) if grouped else range(len(rows))
    parts = (np.random.default_rng(0).permutation(len(units)) % FOLDS).tolist()
    of_unit = dict(zip(units, parts, strict=True))
    return [of_unit[row["group"] if grouped else number] for number, row in enumerate(rows)]


def _part(group: str, training: list[str], left_out: str) -> str:
    return "val" if group == left_out else "train" if group in training else ""


def _last(modality: str, values: np.ndarray, features: dict[str, clcr.FeatureSpec]) -> np.ndarray:
    one = modality in features and values.ndim == 3 and len(features[modality].shape) == 1
    return values[:, -1] if one else values


def fit(
    recipe: Recipe,
    store: Store,
    samples: list[Sample],
    parts: list[str],
    last_layer: bool = False,
    sources: Sequence[clcr.base.MultimodalModel] = (),
) -> tuple[Trainer, dict[str, Memory], list[float]]:
    """A trained model of a division, with its weights of the best epoch; its parts, and val/score of every epoch.

    last_layer: of modalities that have several layers, the last one alone. sources: models that it takes weights of.
    """
    tasks = task_specs(store, recipe.tasks)
    features = feature_specs(store, modalities_of(recipe.architecture, store))
    if last_layer:
        features = {m: replace(f, shape=f.shape[-1:]) if len(f.shape) == 2 else f for m, f in features.items()}
        samples = [{**s, "features": {m: _last(m, v, features) for m, v in s["features"].items()}} for s in samples]
    torch.manual_seed(recipe.seed)
    model = clcr.build(recipe.architecture, recipe.network, features, tasks)
    by_part = {p: [s for s, part in zip(samples, parts, strict=True) if part == p] for p in ("train", "val", "test")}
    loaders = {
        part: Memory(chosen, model, recipe.optim.batch_size, recipe if part == "train" else None)
        for part, chosen in by_part.items()
    }
    model.fit_statistics(loaders["train"].sample_batches(256))
    for source in sources:
        take_weights(model, source, "pretrained")
    made = partial(AveragedTrainer, decay=recipe.ema) if recipe.ema else Trainer
    weighing = class_loss(recipe.classes, loaders["train"].counts)
    trainer = made(model, tasks, recipe.optim, loaders["train"].steps, seed=recipe.seed, class_loss=weighing)
    scores = [epoch.metrics["val/score"] for epoch in trainer.fit(loaders["train"], loaders["val"])]
    trainer.load_best()
    return trainer, loaders, scores


def report(trainer: Trainer, loaders: dict[str, Memory], scores: list[float]) -> dict[str, Any]:
    """What `fit` gave as a row: its scores and what it showed."""
    found: dict[str, Any] = {"epochs": len(scores), "val": max(scores), "last": scores[-1]}
    last = "test" if loaders["test"].samples else "val"
    tested, diagnostics, found["right"] = score(trainer, loaders[last])
    found["test"] = tested if last == "test" else ""
    features = trainer.model.features
    alone = {m: score(trainer, loaders[last], m)[0] for m in features} if len(features) > 1 else {}
    found["alone"] = " ".join(f"{m}={value:.3f}" for m, value in alone.items())
    taken = [value for name, value in diagnostics.items() if "participation" in name]
    found["participation"] = f"{np.mean(taken):.3f}" if taken else ""
    return found


def score(trainer: Trainer, loader: Memory, left: str | None = None) -> tuple[float, dict[str, float], str]:
    """The loop's score of a part, diagnostics and `right`; left: the only modality that is left of each clip."""
    batches = (batch if left is None else _only(batch, left) for batch in loader.batches(0))
    predictions, diagnostics = trainer.evaluate(batches)
    bits = ""
    if len(predictions) == 1 and next(iter(trainer.tasks.values())).kind == "classification":
        (found,) = predictions.values()
        right = (found.logits.argmax(dim=-1) == found.targets).numpy()
        bits = f"{len(right)}:{np.packbits(right).tobytes().hex()}"
    return M.tracked("x", M.split_metrics(trainer.tasks, predictions))["x/score"], diagnostics, bits


def _only(batch: Batch, left: str) -> Batch:
    present = {m: there & (m == left) for m, there in batch.present.items()}
    return Batch(batch.features, present, batch.targets, batch.clip_ids, batch.bins)


def summary(path: Path, against: str | None) -> None:
    """Mean and spread of each recipe over folds (of means over seeds), and paired t-tests; of one fold, over seeds.

    Recipes are compared by the runs of the same fold and seed.
    """
    runs = rows_of(path)
    unit = 0 if len({run["fold"] for run in runs}) > 1 else 1
    column = "test" if any(run["test"] for run in runs) else "last"
    scores: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for run in runs:
        scores[run["recipe"]][run["fold"], run["seed"]] = float(run[column])
    name = against or next(iter(scores))
    base = scores.get(name, {})
    means = {recipe: _by_unit(values, unit) for recipe, values in scores.items()}
    for recipe, values in sorted(scores.items(), key=lambda item: -means[item[0]].mean()):
        mean = means[recipe]
        print(f"{mean.mean():.3f} ({('fold', 'seed')[unit]}s sd {mean.std():.3f}, {len(values)} runs)", end="  ")
        if difference := {run: score - base[run] for run, score in values.items() if run in base}:
            paired = _by_unit(difference, unit)
            p = stats.ttest_1samp(paired, 0).pvalue if paired.any() and len(paired) > 1 else float("nan")
            low, high = bootstrap(runs, recipe, name)
            print(f"{paired.mean():+.3f} sd {paired.std(ddof=min(1, len(paired) - 1)):.3f} p {p:.3f}", end="  ")
            print(f"clips {low:+.3f} to {high:+.3f}" if np.isfinite(low) else "", end="  ")
        print(recipe)


def _by_unit(scores: dict[tuple[str, str], float], unit: int) -> np.ndarray:
    """Means over what is not the unit; scores: by fold (unit 0) and seed (unit 1)."""
    parts: dict[str, list[float]] = defaultdict(list)
    for run, score in scores.items():
        parts[run[unit]].append(score)
    return np.array([np.mean(part) for part in parts.values()])


def bootstrap(runs: list[dict[str, str]], recipe: str, base: str) -> tuple[float, float]:
    """95 % interval of a difference over clips drawn anew within each fold; folds, and seeds of both, as they are."""
    right: dict[str, dict[tuple[str, str], np.ndarray]] = defaultdict(dict)
    for run in runs:
        clips, _, bits = (run.get("right") or "0:").partition(":")
        answers = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=int(clips))
        right[run["recipe"]][run["fold"], run["seed"]] = answers.astype(float)
    differences: dict[str, list[np.ndarray]] = defaultdict(list)
    for (fold, seed), answers in right[recipe].items():
        if len(answers) and (fold, seed) in right[base]:
            differences[fold].append(answers - right[base][fold, seed])
    if not differences:
        return float("nan"), float("nan")
    random, drawn = np.random.default_rng(0), np.zeros(DRAWS)
    for of_fold in differences.values():
        difference = np.mean(of_fold, axis=0)
        clips = random.integers(len(difference), size=(DRAWS, len(difference)))
        drawn += difference[clips].mean(axis=1) / len(differences)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The runs that a file of results holds."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="feature store")
    parser.add_argument("--out", type=Path, required=True, help="csv of results; runs that it holds are not run again")
    parser.add_argument("--folds", choices=("inner", "parts", "outer", "official"), default="inner")
    parser.add_argument("--only", default="", help="these folds alone, separated by commas")
    parser.add_argument("--common", default="", help="options of every recipe")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--summary", action="store_true", help="print what --out holds")
    parser.add_argument("--against", help="recipe that the others are paired with; the first one")
    parser.add_argument("recipes", nargs="*")
    args = parser.parse_args()
    if args.summary:
        summary(args.out, args.against)
        return 0
    torch.set_num_threads(1)
    corpus, runs = Path(args.store).name, Runs(Store(args.store), args.folds, args.common)
    only = args.only.split(",") if args.only else list(runs.parts)
    if unknown := set(only) - runs.parts.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: the folds are {', '.join(runs.parts)}")
    done = {tuple(run[name] for name in KEY) for run in rows_of(args.out)}
    commit = commit_of_code()
    for seed in map(int, args.seeds.split(",")):
        for text in args.recipes:
            for fold in only:
                key = (corpus, args.folds, text, fold, str(seed))
                if key not in done:
                    row = dict(zip(KEY, key, strict=True)) | runs.run(text, fold, seed)
                    write(args.out, {"commit": commit, "command": args.common, **row})
    return 0


class Runs:
    """Recipes on one store. parts: of each fold, the part of every clip; common: options of every recipe."""

    def __init__(self, store: Store, folds: str, common: str) -> None:
        self.store, self.common = store, common
        self.samples, rows = read(store, task_specs(store))
        self.parts = dict(divisions(rows, folds))
        self.alone: dict[tuple[str, str, int, bool], clcr.base.MultimodalModel] = {}

    def run(self, text: str, fold: str, seed: int) -> dict[str, Any]:
        """One recipe on one fold."""
        architecture, *words = text.split()
        tasks, last = task_specs(self.store), "last" in words
        modalities = list(self.store.spec.features)
        sources = [self.trained_alone(m, fold, seed, last) for m in modalities if "pretrained" in words]
        started = time.perf_counter()
        if architecture == "linear":
            found = fit_linear(self.samples, self.parts[fold], words or modalities, tasks)
        else:
            options = [word for word in words if word not in ("last", "pretrained")]
            recipe = parse(" ".join([architecture, *options, self.common]), seed)
            found = report(*fit(recipe, self.store, self.samples, self.parts[fold], last, sources))
        return found | {"seconds": round(time.perf_counter() - started)}

    def trained_alone(self, modality: str, fold: str, seed: int, last: bool) -> clcr.base.MultimodalModel:
        """A model of one modality with the common options; trained once."""
        key = modality, fold, seed, last
        if key not in self.alone:
            recipe = parse(f"{modality} {self.common}", seed)
            self.alone[key] = fit(recipe, self.store, self.samples, self.parts[fold], last)[0].model
        return self.alone[key]


def parse(text: str, seed: int) -> Recipe:
    """`concat lr=1e-3 model.width=64` as a recipe; what is given first counts."""
    architecture, *words = text.split()
    options = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in reversed(words))}
    options = {k: float(v) if isinstance(v, str) and "e-" in v else v for k, v in options.items()}  # YAML's 1e-3
    listed = {name for name, value in flatten(Recipe()).items() if isinstance(value, tuple)}
    options = {k: tuple(str(v).split(",")) if k in listed and isinstance(v, str) else v for k, v in options.items()}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return override(Recipe(architecture=architecture, seed=seed), options)


def commit_of_code() -> str:
    """The commit that is checked out, short."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row, and say it."""
    written = rows_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, list(written[0]) if written else COLUMNS, extrasaction="ignore")  # as it began
        if not written:
            table.writeheader()
        table.writerow({name: f"{x:.4f}" if isinstance(x := row[name], float) else x for name in COLUMNS})
    print(*(row[name] for name in ("recipe", "fold", "seed", "val", "last", "test", "alone", "seconds")), flush=True)


if __name__ == "__main__":
    sys.exit(main())
