"""Where half precision is not enough, under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which nothing is cast; nothing at all where nothing would be, for ONNX cannot export such a block."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def exactly(head: nn.Module, x: Tensor) -> Tensor:
    """head(x) outside of autocast: a number that is answered has more digits than bfloat16."""
    with without_autocast(x):
        return head(x.to(next(head.parameters()).dtype))
