"""A deterministic embedding that needs no model: the share of each letter pair, hashed into a few dimensions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from memory.embedding import Matrix, unit_rows


class Letters:
    """Texts with the same letters are near each other. ``embed`` counts what it was given in ``seen``."""

    def __init__(self, dimension: int = 32, name: str = "letters", floor: float = 0.2):
        self.dimension, self.name, self.floor = dimension, name, floor
        self.seen: list[str] = []

    def embed(self, texts: Sequence[str]) -> Matrix:
        """[N, E], rows of length 1."""
        self.seen += texts
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for pair in zip(text.lower(), text.lower()[1:], strict=False):
                row[zlib.crc32("".join(pair).encode()) % self.dimension] += 1
        return unit_rows(rows - rows.mean(axis=1, keepdims=True))
