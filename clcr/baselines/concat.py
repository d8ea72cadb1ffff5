"""Concatenation: the deepest level of every modality, pooled per task or bin, side by side into a head.

A strong baseline: everything CLCR adds must be worth more than this.
"""

from collections.abc import Mapping

import torch
from torch import nn

from clcr.aggregation import TaskHeads, TimePooling, own_heads
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig
from clcr.tasks import TaskSpec
from clcr.windows import Windows


class Concat(MultimodalModel):
    """Late fusion by concatenation; a missing modality is zeros."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        super().__init__(config, features, tasks, levels=[config.model.levels - 1])
        model, width = config.model, config.model.width
        self.pooling = nn.ModuleList(TimePooling(len(tasks), width, model.pooling) for _ in features)
        outputs = [task.outputs for task in tasks.values()]
        self.heads = TaskHeads(width * len(features), width, outputs, model.dropout)
        self.own_heads = own_heads(len(features), width, width, outputs, config)

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        (deepest,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        summaries = [
            pooling.summary(tokens.values, windows.shares(tokens), windows.task)
            for tokens, pooling in zip(deepest.values(), self.pooling, strict=True)
        ]
        logits = self.heads(torch.cat(summaries, dim=-1), windows)
        unimodal = self.by_themselves(summaries, windows) if self.training else {}
        return Output(logits=dict(zip(self.tasks, logits, strict=True)), unimodal=unimodal)
