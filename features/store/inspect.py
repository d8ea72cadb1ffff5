"""What a feature store holds, in figures: rows by split, class and modality, durations, bytes, quality, failures.

All of it comes from the parts of index and failures. Only the columns with figures and labels are read, about a hundred
bytes a clip, and counted by Arrow, so that a million clips take seconds.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from features.corpus.tasks import NUMBERS
from features.store.quality import quality_schema
from features.store.reader import Store

LINES = 40  # of a table; of more classes or reasons only the largest are shown
PATH, NUMBER = r"\S*/\S*", r"\d+(\.\d+)?"  # what differs between two messages about the same thing


def inspect(store: Store) -> dict[str, Any]:
    """Every figure as plain JSON types. Raises StoreError where nothing is committed yet."""
    spec = store.spec
    quality = quality_schema(spec.features)
    columns = ["split", "nbytes", "duration", *(f"tokens_{m}" for m in spec.features), *quality.names]
    index = store.index(columns=columns + [f"label_{task.name}" for task in spec.tasks])
    failures = store.failures()
    return {
        "store": store.uri,
        "spec": spec.to_dict(),
        "rows": {"planned": spec.rows, "indexed": len(index), "failed": len(failures)},
        "splits": {split: _split(index, failures, split, rows) for split, rows in spec.splits.items()},
        "modalities": {name: _modality(index, name, feature) for name, feature in spec.features.items()},
        "tasks": {task.name: _task(index, task, spec.splits) for task in spec.tasks},
        "quality": _quality(index, quality),
        "failures": _failures(failures),
    }


def spread(values: pa.ChunkedArray) -> dict[str, float | int | None]:
    """Count, minimum, median, maximum and sum of the values that are not null; None where there is none."""
    known = values.drop_null().to_numpy()
    if not len(known):
        return {"count": 0, "min": None, "median": None, "max": None, "sum": 0}
    figures = {"min": known.min(), "median": np.median(known), "max": known.max(), "sum": known.sum(dtype=float)}
    return {"count": len(known), **{name: float(value) for name, value in figures.items()}}


def _split(index: pa.Table, failures: pa.Table, split: str, planned: int) -> dict[str, Any]:
    rows = index.filter(pc.equal(index["split"], split))
    failed = pc.sum(pc.equal(failures["split"], split)).as_py() or 0
    counts = {"planned": planned, "indexed": len(rows), "failed": failed}
    return {**counts, "bytes": pc.sum(rows["nbytes"]).as_py() or 0, "seconds": spread(rows["duration"])}


def _modality(index: pa.Table, name: str, feature: Any) -> dict[str, Any]:
    """Clips that have it and clips that do not, tokens of those that do, bytes of all its arrays."""
    tokens = index[f"tokens_{name}"]
    present = tokens.filter(pc.greater(tokens, 0))
    figures = spread(present)
    nbytes = int(figures["sum"]) * math.prod(feature.shape) * np.dtype(feature.dtype).itemsize
    return {"present": len(present), "absent": len(tokens) - len(present), "tokens": figures, "bytes": nbytes}


def _task(index: pa.Table, task: Any, splits: Iterable[str]) -> dict[str, Any]:
    labels = index[f"label_{task.name}"]
    unlabelled = labels.null_count
    if task.kind in NUMBERS:
        return {"kind": task.kind, "unlabelled": unlabelled, "values": spread(labels)}
    split = index["split"]
    if task.kind == "events":
        split, labels = split.take(pc.list_parent_indices(labels)), pc.struct_field(pc.list_flatten(labels), "label")
    counted = pa.table({"split": split, "class": labels.cast(pa.string())}).group_by(["split", "class"])
    classes = {name: dict.fromkeys(splits, 0) for name in task.classes}
    for row in counted.aggregate([([], "count_all")]).to_pylist():
        if row["class"] is not None:
            classes.setdefault(row["class"], dict.fromkeys(splits, 0))[row["split"]] = row["count_all"]
    return {"kind": task.kind, "unlabelled": unlabelled, "classes": classes}


def _quality(index: pa.Table, schema: pa.Schema) -> dict[str, Any]:
    """Per figure of features/store/quality.py its spread; of one that is true or false, how many clips have it."""
    return {
        field.name: pc.sum(index[field.name]).as_py() or 0
        if pa.types.is_boolean(field.type)
        else spread(index[field.name])
        for field in schema
    }


def _failures(failures: pa.Table) -> list[dict[str, Any]]:
    """Failed clips by stage, error class and reason, the most frequent ones first; example: one of the clips."""
    reasons = pc.replace_substring_regex(failures["message"], PATH, "...")
    reasons = pc.replace_substring_regex(reasons, NUMBER, "N")
    grouped = failures.append_column("reason", reasons).group_by(["stage", "error", "reason"])
    names = {"clip_id_count": "clips", "clip_id_min": "example", "attempts_max": "attempts"}
    counted = grouped.aggregate([("clip_id", "count"), ("clip_id", "min"), ("attempts", "max")])
    rows = counted.rename_columns([names.get(name, name) for name in counted.column_names]).to_pylist()
    return sorted(rows, key=lambda row: (-row["clips"], row["stage"], row["error"], row["reason"] or ""))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The figures of `inspect` as tables."""
    spec, rows = report["spec"], report["rows"]
    missing = rows["planned"] - rows["indexed"] - rows["failed"]
    state = f"; {missing} not extracted yet" if missing else ""
    console.print(
        f"{report['store']}: {rows['planned']} rows, {rows['indexed']} indexed, {rows['failed']} failed{state}"
    )
    console.print(f"fingerprint {spec['fingerprint']}\ncorpus      {spec['corpus']}")
    console.print(f"schema {spec['schema_version']}, {spec['shard_rows']} rows a shard\n")
    for table in (_split_table(report), _modality_table(report), *_task_tables(report), _quality_table(report)):
        console.print(table)
    if report["failures"]:
        console.print(_failure_table(report["failures"]))


