"""A sum tree: numbers under indices, drawn in proportion to their size in O(log n).

The data structure of prioritised experience replay (Schaul et al. 2016, arXiv 1511.05952, appendix B.2.1): the leaves
of a binary tree hold the values, every inner node the sum of its two children. A point in [0, total) leads from the
root to the leaf whose share of the line it lies in.

An inner node is always added up from its children and never corrected by a difference. So the tree is a pure function
of its leaves: a tree that is rebuilt from saved values draws exactly what the old one would have drawn.

Not here: what the values mean (``priorities``).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


class SumTree:
    """``capacity`` values >= 0, all zero at first. Used by one thread at a time."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"a sum tree needs room for at least one value, got {capacity}")
        self.capacity = capacity
        self._leaves = 1 << (capacity - 1).bit_length()
        self._nodes: npt.NDArray[np.float64] = np.zeros(2 * self._leaves)  # root at 1, children of i at 2i and 2i + 1

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(self._nodes[1])

    def __getitem__(self, index: int) -> float:
        self._check(index)
        return float(self._nodes[self._leaves + index])

    def __setitem__(self, index: int, value: float) -> None:
        self._check(index)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"a value must be a finite number, at least 0; got {value}")
        nodes, node = self._nodes, self._leaves + index
        nodes[node] = value
        while node > 1:
            node //= 2
            nodes[node] = nodes[2 * node] + nodes[2 * node + 1]

    def find(self, point: float) -> int:
        """The index whose share holds ``point`` in [0, total). Raises ``ValueError`` outside, or when all is zero."""
        if not 0 <= point < self.total:
            raise ValueError(f"the point {point} is outside [0, {self.total})")
        nodes, node = self._nodes, 1
        while node < self._leaves:
            node *= 2
            # Rounding can leave a remainder beyond the left sum while the right side is empty: stay on the left then.
            if point >= nodes[node] and nodes[node + 1] > 0:
                point -= float(nodes[node])
                node += 1
        return node - self._leaves

    def check_invariants(self) -> None:
        """Every inner node is the sum of its children; what lies beyond the capacity is zero."""
        nodes, half = self._nodes, self._leaves
        assert bool((nodes >= 0).all() and np.isfinite(nodes).all())
        assert bool((nodes[1:half] == nodes[2 : 2 * half : 2] + nodes[3 : 2 * half : 2]).all())
        assert not nodes[half + self.capacity :].any()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.capacity:
            raise IndexError(f"index {index} is outside a sum tree of {self.capacity}")
