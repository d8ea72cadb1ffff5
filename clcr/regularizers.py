"""Regularisers: flows that are meant to differ must not say the same (CLCR, sec. Objective).

    L_intra  private flows of different modalities, and private against shared of one modality, at one level
    L_pr     private flows of one modality at different levels
    L_sp     shared flow at one level against private flow of the same modality at another level
    L_mix    sum over level pairs of omega[l] omega[k] * incompatibility(l, k)
    L_align  ours, off by default: 1 - CKA of the shared flows of two modalities before the exchange, at one level

The measure is debiased linear CKA of the pooled summaries, one row per present sample: about 0 for independent flows
and 1 for identical ones at any width. (The whitened cross-correlation, kept for comparison, hardly tells them apart at
usual batch sizes.) L_intra, L_pr and L_sp are means over their pairs, so their weights mean the same at any K and M.

Rows come from all workers, gathered with gradient: every worker has the same value, and averaging the gradients of the
workers - what DistributedDataParallel does - gives the gradient of a single process with all rows.
"""

from functools import reduce
from itertools import combinations, permutations
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clcr.config import Correlation, LossConfig
from clcr.precision import without_autocast

SHRINKAGE = 0.1  # of the covariances that are whitened
EPSILON = 1e-8
FEWEST_ROWS = 4  # the debiased estimate is undefined below

Flow = tuple[int, int, int]  # 0 shared or 1 private, level, modality
Pair = tuple[Flow, Flow]


