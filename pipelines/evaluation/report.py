"""report.html: one file that opens offline, made of the figures in metrics.json and pictures of the predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from clcr import TaskSpec
from features.store import Store
from pipelines.evaluation import pictures
from pipelines.evaluation.calibration import LIMITS
from pipelines.evaluation.conditions import WHOLE, title
from pipelines.evaluation.models import Contender
from pipelines.evaluation.scores import Figures, Scored, main_figure

LIMIT = 3_000_000  # bytes; a report beyond it leaves the pictures of clips out
TITLES = {
    **{"accuracy": "accuracy", "macro_f1": "macro F1", "macro_precision": "macro precision"},
    **{"macro_recall": "macro recall", "auroc": "AUROC", "top3": "top-3", "top5": "top-5", "nll": "NLL"},
    **{"mae": "MAE", "rmse": "RMSE", "pearson": "r", "r2": "R²", "bias": "bias", "skill": "skill"},
    **{"acc7": "acc-7", "acc5": "acc-5", "acc2_has0": "acc-2 (≥ 0)", "acc2_non0": "acc-2 (no 0)"},
    **{"f1_has0": "F1 (≥ 0)", "f1_non0": "F1 (no 0)"},
}
LOWER_IS_BETTER = ("mae", "rmse", "nll")
UNRANKED = ("bias",)
DROP = 0.5  # share of its accuracy that a model must keep without a modality to go without a warning


def write_html(
    metrics: Figures,
    tasks: Mapping[str, TaskSpec],
    scored: Mapping[str, Mapping[str, Scored]],
    sheets: Mapping[str, str],
) -> str:
    """The report's text. metrics: what metrics.json holds; scored: by model and task; sheets: worst clips by model."""
    names = list(metrics["models"])
    parts = [_task(name, task, metrics, scored, sheets) for name, task in tasks.items()]
    parts = [part for part in parts if part]
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            names=names,
            tasks=parts,
            leaks={k: v for k, v in metrics["leaks"].items() if v},
            flows={model: about["flows"] for model, about in metrics["models"].items() if about["flows"]},
        )
    )
    if len(text.encode()) > LIMIT and sheets:
        return write_html(metrics, tasks, scored, {})
    return text