def _split_table(report: Mapping[str, Any]) -> Table:
    names = ("planned", "indexed", "failed", "size", "hours", "shortest s", "median s", "longest s")
    table = make_table("Splits", ["split"], names)
    for split, row in report["splits"].items():
        seconds = row["seconds"]
        durations = [seconds["sum"] / 3600, seconds["min"], seconds["median"], seconds["max"]]
        counts = [row["planned"], row["indexed"], row["failed"]]
        table.add_row(split, *map(number, counts), human_bytes(row["bytes"]), *map(number, durations))
    return table


def _modality_table(report: Mapping[str, Any]) -> Table:
    names = ("present", "absent", "fewest tokens", "median", "most", "bytes of arrays")
    table = make_table("Modalities", ["modality", "one token", "encoder"], names)
    for name, row in report["modalities"].items():
        feature, tokens = report["spec"]["features"][name], row["tokens"]
        encoder = "\n".join(f"{key} {value}" for key, value in feature["encoder"].items() if value is not None)
        rate = f"{feature['rate']:g} a second" if feature["rate"] else "without time"
        token = f"{feature['dtype']} {feature['shape']}\n{rate}"
        counts = [row["present"], row["absent"], tokens["min"], tokens["median"], tokens["max"]]
        table.add_row(name, token, encoder, *map(number, counts), human_bytes(row["bytes"]))
    return table


def _task_tables(report: Mapping[str, Any]) -> Iterable[Table]:
    splits, regressions = list(report["splits"]), {}
    for name, task in report["tasks"].items():
        if task["kind"] in NUMBERS:
            regressions[name] = task
            continue
        counted = "events" if task["kind"] == "events" else "clips"
        table = make_table(f"Task {name}: {counted} by class", ["class"], [*splits, "all"])
        ranked = sorted(task["classes"].items(), key=lambda item: -sum(item[1].values()))
        shown = dict(ranked[:LINES] if len(ranked) > LINES else task["classes"].items())
        for label, counts in shown.items():
            table.add_row(label, *(number(counts[split]) for split in splits), number(sum(counts.values())))
        if rest := ranked[LINES:]:
            sums = [sum(counts[split] for _, counts in rest) for split in splits]
            table.add_row(f"{len(rest)} smaller classes", *map(number, sums), number(sum(sums)))
        if task["unlabelled"]:
            table.add_row("(no label)", *[""] * len(splits), number(task["unlabelled"]))
        yield table
    if regressions:
        table = make_table("Regression tasks", ["task"], ["clips", "no label", "min", "median", "max"])
        for name, task in regressions.items():
            values = task["values"]
            figures = (values["count"], task["unlabelled"], values["min"], values["median"], values["max"])
            table.add_row(name, *map(number, figures))
        yield table


def _quality_table(report: Mapping[str, Any]) -> Table:
    table = make_table("Quality", ["figure"], ["clips", "min", "median", "max"])
    for name, figure in report["quality"].items():
        if isinstance(figure, int):
            table.add_row(name, number(figure), "", "", "")
        else:
            table.add_row(name, *(number(figure[column]) for column in ("count", "min", "median", "max")))
    return table


def _failure_table(failures: list[Mapping[str, Any]]) -> Table:
    table = make_table("Failures", [], ["clips"])
    for name in ("stage", "class", "reason", "a clip"):
        table.add_column(name, overflow="fold")
    for row in failures[:LINES]:
        table.add_row(number(row["clips"]), row["stage"], row["error"], row["reason"], row["example"])
    if rest := failures[LINES:]:
        table.add_row(number(sum(row["clips"] for row in rest)), "", "", f"{len(rest)} more reasons", "")
    return table


def make_table(title: str, names: Iterable[str], figures: Iterable[str]) -> Table:
    """An empty table: columns of names to the left, columns of figures to the right."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def make_console() -> Console:
    """Where tables are printed: what clips and files are called is text and no markup, and a log is wide enough."""
    return Console(
        width=None if sys.stdout.isatty() else 140, markup=False, highlight=False, emoji=False, soft_wrap=False
    )


def number(value: float | None) -> str:
    """A figure for a table: whole numbers whole, others to four digits; - where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def human_bytes(count: float) -> str:
    """A number of bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
