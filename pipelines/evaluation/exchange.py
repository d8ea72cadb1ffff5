"""Whether a trained CLCR's exchange is used: how loud it is, how far in time it reaches, and what it changes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import clcr
from clcr import metrics as M
from clcr.batches import Batch
from clcr.exchange import CoExchange
from clcr.hierarchy import masked_mean


@dataclass
class Use:
    """What a split showed. size, distance, heard: by "level modality", means over tokens and clips.

    size: of what a token hears, over its own; distance: seconds between a token and what it hears (NaN without time);
    heard: share of the attention that is not on hearing nothing; scores: accuracy (numbers: skill) of each task, with
    the exchange and without; changed: share of each task's classes (numbers: mean change in the labels' unit) that are
    others without; weights: by class of the first task with classes, omega (K,) and beta (M,) of its clips.
    """

    size: dict[str, float] = field(default_factory=dict)
    distance: dict[str, float] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def exchanges(model: clcr.CLCR) -> list[tuple[str, CoExchange]]:
    """The exchanges of a model by the level they are at; none of a model without exchange."""
    return [(str(level), intra.exchange) for level, intra in enumerate(model.intra) if intra.exchange is not None]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    """Within it, the hook is called after each module's forward pass; what it returns takes the place of the output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def exchange_use(model: clcr.CLCR, batches: Iterable[Batch]) -> Use:
    """Read a split, each batch with the exchange and without."""
    found, names = exchanges(model), {}
    seen: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in ("size", "distance", "heard")}
    for level, exchange in found:
        names[exchange] = level

    def observe(exchange: CoExchange, arguments: tuple, output: dict[str, Tensor]) -> None:
        shared, _, valid, spans = arguments
        reached = exchange.reach(*arguments) if spans else {}
        for m, own in shared.items():
            there, key = valid[m].any(dim=1), f"{names[exchange]} {m}"
            heard = torch.linalg.vector_norm(output[m] - own, dim=-1, keepdim=True)
            own_size = torch.linalg.vector_norm(own, dim=-1, keepdim=True).clamp(min=1e-6)
            seen["size"][key].append(masked_mean(heard / own_size, valid[m])[there])
            if spans:
                for name, of_heads in zip(("heard", "distance"), reached[m], strict=True):
                    seen[name][key].append(masked_mean(of_heads.mean(dim=1)[..., None], valid[m])[there])

    modules = [exchange for _, exchange in found]
    given: list[Mapping[str, M.Predictions]] = []
    alone: list[Mapping[str, M.Predictions]] = []
    first = next((name for name, task in model.tasks.items() if task.kind == "classification"), None)
    weights, classes = [], []
    for batch in batches:
        with hooked(modules, observe):
            out = model(batch)
        with hooked(modules, lambda module, arguments, output: arguments[0]):
            silent = model(batch)
        for parts, logits in ((given, out.logits), (alone, silent.logits)):
            parts.append({t: M.Predictions(batch.clip_ids, logits[t], batch.targets[t]) for t in model.tasks})
        if first:
            real = torch.tensor([bool(clip_id) for clip_id in batch.clip_ids])
            classes.append(batch.targets[first][real])
            weights.append(torch.cat([out.task_omega[first], out.beta], dim=1)[real])
    means = {n: {key: torch.cat(v).nanmean().item() for key, v in of.items()} for n, of in seen.items()}
    use = Use(means["size"], means["distance"], means["heard"])
    both, neither = M.concatenate(given), M.concatenate(alone)
    scores = [M.split_metrics(model.tasks, predictions) for predictions in (both, neither)]
    for name, task in model.tasks.items():
        if name in scores[0]:
            use.scores[name] = (M.main_metric(scores[0][name]), M.main_metric(scores[1][name]))
        a, b = both[name].logits, neither[name].logits
        moved = (a.argmax(dim=-1) != b.argmax(dim=-1)).float() if task.has_classes else (a - b).abs()
        use.changed[name] = moved.mean().item()
    if first:
        of, values = torch.cat(classes), torch.cat(weights)
        of_class = {name: values[of == i] for i, name in enumerate(model.tasks[first].classes)}
        use.weights = {name: rows.mean(dim=0).numpy() for name, rows in of_class.items() if len(rows)}
    return use


def exchange_figure(model: clcr.CLCR, use: Use) -> Figure:
    """One picture: how loud, from how far, what it changes, and the weights of levels and modalities by class."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loud, far), (worth, weights) = figure.subplots(2, 2)
    names = list(use.size)
    loud.barh(range(len(names)), [use.size[name] for name in names], color="C0")
    loud.set(xlabel="size of what is heard, over the token's own", title="is anything heard?")
    known = [name for name in names if name in use.distance]
    far.barh(range(len(known)), np.nan_to_num([use.distance[name] for name in known]), color="C1")
    for place, name in enumerate(known):
        far.text(0, place, f" {use.heard[name]:.0%} of the attention", va="center", fontsize=7)
    far.set(xlabel="seconds between a token and what it hears", title="from how far in time?")
    for axes, labels in ((loud, names), (far, known)):
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
    places = np.arange(len(use.scores))
    for column, label in enumerate(("with the exchange", "without")):
        worth.bar(places + 0.4 * column - 0.2, [s[column] for s in use.scores.values()], 0.4, label=label)
    worth.set_xticks(places, [f"{t}\n{use.changed[t]:.2g} change" for t in use.scores], fontsize=7)
    worth.set(ylabel="accuracy or skill, test split", title="what does the same model answer without it?")
    worth.legend(fontsize=8, loc="lower center")
    if use.weights:
        values = np.stack(list(use.weights.values()))
        image = weights.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        columns = [f"omega {i}" for i in range(values.shape[1] - len(model.features))]
        columns += [f"beta {m}" for m in model.features]
        weights.set_xticks(range(len(columns)), columns, rotation=30, fontsize=8)
        weights.set_yticks(range(len(use.weights)), list(use.weights), fontsize=7)
        figure.colorbar(image, ax=weights)
    weights.set(title="levels and modalities by class")
    return figure
