"""Late fusion: every modality predicts by itself, and the predictions are averaged over those that are present."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clcr.aggregation import TaskHeads, TimePooling
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig
from clcr.tasks import TaskSpec
from clcr.windows import Windows


class Late(MultimodalModel):
    """The mean of the modalities' logits, per task or bin; zeros where no modality is present."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        super().__init__(config, features, tasks, levels=[config.model.levels - 1])
        model, outputs = config.model, [task.outputs for task in tasks.values()]
        self.pooling = nn.ModuleList(TimePooling(len(tasks), model.width, model.pooling) for _ in features)
        self.heads = nn.ModuleList(TaskHeads(model.width, model.width, outputs, model.dropout) for _ in features)

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        (deepest,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        totals: list[Tensor | float] = [0.0] * len(self.tasks)
        voices: Tensor | float = 0.0
        for tokens, pooling, heads in zip(deepest.values(), self.pooling, self.heads, strict=True):
            shares = windows.shares(tokens)
            present = (shares > 0).any(dim=-1, keepdim=True).float()  # (B, N, 1)
            logits = heads(pooling.summary(tokens.values, shares, windows.task), windows)
            totals = [t + x * own for t, x, own in zip(totals, logits, windows.split(present), strict=True)]
            voices = voices + present
        counts = windows.split(torch.as_tensor(voices).clamp(min=1))
        return Output(logits={n: t / count for n, t, count in zip(self.tasks, totals, counts, strict=True)})