def environment() -> Environment:
    """jinja2 with the report's own filters; what comes from a store is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {
        "number": lambda x: "–" if not isinstance(x, int | float) else f"{x:.3f}" if abs(x) < 1000 else f"{x:.4g}",
        "percent": lambda x: "–" if not isinstance(x, int | float) else f"{100 * x:.0f} %",
        "p_value": lambda p: "–" if not isinstance(p, int | float) else "< .001" if p < 0.001 else f"{p:.3f}",
        "temperature": _temperature,
        "title_of": lambda name: TITLES.get(name, name),
    }
    return environment


def _temperature(value: object) -> str:
    if not isinstance(value, float):  # none was fitted
        return "–"
    inside = 1.01 * LIMITS[0] < value < 0.99 * LIMITS[1]
    return f"{value:.3f}" if inside else f"{value:.3g} (limit)"


def _task(
    name: str,
    task: TaskSpec,
    metrics: Figures,
    scored: Mapping[str, Mapping[str, Scored]],
    sheets: Mapping[str, str],
) -> dict[str, Any] | None:
    """What the template shows of a task; None where no model answers it."""
    found = {model: about["tasks"][name] for model, about in metrics["models"].items() if name in about["tasks"]}
    if not found:
        return None
    main = main_figure(task)
    figures = [key for key in TITLES if any(isinstance(f.get(key), int | float) for f in found.values())]
    calibration = {model: f["calibration"] for model, f in found.items() if f.get("calibration")}
    first = next(iter(found.values()))
    part = {"name": name, "kind": task.kind, "has_classes": task.has_classes, "n": first["n"], "main": main}
    part |= {"figures": figures, "rows": _rows(found, figures), "calibration": calibration}
    if task.has_classes and first["n"]:
        part["majority"] = first["majority"]
    part["paired"] = [pair for pair in metrics["paired"] if pair["task"] == name]
    part["reliability"] = pictures.to_svg(pictures.reliability_figure(calibration)) if calibration else ""
    part["scaled"] = any("scaled" in entry for entry in calibration.values())
    part["slice_figures"] = ("accuracy", "macro_f1") if task.has_classes else ("mae", "pearson")
    part |= _robustness(name, task, metrics)
    part["models"] = [
        {
            "name": model,
            "per_class": f.get("per_class"),
            "picture": _picture(scored[model][name], f, metrics["seed"]),
            "slices": f["slices"],
            "worst": f["worst"],
            "sheet": sheets.get(f"{model}/{name}"),
            "weighs": metrics["models"][model]["architecture"] == "clcr",
        }
        for model, f in found.items()
    ]
    return part


def _rows(found: Mapping[str, Figures], figures: Sequence[str]) -> list[dict[str, Any]]:
    best = {}
    for figure in figures:
        values = [f[figure] for f in found.values() if isinstance(f.get(figure), int | float)]
        if len(found) > 1 and figure not in UNRANKED:
            best[figure] = min(values) if figure in LOWER_IS_BETTER else max(values)
    return [
        {
            "model": model,
            "cells": [
                {
                    "figure": figure,
                    "value": f.get(figure),
                    "interval": f["intervals"].get(figure),
                    "best": figure in best and f.get(figure) == best[figure],
                }
                for figure in figures
            ],
        }
        for model, f in found.items()
    ]


def _robustness(name: str, task: TaskSpec, metrics: Figures) -> dict[str, Any]:
    """The tables of subsets and of noise, the curves, and a line for each model that a missing modality ruins."""
    main = main_figure(task)
    subsets = {model: about["subsets"] for model, about in metrics["models"].items() if about["subsets"]}
    noise = {model: about["noise"].get(name, {}) for model, about in metrics["models"].items()}
    conditions = list(dict.fromkeys(c for by_condition in subsets.values() for c in by_condition))
    rows, warnings = [], []
    for condition in conditions:
        values = [about["subsets"].get(condition, {}).get(name, {}).get(main) for about in metrics["models"].values()]
        rows.append({"condition": condition, "title": title(condition), "cells": values})
        for model, value in zip(metrics["models"], values, strict=True):
            whole = subsets.get(model, {}).get(WHOLE, {}).get(name, {}).get(main)
            reads = metrics["models"][model]["modalities"]
            lost = task.has_classes and value is not None and whole and value < DROP * whole
            if lost and len(reads) > 1:
                warnings.append(f"{model}: accuracy falls from {whole:.3f} to {value:.3f} with {title(condition)}.")
    modalities = list(dict.fromkeys(m for curves in noise.values() for m in curves))
    robustness = [{"modality": m, "cells": [curves.get(m, {}) for curves in noise.values()]} for m in modalities]
    curves = pictures.to_svg(pictures.noise_figure(noise, main)) if modalities else ""
    shown = rows if len(rows) > 1 else []
    return {"subsets": shown, "warnings": warnings, "noise": curves, "robustness": robustness}


def _picture(scored: Scored, figures: Figures, seed: int) -> str:
    if not len(scored.truth):
        return ""
    if scored.task.has_classes:
        return pictures.to_svg(pictures.confusion_picture(figures["confusion"]))
    return pictures.to_svg(pictures.residual_figure(scored, seed))


def draw_sheets(
    clips: int, store: Store, models: Sequence[Contender], rows: Sequence[Mapping[str, Any]], metrics: Figures
) -> dict[str, str]:
    """Each model's worst clips of its first task as a picture, by MODEL/TASK; none where the store has none to show."""
    if not clips or not any(feature.shape[-1] == 3 or feature.rate for feature in store.spec.features.values()):
        return {}
    sheets = {}
    for model in models:
        for task, found in list(metrics["models"][model.name]["tasks"].items())[:1]:
            worst = [rows[clip["row"]] for clip in found["worst"][:clips]]
            if worst:
                network, what = model.trained.model, f"{model.name}, {task}: the clips with the largest loss"
                sheets[f"{model.name}/{task}"] = pictures.worst_sheet(store, worst, network, what)
    return sheets
