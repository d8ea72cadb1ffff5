"""The learning rate: over a training a linear rise, then a cosine to zero; and by parts of the model."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from clcr.errors import ConfigError


def warmup_cosine(total: int, warmup: float) -> Callable[[int], float]:
    """The factor of the peak learning rate at each of `total` steps; warmup: the share of them over which it rises."""
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    return factor


def parse_scales(entries: Sequence[str]) -> dict[str, float]:
    """Factors of the learning rate by part, from `encoder=.1`. Raises ConfigError for what is none."""
    scales: dict[str, float] = {}
    for entry in entries:
        part, _, factor = entry.partition("=")
        try:
            scales[part] = float(factor)
        except ValueError:
            scales[part] = math.nan
        if not (part and 0 < scales[part] < math.inf):
            raise ConfigError(f"--lr-scale {entry}: write PART=FACTOR, above 0, such as encoder=.1 (or --freeze PART)")
    return scales


def scale_parts(model: nn.Module, groups: Iterable[Mapping[str, Any]], entries: Sequence[str]) -> list[dict[str, Any]]:
    """Optimizer groups with the parameters of each part in groups of their own, of `lr_scale` times its factor.

    Without entries the groups are as they were. Raises ConfigError for a part that the model does not have.
    """
    scales, names = parse_scales(entries), {parameter: name for name, parameter in model.named_parameters()}
    for part in scales:
        if not any(is_of(name, part) for name in names.values()):
            raise ConfigError(f"--lr-scale {part}: this model has {', '.join(parts_of(model))}")
    split: list[dict[str, Any]] = []
    for group in groups:
        by_factor: dict[float, list[nn.Parameter]] = {1.0: [] if scales else group["params"]}  # first: it is logged
        for parameter in group["params"] if scales else ():
            inner = max((part for part in scales if is_of(names[parameter], part)), key=len, default="")
            by_factor.setdefault(scales.get(inner, 1.0), []).append(parameter)
        for factor, parameters in by_factor.items():
            if scales and not parameters:
                continue
            scaled = {"lr_scale": group.get("lr_scale", 1.0) * factor} if factor != 1 else {}
            split.append({**group, "params": parameters, **scaled})
    return split


def is_of(name: str, part: str) -> bool:
    """Whether a parameter is a part's, a module by its dotted name."""
    return name == part or name.startswith(f"{part}.")


def parts_of(model: nn.Module) -> list[str]:
    """The outermost parts of a model that learn, by name."""
    return list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
