#!/usr/bin/env python
"""Evaluate: what trained models are worth on a split of a store, and what is left of it when a modality is missing.

    pipelines/evaluate.py --model RUN --store URI --out DIR
    pipelines/evaluate.py --model RUN_A,RUN_B/model,models:/NAME/1,models:/NAME@ALIAS --store URI --out DIR

OUT/report.html             one file that opens offline: tables, curves, calibration, the worst clips
OUT/metrics.json            every figure of it; what is undefined is null
OUT/predictions/MODEL/*.parquet   answers of every clip: all.parquet as it is, only-audio.parquet and others under a
                            condition; columns as pipelines/predict.py has them, and label_TASK

The figures also go to the MLflow run that a model comes from, as evaluate/SPLIT/..., and the report to its artifacts.
A split of up to --here clips is answered in this process; a larger one by Ray Data, on the cluster that there is.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clcr import CLCR, TaskSpec
from features.corpus.manifest import SPLITS
from features.errors import StoreError
from features.files import open_fs, read_json, write_text
from features.store import Store, open_store
from infra.doctor import require, storage
from pipelines.answering.table import answers, row_columns
from pipelines.common.cli import main, require_at_least, resolve_uri
from pipelines.common.errors import JobError
from pipelines.evaluation import calibration, comparison, flows, robustness, slices
from pipelines.evaluation.conditions import WHOLE, Condition, noises, subsets, title
from pipelines.evaluation.inference import PLACE, Logits, Question, answer, spread_of
from pipelines.evaluation.models import Contender, find_run, fold_of, log_evaluation, open_models
from pipelines.evaluation.scores import Figures, Scored, figures, plain, score_rows
from pipelines.training.run_folder import sole_owner

LOGGED_CLASSES = 50
Row = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of the evaluate job."""

    model: tuple[str, ...]
    """the models, separated by commas and shown side by side: --out of a finished pipelines/train.py, its folder
    `model`, or (with MLFLOW_TRACKING_URI set) models:/NAME/VERSION or models:/NAME@ALIAS"""
    store: str
    """feature store with labels, or a YAML file of several; path or URI"""
    out: str
    """folder for the report, the figures and the predictions; path or URI"""
    split: str = "test"
    """train, val or test"""
    fold: int | None = None
    """cross-validation: the fold that is the test split; none = the one that the models were tested on, if any"""
    tasks: tuple[str, ...] = ()
    """tasks to evaluate; none named = all that a model answers and the store has labels of"""
    noise: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """levels of Gaussian noise added to one modality at a time, in standard deviations of its stored features"""
    robust_clips: int = 1000
    """clips, randomly sampled, on which missing and noisy modalities are evaluated; 0 = leave that out"""
    slices: tuple[str, ...] = ()
    """columns of the store's index (group, duration, ...) or labels by whose values the figures are broken down; none
    named = duration, and presence of the modalities that some clips lack"""
    worst: int = 10
    """clips with the largest loss to list for each task"""
    pictures: int = 4
    """of those, clips to draw for each model, where the store holds pixels or log-mel; 0 = no picture of a clip"""
    seed: int = 0
    """random seed for the noise, the samples of clips and the bootstrap"""
    batch_size: int = 64
    """clips that pass through a model at once"""
    here: int = 5000
    """clips up to which this process answers; more are answered by processes of Ray"""
    concurrency: int = 0
    """processes of Ray over the whole cluster; 0 = one per GPU, or per CPU where there is none"""
    gpus_per_process: float = 1.0
    """GPUs of each process of Ray, on a cluster that has any; a fraction shares one, 0 = CPUs"""
    track: bool = True
    """log the figures and the report to the MLflow runs that the models come from"""

    def __post_init__(self) -> None:
        least = {"robust_clips": 0, "worst": 0, "pictures": 0, "seed": 0, "batch_size": 1, "here": 0, "concurrency": 0}
        require_at_least(self, {**least, "gpus_per_process": 0})
        if self.split not in SPLITS:
            raise JobError(f"--split {self.split}: choose one of {', '.join(SPLITS)}")
        if any(not 0 < level < 1e6 for level in self.noise):
            raise JobError(f"--noise {','.join(f'{x:g}' for x in self.noise)}: levels must be above 0, and finite")


