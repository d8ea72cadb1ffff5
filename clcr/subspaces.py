"""Shared and private subspaces on the Stiefel manifold (CLCR, sec. IntraCED).

    U_sh[l] (d, k_s), U_pr[l,m] (d, k_p),   U_sh^T U_sh = I,  U_pr^T U_pr = I,  U_sh^T U_pr = 0

One shared basis per level for all modalities, one private basis per level and modality. Orthogonality holds by
construction at every step: the bases are the Q of a QR decomposition of unconstrained [W_sh, W_m]. Its first k_s
columns depend on W_sh alone, so all modalities of a level get the same shared basis.

h U are the coordinates of a token in a subspace. Coordinates in different bases must never be added or compared:
lift them back to R^d by U^T first.
"""

import torch
from torch import Tensor, nn

from clcr.precision import without_autocast


class Subspaces(nn.Module):
    """The bases of one level. shared: W_sh (d, k_s); private: W_m (M, d, k_p)."""

    undecayed = ("shared", "private")  # Q does not depend on their size: decay would only speed up their rotation

    def __init__(self, modalities: int, width: int, k_shared: int, k_private: int) -> None:
        super().__init__()
        # Start on the manifold (R = I): the QR of a random square matrix may be almost singular.
        shared, _ = torch.linalg.qr(torch.randn(width, k_shared))
        private = torch.randn(modalities, width, k_private)
        private, _ = torch.linalg.qr(private - shared @ (shared.T @ private))
        self.shared = nn.Parameter(shared)
        self.private = nn.Parameter(private)

    def forward(self) -> tuple[Tensor, Tensor]:
        """-> U_sh (d, k_s) and U_pr (M, d, k_p), float32 whatever the autocast dtype."""
        with without_autocast(self.shared):  # QR has no half-precision kernel
            shared = self.shared.expand(len(self.private), -1, -1)
            bases = orthonormalise(torch.cat([shared, self.private], dim=-1).float())
        k_shared = self.shared.shape[1]
        return bases[0, :, :k_shared], bases[:, :, k_shared:]


class WholeSpace(nn.Module):
    """No subspaces (ablation): both flows of a token are the token itself."""

    identity: Tensor  # a buffer

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.register_buffer("identity", torch.eye(width), persistent=False)
        self.modalities = modalities

    def forward(self) -> tuple[Tensor, Tensor]:
        """-> I (d, d) and I (M, d, d)."""
        return self.identity, self.identity.expand(self.modalities, -1, -1)


def orthonormalise(weight: Tensor) -> Tensor:
    """Q of the QR decomposition with R's diagonal positive: (..., d, k) -> (..., d, k).

    LAPACK leaves the signs of R's diagonal open; without fixing them columns of Q flip from step to step.
    """
    q, r = torch.linalg.qr(weight)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * signs[..., None, :]
