"""A text as a point of a simplex: the distribution of its character n-grams.

The n-grams of a text (3 to 5 bytes, lower case, white space collapsed) are counted in hashed buckets; their relative
frequencies are a distribution, and distributions are compared by Fisher-Rao distance. That geometry of documents is
Lafferty and Lebanon's, "Diffusion Kernels on Statistical Manifolds" (JMLR 6, 2005): the multinomial simplex.

Why not the kernels' own basins? They are read where a kernel decides on its action, so they tell its own actions
apart and lump foreign texts in with them: ``benchmarks/kernel_parts/routing.py`` measures both. This basin needs no
network, is the same for every kernel, and exists before a kernel has been trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

#: Outcomes of the distribution; a power of two.
DIMENSIONS = 4096
LENGTHS = (3, 4, 5)
#: Bytes of a text that are looked at: its beginning says enough, and a request stays cheap.
MOST_BYTES = 2048


def text_basins(texts: Sequence[str]) -> Tensor:
    """Basins [N, DIMENSIONS], float32 distributions. A text without n-grams is the uniform distribution."""
    counts = torch.zeros(len(texts), DIMENSIONS)
    for row, text in enumerate(texts):
        buckets = _buckets(text)
        counts[row] = torch.bincount(torch.tensor(buckets, dtype=torch.int64), minlength=DIMENSIONS).float()
        if not buckets:
            counts[row] = 1.0
    return counts / counts.sum(dim=1, keepdim=True)


def _buckets(text: str) -> list[int]:
    words = " ".join(text.lower().split())
    if not words:
        return []
    data = f" {words} ".encode("utf-8", errors="replace")[:MOST_BYTES]
    return [
        zlib.crc32(data[start : start + length]) % DIMENSIONS
        for length in LENGTHS
        for start in range(len(data) - length + 1)
    ]