def evaluate(config: EvaluateConfig) -> None:
    """The job: check that models and store fit, ask every model, count, write, log."""
    started, out = time.monotonic(), resolve_uri("--out", config.out)
    store = open_store(resolve_uri("--store", config.store))
    store.require_complete()
    models = open_models(config.model, store)
    config = replace(config, fold=fold_of(models, store) if config.fold is None else config.fold)
    tasks = common_tasks(models, store, config.tasks)
    index = read_split(store, config.split, config.fold, tasks)
    conditions = plan_conditions(models, store, config)
    parts = slices.slice_clips(index, config.slices)
    require(storage(out))
    with sole_owner(out):
        measure(config, out, store, models, tasks, index, conditions, parts)
    print(f"{out}/report.html, metrics.json and predictions/: {time.monotonic() - started:.0f} s")


def measure(
    config: EvaluateConfig,
    out: str,
    store: Store,
    models: Sequence[Contender],
    tasks: Mapping[str, TaskSpec],
    index: pa.Table,
    conditions: tuple[Condition, ...],
    parts: Mapping[str, np.ndarray],
) -> None:
    """Ask, count, write, log: all that comes after the checks."""
    rows, sample = index.to_pylist(), robust_sample(index, config)
    many = f"{len(models)} model{'s' * (len(models) > 1)}, {len(conditions)} condition{'s' * (len(conditions) > 1)}"
    print(f"{len(rows)} clips of {config.split}, {many}", flush=True)
    metrics, scored, logits = describe(config, store, rows, sample, tasks), {}, {}
    validation, seen = read_validation(store, config, tasks), read_probed(store, config, models)
    for model in models:
        logits[model.name] = ask(config, model, store, rows, conditions, sample)
        scored[model.name], metrics["models"][model.name] = count(
            config, model, store, tasks, rows, sample, conditions, parts, logits[model.name], validation, seen
        )
        print(*said(model.name, metrics["models"][model.name], conditions), sep="\n", flush=True)
    metrics["notes"] += notes(scored)
    metrics["paired"] = [
        pair
        for task in tasks
        for pair in comparison.compare_models({m: s[task] for m, s in scored.items() if task in s}, config.seed)
    ]
    metrics["leaks"] = probe_metadata(store, config, tasks, index)
    metrics = plain(metrics)
    write(config, out, store, models, rows, sample, tasks, metrics, scored, logits)


def common_tasks(models: Sequence[Contender], store: Store, wanted: Sequence[str]) -> dict[str, TaskSpec]:
    """The tasks that a model answers and the store has labels of, as the first such model knows them.

    Raises JobError where there is none, for one that is wanted and is not there, and for one of another kind.
    """
    answered = {name: task for model in reversed(models) for name, task in model.trained.model.tasks.items()}
    declared = {task.name: task for task in store.spec.tasks}
    have, answer = ", ".join(declared) or "no labels (predict with pipelines/predict.py)", ", ".join(answered)
    if unknown := [name for name in wanted if name not in answered or name not in declared]:
        raise JobError(f"--tasks {','.join(unknown)}: the models answer {answer}, and {store.uri} has {have}")
    tasks = {name: task for name, task in answered.items() if name in declared and (not wanted or name in wanted)}
    if not tasks:
        raise JobError(f"--store {store.uri} has {have}, and the models answer {answer}: there is nothing to evaluate")
    for model in models:
        for name, task in model.trained.model.tasks.items():
            if name in tasks and (task.has_classes, task.rate) != (
                declared[name].kind in ("classification", "events"),
                declared[name].rate,
            ):
                kinds = f"{task.kind} to {model.name} and {declared[name].kind} in {store.uri}"
                raise JobError(f"task {name} is {kinds}: extract the store with --tasks {name}:{task.kind}")
    return tasks


