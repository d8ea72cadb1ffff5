"""Hierarchical interactive monomodal attention (MM-ORIENT, HIMA): within a clip, then across clips, one modality each.

    h_i = sum over t of softmax_t(s(x_it)) x_it        stage 1: words of a text, regions of an image, moments of a sound
    o_i = n * softmax_i(s'(h_i)) h_i                   stage 2: clip i among the n that it is compared with, itself too
    s(x) = v^T tanh(W x + b)

The released code has stage 1 alone, with s(x) = gelu(v^T x + b) (`--mm-orient.attention released`).

The factor n keeps the size of o from depending on how many clips there are: where all are alike, o = h.
"""

import torch
from torch import Tensor, nn

from clcr.aggregation import masked_softmax


class Score(nn.Sequential):
    """v^T tanh(W x + b); v starts at zero, so that every weight starts even: (..., d) -> (...)."""

    def __init__(self, width: int) -> None:
        first, last = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        super().__init__(first, nn.Tanh(), last, nn.Flatten(-2))
        nn.init.zeros_(last.weight)


class ReleasedScore(nn.Sequential):
    """gelu(v^T x + b), as the released code has it: (..., d) -> (...)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 1), nn.GELU(), nn.Flatten(-2))


class TokenAttention(nn.Module):
    """Stage 1: the tokens of a clip to one vector."""

    def __init__(self, width: int, released: bool = False) -> None:
        super().__init__()
        self.score = (ReleasedScore if released else Score)(width)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """tokens: (B, T, d); valid: (B, T) -> (B, d), zero where none is valid."""
        return torch.einsum("bt,btd->bd", masked_softmax(self.score(tokens), valid), tokens.float())


class ClipAttention(nn.Module):
    """Stage 2: a clip's vector, weighed against those of other clips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = Score(width)

    def forward(self, pooled: Tensor, others: Tensor, compared: Tensor) -> Tensor:
        """pooled: (B, d); others: (R, d); compared: (B, R) bool, without a clip's own -> (B, d)."""
        scores = torch.cat([self.score(pooled)[:, None], self.score(others).expand(pooled.shape[0], -1)], dim=1)
        among = torch.cat([torch.ones_like(compared[:, :1]), compared], dim=1)
        weights = masked_softmax(scores, among)[:, :1] * among.sum(dim=1, keepdim=True)
        return weights * pooled
