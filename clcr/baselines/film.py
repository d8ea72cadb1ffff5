"""FiLM, feature-wise linear modulation (Perez et al. 2018, arXiv 1709.07871), between modalities.

    x[m]' = (1 + gamma[m]) x[m] + beta[m],      (gamma[m], beta[m]) = W[m] concat over n != m of mean_t x[n]

The paper modulates pictures by a question; here every modality is modulated by all others, so that none has to be named
the question. W starts at zero and has no bias: at the start, and for a clip whose other modalities are missing, x' = x.
"""

from collections.abc import Mapping

import torch
from torch import nn

from clcr.aggregation import TaskHeads, TimePooling
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig
from clcr.errors import ConfigError
from clcr.hierarchy import masked_mean
from clcr.tasks import TaskSpec
from clcr.windows import Windows


class FiLM(MultimodalModel):
    """Modulated tokens, pooled per task or bin and concatenated; a missing modality is zeros and modulates nothing."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        if len(features) < 2:
            raise ConfigError(f"film modulates one modality by another: it needs two or more, got {list(features)}")
        super().__init__(config, features, tasks, levels=[config.model.levels - 1])
        model, width, n = config.model, config.model.width, len(features)
        self.modulation = nn.ModuleList(nn.Linear((n - 1) * width, 2 * width, bias=False) for _ in features)
        for weight in self.modulation.parameters():
            nn.init.zeros_(weight)
        self.pooling = nn.ModuleList(TimePooling(len(tasks), width, model.pooling) for _ in features)
        self.heads = TaskHeads(n * width, width, [task.outputs for task in tasks.values()], model.dropout)

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        (deepest,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        means = [masked_mean(tokens.values, tokens.valid) for tokens in deepest.values()]
        summaries = []
        for m, (tokens, modulation, pooling) in enumerate(
            zip(deepest.values(), self.modulation, self.pooling, strict=True)
        ):
            others = torch.cat([mean for n, mean in enumerate(means) if n != m], dim=-1)
            gamma, beta = modulation(others)[:, None].chunk(2, dim=-1)
            summaries.append(pooling.summary((1 + gamma) * tokens.values + beta, windows.shares(tokens), windows.task))
        logits = self.heads(torch.cat(summaries, dim=-1), windows)
        return Output(logits=dict(zip(self.tasks, logits, strict=True)))