def read_split(store: Store, split: str, fold: int | None, tasks: Mapping[str, TaskSpec]) -> pa.Table:
    """The index's rows of the split. Raises JobError where it has no clip, or no label of any task."""
    index = store.index(split, None, fold)
    if not len(index):
        have = ", ".join(f"{name} ({rows})" for name, rows in store.spec.splits.items() if rows) or "none"
        raise JobError(f"--split {split}: {store.uri} has no clip in it; it has {have}")
    if all(index[f"label_{task}"].null_count == len(index) for task in tasks):
        raise JobError(f"--split {split}: no clip of {store.uri} has a label of {', '.join(tasks)} there")
    return index


def read_validation(store: Store, config: EvaluateConfig, tasks: Mapping[str, TaskSpec]) -> list[Row]:
    """Rows of the validation split for the temperature; none where it is what is evaluated, or has no labels."""
    if config.split == "val" or not any(task.has_classes for task in tasks.values()):
        return []
    try:
        return read_split(store, "val", config.fold, tasks).to_pylist()
    except (JobError, StoreError):
        return []


def plan_conditions(models: Sequence[Contender], store: Store, config: EvaluateConfig) -> tuple[Condition, ...]:
    """The clips as they are, and with every subset of the modalities that the models read, and noise in each."""
    read = {m for model in models for m in model.trained.model.features}
    modalities = [m for m in store.spec.features if m in read]
    changed = [*subsets(modalities), *noises(modalities, sorted({*config.noise}))] if config.robust_clips else []
    return (Condition(WHOLE), *changed)


def robust_sample(index: pa.Table, config: EvaluateConfig) -> list[int]:
    """Which rows are asked under every condition, in order."""
    order = np.random.default_rng(config.seed).permutation(len(index))
    return np.sort(order[: config.robust_clips]).tolist()


def describe(
    config: EvaluateConfig, store: Store, rows: Sequence[Row], sample: Sequence[int], tasks: Mapping[str, TaskSpec]
) -> Figures:
    """The head of metrics.json."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    about = {"version": 1, "store": store.uri, "fingerprint": store.spec.fingerprint, "split": config.split}
    about |= {"fold": config.fold, "clips": len(rows), "robust_clips": len(sample), "seed": config.seed}
    return about | {"written": written, "tasks": list(tasks), "notes": [], "models": {}}


def ask(
    config: EvaluateConfig,
    model: Contender,
    store: Store,
    rows: Sequence[Row],
    conditions: tuple[Condition, ...],
    sample: Sequence[int],
) -> Logits:
    """A model's logits of every row, of sampled ones under every condition."""
    network = model.trained.model
    spread = spread_of(network, store, rows, config.seed) if len(conditions) > 1 else {}
    robust = None if len(sample) == len(rows) else frozenset((rows[i]["shard"], rows[i]["offset"]) for i in sample)
    question = Question(conditions, spread, config.seed, config.batch_size, robust)
    return answer(network, store, rows, question, config.here, config.concurrency, config.gpus_per_process)


