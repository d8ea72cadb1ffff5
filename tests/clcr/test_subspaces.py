"""Shared and private bases: orthonormal by construction, whatever the optimizer does."""

import pytest
import torch

from clcr.subspaces import Subspaces, orthonormalise


def worst_error(u_sh, u_pr):
    own = u_pr.mT @ u_pr - torch.eye(u_pr.shape[2])
    cross = torch.einsum("dk,mdp->mkp", u_sh, u_pr)
    return max((u_sh.T @ u_sh - torch.eye(u_sh.shape[1])).abs().max(), own.abs().max(), cross.abs().max())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("autocast", [False, True])
def test_bases_stay_orthonormal_while_they_are_trained(optimizer, autocast):
    subspaces = Subspaces(3, 32, 16, 16)
    optimizer = optimizer(subspaces.parameters(), lr=0.05)
    start, target = subspaces()[1].detach(), torch.randn(64, 32)
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            u_sh, u_pr = subspaces()
            loss = (target @ u_sh).float().square().mean() - (target @ u_pr[0]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert u_sh.dtype == torch.float32
        assert worst_error(u_sh, u_pr) <= 1e-5
    assert (subspaces()[1] - start).abs().max() > 1e-2  # they did move


def test_all_modalities_get_the_same_shared_basis():
    subspaces = Subspaces(2, 24, 8, 10)
    stacked = torch.cat([subspaces.shared.expand(2, -1, -1), subspaces.private], dim=-1)
    first, second = orthonormalise(stacked)[..., :8]
    assert torch.allclose(first, second, atol=1e-6)


def test_a_small_step_never_flips_a_column():
    weight = torch.randn(40, 20)
    flips = 0
    for _ in range(200):
        before = orthonormalise(weight)
        weight = weight + 1e-3 * torch.randn_like(weight)
        flips += ((before * orthonormalise(weight)).sum(0) < 0).sum().item()
    assert flips == 0
