"""Training whose answers come from averaged weights: an exponential moving average over the steps (EMA).

After each step theta_avg <- d theta_avg + (1 - d) theta, with d = min(decay, (1 + n) / (10 + n)) after n steps, so that
a short training is not held back by its start. Validation, the best epoch and the saved model use theta_avg; training
continues with theta.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clcr.batches import Batch
from clcr.training import Trainer


class AveragedTrainer(Trainer):
    """A Trainer whose model holds the averaged weights between its epochs, and its own during them.

    decay: d above, in (0, 1). Buffers are not averaged.
    """

    def __init__(self, *args: Any, decay: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.decay, self.updates = decay, 0
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.own: list[Tensor] = []  # the model's own weights, while it holds the averaged ones
        self.optimizer.register_step_post_hook(lambda *_: self._update())

    def train_epoch(
        self, batches: Iterable[Batch], after_step: Callable[[Mapping[str, float]], None] | None = None
    ) -> dict[str, float]:
        """As a Trainer's; the model then holds the averaged weights."""
        self._put_own()
        losses = super().train_epoch(batches, after_step)
        self.own = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._put(self.average)
        return losses

    def state_dict(self) -> dict[str, Any]:
        """As a Trainer's, with the averaged weights."""
        averaged = [parameter.detach().clone() for parameter in self.model.parameters()] if self.own else []
        if self.own:
            self._put(self.own)
        state = super().state_dict()
        if averaged:  # what `super` gave are the model's own tensors
            state["model"] = {name: value.detach().clone() for name, value in state["model"].items()}
            self._put(averaged)
        return state | {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self.updates, self.own = state["updates"], []
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def _update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [parameter.detach() for parameter in self.model.parameters()]
        get_ema_multi_avg_fn(decay)(self.average, now, self.updates)
        self.updates += 1

    def _put_own(self) -> None:
        if self.own:
            self._put(self.own)
            self.own = []

    @torch.no_grad()
    def _put(self, weights: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(value)