def count(
    config: EvaluateConfig,
    model: Contender,
    store: Store,
    tasks: Mapping[str, TaskSpec],
    rows: Sequence[Row],
    sample: Sequence[int],
    conditions: Sequence[Condition],
    parts: Mapping[str, np.ndarray],
    logits: Logits,
    validation: Sequence[Row],
    seen: Sequence[Row],
) -> tuple[dict[str, Scored], Figures]:
    """One model's scored rows by task, and what metrics.json says of it."""
    network, sampled = model.trained.model, [rows[i] for i in sample]
    about: Figures = {"uri": model.uri, "architecture": network.recipe["model"], "digest": model.trained.digest}
    about |= {"modalities": list(network.features), "parameters": sum(p.numel() for p in network.parameters())}
    about |= {"tasks": {}, "subsets": {}, "noise": {}}
    about["flows"] = flows.flow_probe(network, store, seen, sampled, config.batch_size)
    mine = {name: task for name, task in network.tasks.items() if name in tasks}
    scored = {name: score_rows(task, rows, logits[WHOLE][name]) for name, task in mine.items()}
    tuned = ask(config, model, store, validation, (Condition(WHOLE),), range(len(validation))) if validation else None
    for name, task in mine.items():
        found = figures(scored[name]) | {"intervals": comparison.intervals(scored[name], config.seed)}
        if task.has_classes:
            held_out = score_rows(task, validation, tuned[WHOLE][name]) if tuned else None
            found["calibration"] = calibration.calibration(scored[name], held_out)
        found["slices"] = slices.slice_figures(scored[name], parts)
        found["worst"] = slices.worst_clips(scored[name], rows, config.worst)
        about["tasks"][name] = found
        if len(conditions) > 1:
            changed = {c.name: score_rows(task, sampled, logits[c.name][name]) for c in conditions if c.name != WHOLE}
            changed[WHOLE] = score_rows(task, sampled, [logits[WHOLE][name][i] for i in sample])
            for condition, values in robustness.subset_figures(changed, conditions).items():
                about["subsets"].setdefault(condition, {})[name] = values
            about["noise"][name] = robustness.noise_figures(changed, conditions)
    return scored, about


