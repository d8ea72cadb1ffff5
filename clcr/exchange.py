"""Intra-level co-exchange: tokens of one modality attend to those of the others, in the shared subspace only.

    h~[m,t] = alpha[m,t] * Attn(Q[m,t], K[-m], V[-m])              (CLCR, sec. IntraCED)

The pool -m holds the shared tokens of all other modalities at the same level. A token admitted with weight alpha also
enters the pool with that weight: log(alpha) is added to its attention logit, so a refused token neither asks nor
answers. Everything here is in coordinates of the one shared basis of the level.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

REFUSED = -1e4  # attention logit of refused and padded tokens: exp gives 0, and half precision can hold it
SMALLEST = 1e-6  # log has no finite gradient at 0


class CoExchange(nn.Module):
    """Multi-head attention from every modality to the pool of the others; weights common to all modalities."""

    def __init__(self, k_shared: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(k_shared, k_shared, bias=False)
        self.key = nn.Linear(k_shared, k_shared, bias=False)
        self.value = nn.Linear(k_shared, k_shared, bias=False)
        self.out = nn.Linear(k_shared, k_shared, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, shared: dict[str, Tensor], alpha: dict[str, Tensor], valid: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """shared: (B, T[m], k_s); alpha, valid: (B, T[m]) -> shared + h~, (B, T[m], k_s).

        No pool (other modalities missing, or every token refused): h~ = 0.
        """
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
            )
            answer = self.dropout(self.out(rearrange(answer, "b h t d -> b t (h d)")))
            has_pool = (weight > 0).any(dim=1)
            gate = alpha[m].where(valid[m] & has_pool[:, None], 0.0)
            exchanged[m] = shared[m] + gate[..., None] * answer
        return exchanged

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)


def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Attention in which key j counts weight[j] times: softmax(q k / sqrt(d) + log weight) v.

    query: (B, h, Tq, d); key, value: (B, h, Tk, d); weight: (B, Tk) >= 0. A row of zeros gives a finite, meaningless
    result: the caller drops it. The bias travels as one more coordinate, sqrt(d) in the query and log(weight) in the
    key: an additive mask with a gradient would rule out the fused attention kernels.
    """
    root = query.shape[-1] ** 0.5
    bias = torch.where(weight > 0, weight.clamp(min=SMALLEST).log(), REFUSED).to(key.dtype)
    bias = repeat(bias, "b t -> b h t 1", h=key.shape[1])
    query = F.pad(query, (0, 1), value=root)
    key = torch.cat([key, bias], dim=-1)
    value = F.pad(value, (0, 1))  # the fused kernels want one head size
    return F.scaled_dot_product_attention(query, key, value, scale=1 / root)[..., :-1]
