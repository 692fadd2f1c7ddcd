"""Basin embedding: each symbol is a point of the probability simplex, and the network reads its sphere coordinates.

A row of logits becomes p = softmax(logits), a basin coordinate; sqrt(p) is its isometric image on the unit sphere
(so that Euclidean geometry there is Fisher-Rao geometry, ``geometry.py``), which a linear map takes to the width.
The softmax is dense: every coordinate always has a gradient, unlike the sparse Euclidean projection.

It embeds symbols, not texts; the basin of a text is ``M8Kernel``'s read-out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LOGIT_STD = 1.5  # spread of fresh rows: mean pairwise Fisher-Rao distance about 1.9, far from 0 and from pi


class BasinEmbedding(nn.Module):
    """``vocab`` points of the simplex of ``basin_dim`` outcomes, projected to ``width``; output rows have RMS 1."""

    def __init__(self, vocab: int, basin_dim: int = 64, width: int = 64, generator: torch.Generator | None = None):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(vocab, basin_dim, generator=generator) * _LOGIT_STD)
        self.projection = nn.Parameter(torch.randn(width, basin_dim, generator=generator) / math.sqrt(basin_dim))

    def basins(self) -> Tensor:
        """All basin coordinates [V, basin_dim], each row a distribution."""
        return torch.softmax(self.logits, dim=-1)

    def table(self) -> Tensor:
        """All embeddings [V, width]: RMS-normalised projection of the centred sphere coordinates."""
        roots = torch.exp(0.5 * F.log_softmax(self.logits, dim=-1))  # sqrt(p) without underflow, [V, 64]
        # The barycentre is common to all symbols and carries nothing; what is left tells them apart.
        projected = (roots - roots.mean(dim=0)) @ self.projection.T  # [V, D]
        return F.rms_norm(projected, projected.shape[-1:])

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, width]."""
        return F.embedding(ids, self.table())
