"""What training steps showed, left on the device until someone asks.

A number that is read makes the processor wait for all that the device was given to do. So a step's losses, its
gradient's norm and which clips' losses are finite stay where they are, and those of many steps are read at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor


class Losses(Mapping[str, float]):
    """A step's losses by tracking name; asking for the first reads all of them. values: (names,) on the device."""

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self.names, self.on_device = tuple(names), values

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The same as numbers."""
        return dict(zip(self.names, self.on_device.tolist(), strict=True))

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Step:
    """One step of a worker. norm: () of the whole gradient; finite: (B,) bool, whether each clip's own loss is."""

    number: int
    losses: Losses
    norm: Tensor
    clip_ids: Sequence[str]
    finite: Tensor


def read(steps: Sequence[Step]) -> list[float]:
    """Read what several steps showed, all at once; returns their gradients' norms."""
    counts = [len(step.losses) for step in steps]
    parts = [values for step in steps for values in (step.losses.on_device, step.norm[None])]
    flat = iter(torch.cat(parts).tolist() if parts else [])
    found = []
    for step, count in zip(steps, counts, strict=True):
        step.losses.numbers = dict(zip(step.losses.names, islice(flat, count), strict=True))
        found.append(next(flat))
    return found


def blame(shares: Sequence[tuple[float, Sequence[str], Sequence[str]]], number: int, norm: float, most: int) -> str:
    """What to say of a step that was not finite: the clips whose own loss is not, else all; at most so many.

    shares: of every worker its loss, its clips, and those of them whose loss is not finite.
    """
    named = [c for *_, own in shares for c in own] or [c for _, clips, _ in shares for c in clips]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    total = sum(loss for loss, *_ in shares) / len(shares)
    what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {norm}"
    return (
        f"step {number}: {what} on clips {', '.join(named[:most])}{more}: check those clips' features and labels, or "
        "lower --lr"
    )
