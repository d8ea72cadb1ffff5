"""Intra-level co-exchange: tokens of one modality attend to those of the others, in the shared subspace only.

    h~[m,t] = alpha[m,t] * Attn(Q[m,t], K[-m], V[-m])              (CLCR, sec. IntraCED)

The pool -m holds the shared tokens of all other modalities at the same level. A token admitted with weight alpha also
enters the pool with that weight: log(alpha) is added to its attention logit, so a refused token neither asks nor
answers. Everything here is in coordinates of the one shared basis of the level.

A head may also hear nothing: a key of value 0, weighed against all that the head could hear at that instant,

    Attn = sum_j alpha[j] e^(c[j] + n[j]) v[j] / (sum_j alpha[j] e^(c[j] + n[j]) + e^b sum_j e^n[j])

c the content, n the nearness in time, b the null logit. Without it a factor common to all alpha cancels, and the budget
bounds nothing where the pool is a single modality. Where content is indifferent, a pool admitted in full is heard at
1 / (1 + e^b), whatever its length and however far the head looks.

A token without a time counts as the average one that has a time: n = log(mean_j e^n[j]) over these. With n = 0, no
more and no less than a token half a period away, words would hardly be heard by a picture that has sound to listen to.

Ours, because a few hundred clips teach neither: a head may prefer tokens near in time, which the paper leaves to the
positions inside the tokens; and value and output start as the identity, so that what one modality hears of the other at
its own instant is there from the first step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcr.errors import ConfigError

Near = tuple[Tensor, Tensor]  # coordinates of queries ([B,] h, Tq, e) and keys ([B,] h, Tk, e), whose product is n
REFUSED = -1e4  # attention logit of refused and padded tokens: exp gives 0, and half precision can hold it
SMALLEST = 1e-6  # log has no finite gradient at 0
FARTHEST = 1e-30  # nearness, relative to that of the same instant, below which all of a pool is equally far
STEP = 0.1  # seconds from one token to the next where tokens have places instead of times


class Nearness(nn.Module):
    """A bias for tokens near in time, per head: sum_f gain[f]^2 cos(2 pi (t - t') / period[f]), as coordinates.

    The gains are learned; the first head's start at `nearest`, the last one's of several at `farthest`.
    """

    frequencies: Tensor  # a buffer
    scalars = ("gain",)

    def __init__(self, heads: int, nearest: float = 2.0, farthest: float = 1.0, periods: int = 6) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi / torch.logspace(-0.5, 1, periods), persistent=False)
        self.gain = nn.Parameter(torch.linspace(nearest, farthest, heads)[:, None].expand(-1, periods).clone())

    def forward(self, spans: Tensor) -> Tensor:
        """spans: (..., T, 2) seconds -> (..., heads, T, 2 periods); zero for tokens without a time."""
        times = spans.mean(dim=-1, keepdim=True)
        angles = (times * self.frequencies).where(times.isfinite(), 0.0)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).where(times.isfinite(), 0.0)
        return waves.to(self.gain.dtype)[..., None, :, :] * self.gain.repeat(1, 2)[:, None]


def places(
    spans: dict[str, Tensor], valid: dict[str, Tensor], untimed: list[str], missing: bool = True
) -> dict[str, Tensor]:
    """Spans in which tokens without a time lie STEP apart, in the clips whose `untimed` are equally long.

    spans: (T[m], 2); valid: (B, T[m]); missing: whether those that a clip lacks are left out of the comparison -> spans
    (T[m], 2), of the untimed (B, T[m], 2). A clip's own lengths decide, never those of its batch.
    """
    counts = torch.stack([valid[m].sum(dim=1) for m in untimed], dim=1)
    longest = counts.amax(dim=1)
    equal = ((counts == longest[:, None]) | (missing & (counts == 0))).all(dim=1) & (longest > 1)
    placed = {}
    for m in untimed:
        start = torch.arange(valid[m].shape[1], device=counts.device, dtype=spans[m].dtype)
        seconds = STEP * torch.stack([start, start + 1], dim=1)
        placed[m] = torch.where(equal[:, None, None], seconds, spans[m])
    return spans | placed


class CoExchange(nn.Module):
    """Multi-head attention from every modality to the pool of the others; weights common to all modalities.

    null_logit: start of each head's logit of hearing nothing; none: it always hears. drop_answer: in training, share
    of clips whose answer is dropped, for each modality by itself. mixed: some modalities have a time and some none, and
    all clips have the same spans.
    """

    scalars = ("null",)

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        null_logit: float | None = -1.0,
        nearest: float = 2.0,
        farthest: float = 1.0,
        drop_answer: float = 0.0,
        alike: bool = True,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"--model.heads {heads}: must divide the exchange's {width} dimensions")
        self.heads, self.drop_answer, self.mixed = heads, drop_answer, mixed
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        for linear in (self.value, self.out, *([self.query, self.key] if alike else [])):
            nn.init.eye_(linear.weight)
        self.nearness = Nearness(heads, nearest, farthest)
        self.null = None if null_logit is None else nn.Parameter(torch.full((heads,), float(null_logit)))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        shared: dict[str, Tensor],
        alpha: dict[str, Tensor],
        valid: dict[str, Tensor],
        spans: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """shared: (B, T[m], k); alpha, valid: (B, T[m]); spans: ([B,] T[m], 2) seconds -> shared + h~, (B, T[m], k).

        No pool (other modalities missing, or every token refused): h~ = 0. No spans: no token is nearer than another.
        """
        values = {m: self._split(self.value(h)) for m, h in shared.items()}
        exchanged = {}
        for m, (heard, weight) in self._attend(shared, alpha, valid, spans, values).items():
            answer = self.dropout(self.out(heard.transpose(1, 2).flatten(2)))
            exchanged[m] = shared[m] + self._gate(alpha[m], valid[m], weight)[..., None] * answer
        return exchanged

    @torch.no_grad()
    def reach(
        self,
        shared: dict[str, Tensor],
        alpha: dict[str, Tensor],
        valid: dict[str, Tensor],
        spans: dict[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each token and head, the share of its attention that is not on hearing nothing, and how far it looks.

        Arguments as in `forward` -> by modality (B, heads, T) each; the distance is the root of the mean square, in
        seconds, NaN where a token, or what it could hear, has no time.
        """
        times = {m: spans[m].mean(dim=-1).expand(len(h), -1).to(h.dtype) for m, h in shared.items()}
        moments = {
            m: torch.stack([t**0, t, t**2], dim=-1)[:, None].expand(-1, self.heads, -1, -1) for m, t in times.items()
        }
        reached = {}
        for m, (heard, _) in self._attend(shared, alpha, valid, spans, moments).items():
            share, first, second = heard.unbind(dim=-1)
            t = times[m][:, None]
            square = (second - 2 * t * first + t**2 * share) / share.clamp(min=SMALLEST)
            reached[m] = share, square.clamp(min=0).sqrt()
        return reached

    def _attend(
        self,
        shared: dict[str, Tensor],
        alpha: dict[str, Tensor],
        valid: dict[str, Tensor],
        spans: dict[str, Tensor] | None,
        values: dict[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality what its tokens take of the others' values (B, heads, T, e), and how much each value counts."""
        near = self._near(spans, shared) if spans else None
        timed = {m: spans[m].mean(dim=-1).isfinite() for m in shared} if spans and self.mixed else None
        queries = {m: self._split(self.query(h)) for m, h in shared.items()}
        keys = {m: self._split(self.key(h)) for m, h in shared.items()}
        heard = {}
        for m in shared:
            others = [n for n in shared if n != m]
            pool_valid = torch.cat([valid[n] for n in others], dim=1)
            weight = torch.cat([alpha[n] for n in others], dim=1).where(pool_valid, 0.0)
            between = (near[m], torch.cat([near[n] for n in others], dim=-2)) if near else None
            if between and timed:
                between, pool = _as_average(between, torch.cat([timed[n] for n in others]), pool_valid)
            elif self.null is not None:
                pool = _log_pool(pool_valid, between)
            answer = attend(
                queries[m],
                torch.cat([keys[n] for n in others], dim=2),
                torch.cat([values[n] for n in others], dim=2),
                weight,
                between,
                None if self.null is None else self.null[:, None] + pool,
            )
            heard[m] = answer, weight
        return heard

    def _gate(self, alpha: Tensor, valid: Tensor, pool: Tensor) -> Tensor:
        """How much of its answer each token takes: (B, T), nothing where there is no pool."""
        hears = valid & (pool > 0).any(dim=1, keepdim=True)
        if self.training and self.drop_answer:
            hears = hears & (torch.rand_like(alpha[:, :1]) >= self.drop_answer)
        return alpha.where(hears, 0.0)

    def _near(self, spans: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Tensor]:
        near = {m: self.nearness(spans[m]) for m in shared}
        if any(x.ndim > 3 for x in near.values()):
            return {m: x.expand(len(shared[m]), -1, -1, -1) for m, x in near.items()}
        return near

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _nearness(near: Near) -> Tensor:
    """n of every query and key, ([B,] h, Tq, Tk), as float32 at least."""
    nearness = near[0] @ near[1].mT
    return nearness.to(torch.promote_types(nearness.dtype, torch.float32))


def _as_average(near: Near, timed: Tensor, valid: Tensor) -> tuple[Near, Tensor]:
    """Nearness in which keys without a time count as the average one that has a time, and the log of sum_j e^n[j].

    near: (h, Tq, e) and (h, Tk, e); timed: (Tk,); valid: (B, Tk) -> coordinates (B, h, Tq, e + 1) and
    (B, h, Tk, e + 1); (B, h, Tq). n is 0 in clips where no key has a time.
    """
    known = valid & timed
    nearness = _nearness(near).masked_fill(~timed, -math.inf)
    most = nearness.amax(dim=-1, keepdim=True)
    most = most.where(most.isfinite(), 0.0).detach()
    average = _log_sum(nearness, known, most) - known.sum(dim=1).clamp(min=1).log()[:, None, None]
    average = average.where(known.any(dim=1)[:, None, None], 0.0)
    batch, heads, length = average.shape
    more = (~timed).to(near[1].dtype)[:, None].expand(batch, heads, -1, -1)
    query = torch.cat([near[0].expand(batch, -1, length, -1), average.to(near[0].dtype)[..., None]], dim=-1)
    key = torch.cat([near[1].expand(batch, -1, -1, -1), more], dim=-1)
    return (query, key), average + valid.sum(dim=1).clamp(min=1).log()[:, None, None]


def _log_pool(valid: Tensor, near: Near | None) -> Tensor:
    """Log of sum_j e^n[j], all that a head could hear: valid (B, Tk) -> (B, h, Tq), or (B, 1, 1) without nearness."""
    if near is None:
        return valid.sum(dim=1).clamp(min=1).log()[:, None, None]
    nearness = _nearness(near)
    most = near[0].square().sum(dim=-1, keepdim=True).to(nearness.dtype).detach()  # at the query's own instant
    return _log_sum(nearness, valid, most)


def _log_sum(nearness: Tensor, valid: Tensor, most: Tensor) -> Tensor:
    """Log of sum_j e^n[j] over valid keys: ([B,] h, Tq, Tk), (B, Tk), ([B,] h, Tq, 1) -> (B, h, Tq).

    most: about the largest n. No tensor of all queries, keys and clips is made where clips have the same times.
    """
    dims = "bhqk,bk->bhq" if nearness.ndim == 4 else "hqk,bk->bhq"
    total = torch.einsum(dims, (nearness - most).exp(), valid.to(nearness.dtype))
    return total.clamp(min=FARTHEST).log() + most.squeeze(-1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    near: Near | None = None,
    null: Tensor | None = None,
) -> Tensor:
    """Attention in which key j counts weight[j] times: softmax(q k / sqrt(d) + near_q near_k + log weight) v.

    query: (B, h, Tq, d); key: (B, h, Tk, d); value: (B, h, Tk, any); weight: (B, Tk) >= 0; near: ([B,] h, Tq, e) and
    ([B,] h, Tk, e); null: (B, h or 1, Tq or 1), logit of one more key of value 0. A row of zeros gives a finite,
    meaningless result: the caller drops it. All biases travel as more coordinates of query and key: an additive mask
    with a gradient would rule out the fused attention kernels.
    """
    batch, heads, length, width = query.shape
    root, taken = width**0.5, value.shape[-1]
    bias = torch.where(weight > 0, weight.clamp(min=SMALLEST).log(), REFUSED).to(key.dtype)
    more_query = [query, query.new_full((*query.shape[:3], 1), root)]
    more_key = [key, bias[:, None, :, None].expand(-1, heads, -1, -1)]
    if near is not None:
        more_query.append(root * near[0].to(query.dtype).expand(batch, -1, -1, -1))
        more_key.append(near[1].to(key.dtype).expand(batch, -1, -1, -1))
    if null is not None:
        more_query.append(root * null.to(query.dtype)[..., None].expand(-1, heads, length, -1))
    query, key = torch.cat(more_query, dim=-1), torch.cat(more_key, dim=-1)
    if null is not None:  # a key of its own, which the query's last coordinate speaks to, and it alone
        key = F.pad(F.pad(key, (0, 1)), (0, 0, 0, 1)) + F.pad(
            key.new_ones(1, 1), (query.shape[-1] - 1, 0, key.shape[2], 0)
        )
        value = F.pad(value, (0, 0, 0, 1))
    value = F.pad(value, (0, query.shape[-1] - taken))  # the fused kernels want one head size
    return F.scaled_dot_product_attention(query, key, value, scale=1 / root)[..., :taken]
