"""A model card: what a model reads, answers and learned from, how good it is and for what it was not made."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.training.trained import TrainedModel


def write_card(
    trained: TrainedModel, name: str, metrics: Mapping[str, Any] | None, networks: Sequence[str] = ()
) -> str:
    """Markdown. metrics: of the training's metrics.json, by task, None where the run's folder is not there.

    networks: formats in which the network alone lies there.
    """
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
    if networks:
        lines += _network(trained, networks)
    lines += [
        "## Limits",
        "",
        "The figures hold for clips like those of its corpus. Before you deploy it, run `pipelines/evaluate.py` on",
        "clips of your own. It shows what is left when a modality is missing or noisy, and how calibrated it is.",
        "",
        f"Files: sha256 {trained.digest}.",
    ]
    return "\n".join(lines) + "\n"


def _network(trained: TrainedModel, networks: Sequence[str]) -> list[str]:
    """The inputs and outputs of the network alone, and every class in the order of its logits."""
    from pipelines.answering.network import FORMATS, Network

    network, tasks = Network(trained.model), trained.model.tasks
    files = " and ".join(f"`{FORMATS[name]}`" for name in networks)
    lines = ["## Network", "", f"{files}: from features to logits, for any number of clips and tokens.", ""]
    lines += ["| tensor | | shape |", "|---|---|---|"]
    example = dict(zip(network.inputs, network.example(1, 1), strict=True))
    for name, value in example.items():
        shape = ", ".join(["clips", "bins" if name.endswith(".bins") else "tokens", *map(str, value.shape[2:])])
        lines.append(f"| `{name}` | in, {np.dtype(value.numpy().dtype)} | {shape} |")
    for name, task in zip(network.outputs, tasks.values(), strict=True):
        lines.append(f"| `{name}` | out | clips, {'bins, ' if task.rate else ''}{task.outputs} |")
    classes = [f"- `{name}`: {', '.join(task.classes)}" for name, task in tasks.items() if task.classes]
    rates = ", ".join(f"{name} {task.rate:g} a second" for name, task in tasks.items() if task.rate)
    note = ["`valid` is false for padding, and for all tokens of a modality that a clip lacks."]
    note += [f"`bins` is false beyond a clip's last bin ({rates})."] if rates else []
    return [*lines, "", *note, "", *([*classes, ""] if classes else [])]


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