def debiased_cka(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Debiased linear CKA of standardised rows, batched: x, y (..., n, d); mask (..., n) -> (...).

    The debiased estimate is the cosine of the two U-centred Gram matrices (Szekely and Rizzo; Song et al.); it may be
    slightly negative. Zero where fewer than four rows are in the mask.
    """
    return _cosine(_centred_gram(x, mask), _centred_gram(y, mask), mask)


def whitened_correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Squared Frobenius norm, per dimension, of the cross-correlation of whitened rows; shapes as debiased_cka."""
    return _cross_correlation(_whitened_rows(x, mask), _whitened_rows(y, mask), mask)


def _cosine(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Cosine of two Gram matrices (..., n, n), zero where fewer than four rows are in the mask."""
    norm = (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).clamp(min=EPSILON).sqrt()
    return ((a * b).sum((-2, -1)) / norm).where(mask.sum(-1) >= FEWEST_ROWS, 0.0)


def _cross_correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Squared norm of x^T y / n per dimension of whitened rows (..., n, d), zero where there are fewer than four."""
    cross = x.mT @ y / mask.sum(-1).clamp(min=1)[..., None, None]
    return (cross.square().sum((-2, -1)) / x.shape[-1]).where(mask.sum(-1) >= FEWEST_ROWS, 0.0)


def _whitened_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Standardised rows, whitened by the Cholesky factor of their shrunk covariance."""
    x = _standardised_rows(x, mask)
    n = mask.sum(-1).clamp(min=1)[..., None, None]
    eye = SHRINKAGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    factor, _ = torch.linalg.cholesky_ex((1 - SHRINKAGE) * x.mT @ x / n + eye)  # without asking the device for errors
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT


def _standardised_rows(x: Tensor, mask: Tensor) -> Tensor:
    mask = mask[..., None]
    n = mask.sum(-2, keepdim=True).clamp(min=1)
    x = x.where(mask, 0.0)
    x = (x - x.sum(-2, keepdim=True) / n).where(mask, 0.0)
    return x / (x.square().sum(-2, keepdim=True) / n + EPSILON).sqrt()


def _centred_gram(x: Tensor, mask: Tensor) -> Tensor:
    """Gram matrix per feature, U-centred: zero diagonal, and off it every row sums to zero."""
    rows = _standardised_rows(x, mask)
    gram = rows @ rows.mT / x.shape[-1]
    pairs = mask[..., :, None] & mask[..., None, :] & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=x.device)
    gram = gram.where(pairs, 0.0)
    n = mask.sum(-1).clamp(min=FEWEST_ROWS)[..., None, None]
    sums = gram.sum(-1, keepdim=True)
    total = sums.sum(-2, keepdim=True)
    return (gram - (sums + sums.mT) / (n - 2) + total / ((n - 1) * (n - 2))).where(pairs, 0.0)


MEASURES = {"cka": (_centred_gram, _cosine), "whitened": (_whitened_rows, _cross_correlation)}


def gather_rows(rows: Tensor, mask: Tensor, even: bool = True) -> tuple[Tensor, Tensor]:
    """Rows (B, ...) and their mask (B, ...) of all workers, with gradient.

    Unequal batches are padded on the CPU; on another device, which would have to be asked, only where they are not even
    (every worker gives as many rows, as the loaders see to for clips).
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows, mask
    from torch.distributed.nn.functional import all_gather  # exists only where torch was built with distributed

    if rows.device.type == "cpu" or not even:
        largest = torch.tensor(len(rows), device=rows.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        missing = int(largest) - len(rows)
        rows = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, missing])
        mask = F.pad(mask, [0, 0] * (mask.ndim - 1) + [0, missing])
    masks = [torch.empty_like(mask, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(masks, mask.to(torch.uint8))
    return torch.cat(all_gather(rows.contiguous())), torch.cat(masks).bool()


def incompatibility(summaries: Tensor) -> Tensor:
    """1 - cos between the shared summaries of every two levels, at least 0, detached: (B, K, d) -> (B, K, K)."""
    unit = F.normalize(summaries.detach().float(), dim=-1)
    return (1 - unit @ unit.mT).clamp(min=0)


class Rows(NamedTuple):
    """What is compared: shared, private, own (shared before the exchange) and mixed (of L_mix), (B, K, M, d) each."""

    shared: Tensor
    private: Tensor
    own: Tensor
    mixed: Tensor


def regularizers(rows: Rows, omega: Tensor, present: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The weighted regularisers of a batch. omega: (B, N, K) level weights per task; present: (B, M)."""
    if config.lambda_intra == config.lambda_inter == config.align == 0:
        return {}
    levels, modalities, width = rows.shared.shape[1:]
    kinds = rows[:3] if config.align else rows[:2]
    with without_autocast(omega):
        mix = _mixing(rows.mixed, omega, present)
        flat = torch.cat([*(x.float().flatten(1) for x in kinds), mix[:, None]], dim=1)
        flat, present = gather_rows(flat, present)
        flows = flat[:, :-1].reshape(len(flat), len(kinds), levels, modalities, width)
        mix = (flat[:, -1] * present.any(dim=1)).sum() / present.any(dim=1).sum().clamp(min=1)
        losses = _dependence(flows, present, _pairs(levels, modalities), config.correlation)
        aligned = {"align": config.align * _apart(flows[:, 2], present)} if config.align else {}
    return aligned | {
        "intra": config.lambda_intra * losses["intra"],
        "inter_private": config.lambda_inter * config.pr * losses["inter_private"],
        "inter_shared_private": config.lambda_inter * config.sp * losses["inter_shared_private"],
        "inter_mix": config.lambda_inter * config.mix * mix,
    }


def _apart(own: Tensor, present: Tensor) -> Tensor:
    """1 - CKA between modalities, mean over levels and pairs; own: (n, K, M, d)."""
    by_modality = own.permute(2, 1, 0, 3)  # (M, K, n, d)
    pairs = combinations(range(len(by_modality)), 2)
    found = [debiased_cka(by_modality[m], by_modality[n], present[:, m] & present[:, n]) for m, n in pairs]
    return 1 - torch.stack(found).mean()


def _pairs(levels: int, modalities: int) -> dict[str, list[Pair]]:
    """Which two flows each term compares."""
    shared, private = 0, 1
    ks, ms = range(levels), range(modalities)
    intra = [((private, k, m), (private, k, n)) for k in ks for m, n in combinations(ms, 2)]
    intra += [((private, k, m), (shared, k, m)) for k in ks for m in ms]
    return {
        "intra": intra,
        "inter_private": [((private, j, m), (private, k, m)) for j, k in combinations(ks, 2) for m in ms],
        "inter_shared_private": [((shared, j, m), (private, k, m)) for j, k in permutations(ks, 2) for m in ms],
    }


def _mixing(shared: Tensor, omega: Tensor, present: Tensor) -> Tensor:
    """L_mix of every sample (B,), mean over the tasks."""
    means = shared.where(present[:, None, :, None], 0.0).sum(dim=2) / present.sum(dim=1).clamp(min=1)[:, None, None]
    weights = torch.einsum("bnl,bnk->blk", omega, omega) / omega.shape[1]
    return (weights * incompatibility(means)).triu(1).sum((1, 2))


def _dependence(
    flows: Tensor, present: Tensor, terms: dict[str, list[Pair]], correlation: Correlation
) -> dict[str, Tensor]:
    """Mean dependence over the pairs of each term; flows: (n, 2, K, M, d). Below zero there is nothing left to remove.

    A flow is in many pairs: what a measure makes of it and the samples it is compared on is computed once.
    """
    represent, compare = MEASURES[correlation]
    pairs = [pair for term in terms.values() for pair in term]
    on = [frozenset({m, n}) for (*_, m), (*_, n) in pairs]  # a pair is compared on the samples that have both
    places = {key: i for i, key in enumerate(dict.fromkeys((f, o) for p, o in zip(pairs, on, strict=True) for f in p))}
    rows = torch.stack([flows[:, kind, level, m] for (kind, level, m), _ in places])
    mask = torch.stack([reduce(torch.logical_and, [present[:, m] for m in sorted(both)]) for _, both in places])
    found = represent(rows, mask)
    left, right = ([places[pair[side], both] for pair, both in zip(pairs, on, strict=True)] for side in (0, 1))
    values = compare(_rows(found, left), _rows(found, right), _rows(mask, left)).clamp(min=0)
    # A single level has no inter-level pairs, and a mean of nothing is NaN.
    sizes = [len(term) for term in terms.values()]
    return {name: value.sum() / max(1, len(value)) for name, value in zip(terms, values.split(sizes), strict=True)}


def _rows(stacked: Tensor, which: list[int]) -> Tensor:
    """Some of its first axis. A list as an index would be copied to the device, which waits for it."""
    parts = stacked.unbind()
    return torch.stack([parts[i] for i in which])
