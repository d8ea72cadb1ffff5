"""Intra-level co-exchange: tokens of one modality attend to those of the others, in the shared subspace only.

    h~[m,t] = alpha[m,t] * Attn(Q[m,t], K[-m], V[-m])              (CLCR, sec. IntraCED)

The pool -m holds the shared tokens of all other modalities at the same level. A token admitted with weight alpha also
enters the pool with that weight: log(alpha) is added to its attention logit, so a refused token neither asks nor
answers. Everything here is in coordinates of the one shared basis of the level.

Ours, because a few hundred clips teach neither: a head may prefer tokens near in time, which the paper leaves to the
positions inside the tokens; and value and output start as the identity, so that what one modality hears of the other at
its own instant is there from the first step, as loud as itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REFUSED = -1e4  # attention logit of refused and padded tokens: exp gives 0, and half precision can hold it
SMALLEST = 1e-6  # log has no finite gradient at 0
LOCAL = 2.0  # gain of the head that starts as the most local: it sees a tenth of a second


class Nearness(nn.Module):
    """A bias for tokens near in time, per head: sum_f gain[f]^2 cos(2 pi (t - t') / period[f]), as coordinates.

    The gains are learned; the first head starts at LOCAL, the last of several at 0, blind to time.
    """

    frequencies: Tensor  # a buffer

    def __init__(self, heads: int, periods: int = 6) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi / torch.logspace(-0.5, 1, periods), persistent=False)
        self.gain = nn.Parameter(torch.linspace(LOCAL, 0, heads)[:, None].expand(-1, periods).clone())

    def forward(self, spans: Tensor) -> Tensor:
        """spans: (T, 2) seconds -> (heads, T, 2 periods); zero, which is no preference, for tokens without a time."""
        times = spans.mean(dim=1, keepdim=True)
        angles = (times * self.frequencies).where(times.isfinite(), 0.0)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).where(times.isfinite(), 0.0)
        return waves.to(self.gain.dtype) * self.gain.repeat(1, 2)[:, None]


class CoExchange(nn.Module):
    """Multi-head attention from every modality to the pool of the others; weights common to all modalities."""

    def __init__(self, k_shared: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(k_shared, k_shared, bias=False)
        self.key = nn.Linear(k_shared, k_shared, bias=False)
        self.value = nn.Linear(k_shared, k_shared, bias=False)
        self.out = nn.Linear(k_shared, k_shared, bias=False)
        nn.init.eye_(self.value.weight)
        nn.init.eye_(self.out.weight)
        self.nearness = Nearness(heads)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        shared: dict[str, Tensor],
        alpha: dict[str, Tensor],
        valid: dict[str, Tensor],
        spans: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """shared: (B, T[m], k_s); alpha, valid: (B, T[m]); spans: (T[m], 2) seconds -> shared + h~, (B, T[m], k_s).

        No pool (other modalities missing, or every token refused): h~ = 0. No spans: no token is nearer than another.
        """
        near = {m: self.nearness(spans[m]) for m in shared} if spans else None
        queries = {m: self._split(self.query(h)) for m, h in shared.items()}
        keys = {m: self._split(self.key(h)) for m, h in shared.items()}
        values = {m: self._split(self.value(h)) for m, h in shared.items()}
        exchanged = {}
        for m in shared:
            others = [n for n in shared if n != m]
            weight = torch.cat([alpha[n].where(valid[n], 0.0) for n in others], dim=1)
            answer = attend(
                queries[m],
                torch.cat([keys[n] for n in others], dim=2),
                torch.cat([values[n] for n in others], dim=2),
                weight,
                (near[m], torch.cat([near[n] for n in others], dim=1)) if near else None,
            )
            answer = self.dropout(self.out(answer.transpose(1, 2).flatten(2)))
            has_pool = (weight > 0).any(dim=1)
            gate = alpha[m].where(valid[m] & has_pool[:, None], 0.0)
            exchanged[m] = shared[m] + gate[..., None] * answer
        return exchanged

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, near: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention in which key j counts weight[j] times: softmax(q k / sqrt(d) + near_q near_k + log weight) v.

    query: (B, h, Tq, d); key, value: (B, h, Tk, d); weight: (B, Tk) >= 0; near: (h, Tq, e) and (h, Tk, e). A row of
    zeros gives a finite, meaningless result: the caller drops it. Both biases travel as more coordinates, sqrt(d) in
    the query and log(weight) in the key: an additive mask with a gradient would rule out the fused attention kernels.
    """
    batch, heads, _, width = query.shape
    root = width**0.5
    bias = torch.where(weight > 0, weight.clamp(min=SMALLEST).log(), REFUSED).to(key.dtype)
    more_query = [query, query.new_full((*query.shape[:3], 1), root)]
    more_key = [key, bias[:, None, :, None].expand(-1, heads, -1, -1)]
    if near is not None:
        more_query.append(root * near[0].to(query.dtype).expand(batch, -1, -1, -1))
        more_key.append(near[1].to(key.dtype).expand(batch, -1, -1, -1))
    query, key = torch.cat(more_query, dim=-1), torch.cat(more_key, dim=-1)
    value = F.pad(value, (0, query.shape[-1] - width))  # the fused kernels want one head size
    return F.scaled_dot_product_attention(query, key, value, scale=1 / root)[..., :width]
