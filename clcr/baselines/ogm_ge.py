"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (Peng et al. 2022, arXiv 2203.15332).

    logits = sum over m of W[m] s[m] + b                                    a linear head: each modality's part is seen
    score[m] = sum over the batch of softmax(W[m] s[m] + b / M)[target]
    rho[m] = score[m] / mean over n != m of score[n]
    k[m] = 1 - tanh(alpha rho[m]) where rho[m] > 1, else 1
    gradient of m's encoder <- k[m] gradient + noise, as spread as the gradient was (GE)

A modality that learns faster than the others leaves them no error to learn from, so it is slowed down. The paper has
two modalities and one task: here rho compares with the mean of the others, and scores are summed over all tasks that
have classes, bins of time included. Scores are sums over all workers; each worker adds noise of its own, as spread as
its own share of the gradient, before gradients are averaged.

AdamW divides a constant k out of a gradient, but not out of its ratio to the noise: k = .22 still slows a constant
gradient to .37 of its pace (SGD: .22), and without noise not at all. The authors' code modulates convolutions alone,
in the first half of the epochs; here all that an encoder learns with is modulated, to the end.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clcr.aggregation import TimePooling
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig
from clcr.errors import ConfigError
from clcr.precision import exactly
from clcr.tasks import TaskSpec
from clcr.windows import Windows


class OGMGE(MultimodalModel):
    """Concatenation under a linear head, whose encoders learn at the pace of the slowest; a missing one is zeros."""

    coefficients: Tensor  # a buffer
    parts: Any  # a ModuleList of one ModuleList per modality; torch has no type for the items of one

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        if len(features) < 2:
            raise ConfigError(f"ogm_ge balances modalities: it needs two or more, got {list(features)}")
        if not any(task.has_classes for task in tasks.values()):
            raise ConfigError("ogm_ge measures modalities by the probability of the right class: no task has classes")
        super().__init__(config, features, tasks, levels=[config.model.levels - 1])
        model, width = config.model, config.model.width
        self.pooling = nn.ModuleList(TimePooling(len(tasks), width, model.pooling) for _ in features)
        # Per task one linear map of all summaries side by side, kept as one per modality and a bias.
        self.parts = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, task.outputs, bias=False) for task in tasks.values()) for _ in features
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(task.outputs)) for task in tasks.values())
        self.register_buffer("coefficients", torch.ones(len(features)), persistent=False)
        for m, encoder in enumerate(self.encoder.encoders):
            for parameter in encoder.parameters():
                parameter.register_hook(self._modulation(m, noise=config.ogm_ge.noise and parameter.ndim > 1))

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch; in training, measure how far each modality is."""
        (deepest,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        parts = []  # by modality, then task
        for tokens, pooling, heads in zip(deepest.values(), self.pooling, self.parts, strict=True):
            summary = windows.split(pooling.summary(tokens.values, windows.shares(tokens), windows.task))
            parts.append([exactly(head, x) for head, x in zip(heads, summary, strict=True)])
        logits = [sum(each) + bias for each, bias in zip(zip(*parts, strict=True), self.biases, strict=True)]
        if self.training:
            scores = torch.stack([self._score(part, batch.targets) for part in parts])
            self.coefficients.copy_(coefficients(_over_workers(scores), self.config.ogm_ge.alpha))
        return Output(logits=dict(zip(self.tasks, logits, strict=True)))

    @torch.no_grad()
    def _score(self, part: list[Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Probability that one modality's part of the logits gives the right class, summed over known targets."""
        total = part[0].new_zeros(())
        for (name, task), logits, bias in zip(self.tasks.items(), part, self.biases, strict=True):
            if task.has_classes:
                target, known = targets[name], task.known(targets[name])
                probability = (logits + bias / len(self.parts)).softmax(dim=-1)
                right = probability.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
                total = total + (right * known).sum()
        return total

    def _modulation(self, modality: int, noise: bool) -> Callable[[Tensor], Tensor]:
        def modulate(gradient: Tensor) -> Tensor:
            slowed = gradient * self.coefficients[modality]
            return slowed + torch.randn_like(gradient) * gradient.std() if noise else slowed

        return modulate


def coefficients(scores: Tensor, alpha: float) -> Tensor:
    """k of every modality from the scores of all: (M,) -> (M,)."""
    others = (scores.sum() - scores) / (len(scores) - 1)
    rho = scores / others.clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)


def _over_workers(scores: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(scores)
    return scores
