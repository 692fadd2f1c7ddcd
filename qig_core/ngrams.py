"""Hashed byte-n-gram embeddings: letters in their words, looked up instead of computed.

Byte Latent Transformer (Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1): the n bytes that end at a position are
hashed into a table, and the rows found for several n are added to the byte's own embedding. A row costs one lookup
however large the table is: parameters without arithmetic, which is what a kernel on a CPU is short of.

Rows begin at zero, so an n-gram never seen in training says nothing. Collisions are accepted. An n-gram that would
reach back before the first id is left out. Causal: only ids up to the position are hashed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (2, 3, 4, 5, 6)
#: How many ids before a position its embedding depends on.
LOOK_BACK = max(SIZES) - 1
_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that multiplication modulo 2^64 loses nothing (xorshift64*)


class NgramEmbedding(nn.Module):
    """``buckets`` rows shared by all sizes; row 0 is for n-grams that are not complete, and stays zero."""

    def __init__(self, buckets: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, width))

    def rows(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> table rows [B, T, len(SIZES)]; 0 where the n-gram reaches back before the first id."""
        buckets = len(self.table)
        code, found = ids + 1, []
        for back in range(1, LOOK_BACK + 1):
            code = code * _MULTIPLIER + F.pad(ids + 1, (back, 0))[:, : ids.shape[1]]  # wraps modulo 2^64
            if back + 1 in SIZES:
                mixed = (code ^ (code >> 29)) * _MULTIPLIER
                row = ((mixed >> 17) & 0x7FFFFFFF) % (buckets - 1) + 1
                found.append(row * (torch.arange(ids.shape[1], device=ids.device) >= back))
        return torch.stack(found, dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, width], the sum over the sizes."""
        return F.embedding_bag(self.rows(ids).flatten(0, 1), self.table, mode="sum", padding_idx=0).view(
            *ids.shape, self.table.shape[1]
        )
