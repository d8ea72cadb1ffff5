"""MulT, the crossmodal transformer (Tsai et al. 2019, arXiv 1906.00295): every modality reads every other one.

    Z[b->a, 0] = Z[a]
    Z'         = Z[b->a, i-1] + Attn(LN(Z[b->a, i-1]), LN(Z[b]), LN(Z[b]))       for every ordered pair b -> a
    Z[b->a, i] = Z' + FFN(LN(Z'))

Keys and values of every layer come from the source's low-level tokens Z[b], never from what it has read itself. The
streams of one target, side by side, pass a self-attention transformer, are pooled per task and go into the heads.

Its encoder is that of the other models with one level: one convolutional stage with positions (MulT's own low-level
features), and the last layer of a language model, which is what later work feeds it. Attention itself has no dropout:
the fused kernels have none on the CPU; residual branches and the inner layer of the FFN do.

Each pair has its own weights. Those of N transformers are one tensor, and all that read equal lengths run as one.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcr.aggregation import TaskHeads, TimePooling
from clcr.base import MultimodalModel, Output
from clcr.batches import Batch, FeatureSpec
from clcr.config import BudgetConfig, CLCRConfig
from clcr.errors import ConfigError
from clcr.tasks import TaskSpec
from clcr.windows import Windows

GROWTH = 4  # of the FFN's inner layer


class StackedLinear(nn.Module):
    """N linear maps, (G, B, T, d_in) -> (G, B, T, d_out) for the G of them in `which`."""

    undecayed = ("bias",)

    def __init__(self, n: int, width_in: int, width_out: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (width_in + width_out))  # Xavier, as MulT's authors have it
        self.weight = nn.Parameter(torch.empty(n, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n, width_out))

    def forward(self, x: Tensor, which: list[int]) -> Tensor:
        """x: (G, B, T, d_in)."""
        weight, bias = _rows(self.weight, which), _rows(self.bias, which)
        return torch.baddbmm(bias[:, None], x.flatten(1, 2), weight).unflatten(1, x.shape[1:3])


class StackedNorm(nn.Module):
    """N layer norms over the last axis of (G, B, T, d)."""

    undecayed = ("gain", "bias")

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n, width))
        self.bias = nn.Parameter(torch.zeros(n, width))

    def forward(self, x: Tensor, which: list[int]) -> Tensor:
        """x: (G, B, T, d)."""
        gain, bias = (_rows(p, which)[:, None, None] for p in (self.gain, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]).to(gain.dtype), gain)


class StackedLayer(nn.Module):
    """One layer of N transformers: pre-norm attention, then the FFN."""

    def __init__(self, n: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = StackedNorm(n, width), StackedNorm(n, width)
        self.query, self.out = StackedLinear(n, width, width), StackedLinear(n, width, width)
        self.key, self.value = StackedLinear(n, width, width), StackedLinear(n, width, width)
        self.widen, self.narrow = StackedLinear(n, width, GROWTH * width), StackedLinear(n, GROWTH * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor | None, valid: Tensor, which: list[int]) -> Tensor:
        """x: (G, B, T, d) asks; source: (G, B, S, d) answers, x itself if None; valid: (G, B, S)."""
        query = self.attention_norm(x, which)
        source = query if source is None else self.attention_norm(source, which)
        q, k, v = (
            project(tokens, which).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, tokens in ((self.query, query), (self.key, source), (self.value, source))
        )
        mask = valid.flatten(0, 1)[:, None, None]
        answered = mask.any(dim=-1, keepdim=True)
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~answered)  # some kernels: NaN if none is
        answer = answer.where(answered, 0.0).transpose(1, 2).flatten(2).unflatten(0, x.shape[:2])
        x = x + self.dropout(self.out(answer, which))
        inner = self.dropout(F.relu(self.widen(self.ffn_norm(x, which), which)))
        return x + self.dropout(self.narrow(inner, which))


class StackedTransformer(nn.Module):
    """N transformers of equal shape and their final norms."""

    def __init__(self, n: int, depth: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StackedLayer(n, width, heads, dropout) for _ in range(depth))
        self.norm = StackedNorm(n, width)

    def forward(self, tokens: list[Tensor], sources: list[Tensor] | None, valid: list[Tensor]) -> list[Tensor]:
        """Run transformer i on tokens[i] (B, T, d), reading sources[i] (B, S, d) with valid[i] (B, S), or itself."""
        shapes: list[Any] = [(x.shape[1], mask.shape[1]) for x, mask in zip(tokens, valid, strict=True)]
        if torch.compiler.is_exporting():  # for any length: which are equal is not known
            shapes = list(range(len(tokens)))
        outputs: dict[int, Tensor] = {}
        for shape in dict.fromkeys(shapes):
            which = [i for i, other in enumerate(shapes) if other == shape]
            x = torch.stack([tokens[i] for i in which])
            source = torch.stack([sources[i] for i in which]) if sources is not None else None
            mask = torch.stack([valid[i] for i in which])
            for layer in self.layers:
                x = layer(x, source, mask, which)
            outputs.update(zip(which, self.norm(x, which).unbind(), strict=True))
        return [outputs[i] for i in range(len(tokens))]


class Mult(MultimodalModel):
    """Crossmodal transformers between every two modalities; a missing modality is read by none and is zeros."""

    def __init__(self, config: CLCRConfig, features: Mapping[str, FeatureSpec], tasks: Mapping[str, TaskSpec]) -> None:
        if len(features) < 2:
            raise ConfigError(f"mult reads one modality from another: it needs two or more, got {list(features)}")
        model, depth, n = config.model, config.mult.depth, len(features)
        if model.width % model.heads:
            raise ConfigError(f"--model.heads {model.heads}: must divide --model.width {model.width} for mult")
        # A budget per level would not fit one level; mult has none.
        super().__init__(replace(config, model=replace(model, levels=1), budget=BudgetConfig()), features, tasks)
        self.pairs = list(permutations(range(n), 2))  # (target, source), target by target
        wide = model.width * (n - 1)
        self.crossmodal = StackedTransformer(len(self.pairs), depth, model.width, model.heads, model.dropout)
        self.memory = StackedTransformer(n, depth, wide, model.heads, model.dropout)
        self.pooling = nn.ModuleList(TimePooling(len(tasks), wide, model.pooling) for _ in features)
        self.heads = TaskHeads(wide * n, model.width, [task.outputs for task in tasks.values()], model.dropout)

    def forward(self, batch: Batch) -> Output:
        """Predict every task for a batch."""
        (low_level,) = self.encoder(batch)
        windows = Windows.of(self.tasks, batch)
        tokens, valid = [t.values for t in low_level.values()], [t.valid for t in low_level.values()]
        targets, sources = zip(*self.pairs, strict=True)
        streams = self.crossmodal(
            [tokens[a] for a in targets], [tokens[b] for b in sources], [valid[b] for b in sources]
        )
        each = len(valid) - 1  # streams per target
        fused = [torch.cat(streams[i : i + each], dim=-1) for i in range(0, len(streams), each)]
        fused = self.memory(fused, None, valid)
        summaries = [
            pooling.summary(x, windows.shares(read), windows.task)
            for pooling, read, x in zip(self.pooling, low_level.values(), fused, strict=True)
        ]
        logits = self.heads(torch.cat(summaries, dim=-1), windows)
        return Output(logits=dict(zip(self.tasks, logits, strict=True)))


def _rows(stacked: Tensor, which: list[int]) -> Tensor:
    return stacked if len(which) == len(stacked) else torch.stack([stacked[i] for i in which])
