"""A model card: what a model reads, answers and learned from, how good it is and for what it was not made."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.trained import TrainedModel


def write_card(trained: TrainedModel, name: str, metrics: Mapping[str, Any] | None) -> str:
    """Markdown. metrics: of the training's metrics.json, by task, None where the run's folder is not there."""
    model, learned = trained.model, trained.learned
    lines = [f"# {name}", "", f"A `{model.recipe['model']}` of clcr with {_count(model):,} parameters.", ""]
    lines += ["## Reads", "", "| modality | token | tokens per second | made by |", "|---|---|---|---|"]
    for modality, feature in model.features.items():
        encoder = learned.features[modality].encoder.get("name", "unknown")
        shape = " x ".join(map(str, feature.shape))
        lines.append(f"| {modality} | {feature.dtype} {shape} | {feature.rate:g} | {encoder} |")
    lines += ["", "## Answers", ""]
    for task in model.tasks.values():
        shown = ", ".join(task.classes[:20]) + (", ..." if len(task.classes) > 20 else "")
        lines.append(f"- **{task.name}** ({task.kind}){': ' + shown if shown else ''}")
    rows = ", ".join(f"{count} {split}" for split, count in learned.splits.items())
    lines += ["", "## Learned from", "", f"Store `{learned.fingerprint[:12]}`: {rows} clips.", ""]
    if metrics:
        lines += ["## Test split", "", "| task | figure | value |", "|---|---|---|"]
        lines += [
            f"| {t} | {figure} | {value:.3f} |" for t, values in metrics.items() for figure, value in values.items()
        ]
        lines.append("")
    lines += [
        "## Limits",
        "",
        "The figures hold for clips like those of its corpus. Before you deploy it, run `pipelines/evaluate.py` on",
        "clips of your own. It shows what is left when a modality is missing or noisy, and how calibrated it is.",
        "",
        f"Files: sha256 {trained.digest}.",
    ]
    return "\n".join(lines) + "\n"


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