def notes(scored: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """What a reader has to know: classes that a model never saw, tasks with one class or no label."""
    lines = []
    for model, by_task in scored.items():
        for name, values in by_task.items():
            classes = len(values.task.classes)
            if values.groups is not None:
                many = values.groups.max() + 1
                few = "; with fewer than six no difference can be significant at .05" if many < 6 else ""
                lines.append(f"clips come in {many} groups: intervals and tests are over these{few}")
            if unseen := values.labels[classes:]:
                share = (values.truth >= classes).mean()
                lines.append(f"{model}, {name}: the store has classes that the model never saw, which count as wrong: ")
                lines[-1] += f"{', '.join(unseen[:8])} ({100 * share:.0f} % of the labels)"
            if not len(values.truth):
                lines.append(f"{model}, {name}: no clip has a label of this task")
            elif len(np.unique(values.truth)) == 1:
                lines.append(f"{name}: all labels are the same, so that AUROC, r and R² are not defined")
    return list(dict.fromkeys(lines))


def probe_metadata(
    store: Store, config: EvaluateConfig, tasks: Mapping[str, TaskSpec], index: pa.Table
) -> dict[str, Figures | None]:
    """`slices.metadata_probe` of each task, learned on the train split; empty where there is none."""
    if config.split == "train":
        return {}
    train = store.index("train", None, config.fold)
    return {name: slices.metadata_probe(task, train, index, config.seed) for name, task in tasks.items()}


def read_probed(store: Store, config: EvaluateConfig, models: Sequence[Contender]) -> list[Row]:
    """Rows of the train split for `flows.flow_probe`, as many as are asked; none where no model has flows."""
    wanted = config.robust_clips and config.split != "train"
    if not wanted or not any(isinstance(model.trained.model, CLCR) for model in models):
        return []
    train = store.index("train", PLACE, config.fold)
    return train.take(pa.array(robust_sample(train, config), pa.int64())).to_pylist()


def said(model: str, about: Figures, conditions: Sequence[Condition]) -> list[str]:
    """What the screen shows of a model: its main figures, and those with a part of what it reads."""
    lines, reads = [f"{model}: {_main_figures(about['tasks'])}"], set(about["modalities"])
    if constant := [f"{name} {f['majority']:.3f}" for name, f in about["tasks"].items() if "majority" in f]:
        lines.append(f"  always answering the most frequent class: accuracy {', '.join(constant)}")
    parts = [c.name for c in conditions if c.name in about["subsets"] and set() < reads - set(c.absent) < reads]
    drawn = {f["n"] for f in about["subsets"].get(WHOLE, {}).values()}
    if parts and drawn != {about["tasks"][name]["n"] for name in about["subsets"][WHOLE]}:
        lines, parts = [*lines, f"  of {max(drawn)} clips drawn at random:"], [WHOLE, *parts]
    return lines + [f"  {title(part)}: {_main_figures(about['subsets'][part])}" for part in parts]


def _main_figures(found: Mapping[str, Figures]) -> str:
    texts = []
    for name, values in found.items():
        shown = [f"{k} {values[k]:.3f}" for k in ("accuracy", "macro_f1", "mae", "pearson") if k in values]
        texts.append(f"{name} {', '.join(shown) or 'has no labels here'}")
    return "; ".join(texts)


def write(
    config: EvaluateConfig,
    out: str,
    store: Store,
    models: Sequence[Contender],
    rows: Sequence[Row],
    sample: Sequence[int],
    tasks: Mapping[str, TaskSpec],
    metrics: Figures,
    scored: Mapping[str, Mapping[str, Scored]],
    logits: Mapping[str, Logits],
) -> None:
    """Predictions, report and, last, metrics.json; then what the models' MLflow runs get of them."""
    from pipelines.evaluation.report import draw_sheets, write_html

    fs, path = open_fs(out)
    for name in (read_json(out, "metrics.json") or {}).get("models", ()):  # of an earlier evaluation
        with suppress(FileNotFoundError):
            fs.delete_dir(f"{path}/predictions/{quote(name, safe=' ()')}")
    for model in models:
        for condition, by_task in logits[model.name].items():
            asked = rows if condition == WHOLE else [rows[i] for i in sample]
            write_predictions(f"{out}/predictions/{quote(model.name, safe=' ()')}", condition, model, asked, by_task)
    html = write_html(metrics, tasks, scored, draw_sheets(config.pictures, store, models, rows, metrics))
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    write_text(out, "report.html", html)
    write_text(out, "metrics.json", text)
    for model in models if config.track else ():
        if run := find_run(model):
            about, place = metrics["models"][model.name], f"evaluation/{config.split}-{store.spec.fingerprint[:8]}"
            numbers = {key: about[key] for key in ("subsets", "noise", "flows")}
            for name, found in about["tasks"].items():  # of many classes, and of slices, the artifact has the figures
                few = len(found.get("per_class") or ()) <= LOGGED_CLASSES
                numbers[name] = {k: v for k, v in found.items() if k != "slices" and (few or k != "per_class")}
            files = {f"{place}/report.html": html, f"{place}/metrics.json": text}
            log_evaluation(run, f"evaluate/{config.split}", numbers, files)


def write_predictions(
    folder: str, condition: str, model: Contender, rows: Sequence[Row], logits: Mapping[str, Sequence[np.ndarray]]
) -> None:
    """One file of answers: what predict writes of each clip and task, and the task's label."""
    columns = row_columns(rows)
    seconds = [row["duration"] for row in rows]
    for name, task in model.trained.model.tasks.items():
        columns |= answers(task, stacked(logits[name]), seconds)
        if rows and f"label_{name}" in rows[0]:
            columns[f"label_{name}"] = pa.array([row[f"label_{name}"] for row in rows])
    fs, path = open_fs(folder)
    fs.create_dir(path, recursive=True)
    with fs.open_output_stream(f"{path}/{condition}.parquet") as file:
        pq.write_table(pa.table(columns), file)


def stacked(logits: Sequence[np.ndarray]) -> torch.Tensor:
    """(clips, outputs), of events (clips, bins, outputs) padded to the most bins of any clip."""
    most = max(len(values) for values in logits)
    padded = [np.pad(v, ((0, most - len(v)), (0, 0))) if v.ndim > 1 else v for v in logits]
    return torch.from_numpy(np.stack(padded))


if __name__ == "__main__":
    main(evaluate, EvaluateConfig, "What models are worth on a split: report.html, metrics.json, predictions/.")
