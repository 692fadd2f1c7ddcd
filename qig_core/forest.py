"""Candidate actions as a forest: what they share is run once, and what they do not share fills few rows.

Candidates are sorted, so that neighbours begin alike, and packed into bins of about ``BIN_NODES`` nodes. Within a bin
they form a trie, a node for each byte: a node looks at its ancestors and at itself (tree attention, as in SpecInfer,
Miao et al. 2024, arXiv 2305.09781, figure 4). Bins are rows of one batch. Padding to the longest candidate is gone, a
common beginning costs once per bin, and attention stays within a bin.

Not here: the network (``incremental.py`` runs the nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qig_core.vocabulary import EOS

BIN_NODES = 64


@dataclass(frozen=True)
class Candidate:
    """The symbols of one action. ``ends``: EOS follows and is judged, too; not where the action was cropped."""

    ids: tuple[int, ...]
    ends: bool = True


@dataclass(frozen=True)
class Forest:
    """Make it with ``Forest.of``. G bins of Q nodes; nodes beyond a bin's own are padding that sees only itself."""

    count: int  # C candidates
    longest: int  # L symbols, EOS not counted
    texts: Tensor  # [C, L] their ids, zero after the end
    source: Tensor  # [G, Q] which text a node's byte is from
    depth: Tensor  # [G, Q] and at which index
    ancestors: Tensor  # [G, Q, Q] bool; row: a node; column: what it sees
    _first: Tensor  # [C] first symbol of each candidate
    _steps: tuple[Tensor, Tensor, Tensor]  # candidate, node (g * Q + q) and the symbol judged there, of every other one

    @classmethod
    def of(cls, candidates: Sequence[Candidate], device: torch.device | str = "cpu") -> Forest:
        """The forest of candidates, in any order and also twice; ``score`` answers in the given order."""
        longest = max(len(candidate.ids) for candidate in candidates)
        plot = _Plot(max(longest, BIN_NODES))
        for number in sorted(range(len(candidates)), key=lambda index: candidates[index].ids):
            plot.plant(number, candidates[number])
        size = max((len(nodes) for nodes in plot.bins), default=0)
        source = torch.zeros(len(plot.bins), size, dtype=torch.int64)
        depth, ancestors = torch.zeros_like(source), torch.eye(size, dtype=torch.bool).repeat(len(plot.bins), 1, 1)
        for g, planted in enumerate(plot.bins):
            for q, (number, index, parent) in enumerate(planted):
                source[g, q], depth[g, q] = number, index
                if parent is not None:
                    ancestors[g, q] |= ancestors[g, parent]
        steps = torch.tensor(
            [(number, g * size + q, symbol) for number, g, q, symbol in plot.steps], dtype=torch.int64
        ).view(-1, 3)
        texts = torch.tensor([[*c.ids, *([0] * (longest - len(c.ids)))] for c in candidates], dtype=torch.int64)
        first = torch.tensor([[*c.ids, EOS][0] for c in candidates])
        judged, nodes, symbols = (column.to(device) for column in steps.unbind(1))
        return cls(
            len(candidates),
            longest,
            texts.view(len(candidates), longest).to(device),
            source.to(device),
            depth.to(device),
            ancestors.to(device),
            first.to(device),
            (judged, nodes, symbols),
        )

    @property
    def nodes(self) -> int:
        """Positions to run for each row, padding included."""
        return self.source.numel()

    def score(self, first: Tensor, after: Tensor) -> Tensor:
        """Log-probabilities [B, C] from those before (first [B, V]) and after every node (after [B, G, Q, V])."""
        scores = first[:, self._first].double()  # [B, C]
        candidate, node, symbol = self._steps
        judged = after.flatten(1, 2)[:, node, symbol].double()  # [B, steps]
        return scores.index_add(1, candidate, judged)

    def check_invariants(self) -> None:
        """Depths grow by one along the ancestors, and every node sees exactly as many as its depth says."""
        assert torch.equal(self.ancestors.sum(-1)[self._real], self.depth[self._real] + 1)
        assert int(self.depth.max() if self.nodes else 0) < max(self.longest, 1)

    @property
    def _real(self) -> Tensor:
        """[G, Q] nodes that are not padding: those that somebody reads."""
        real = torch.zeros(self.nodes, dtype=torch.bool)
        real[self._steps[1].cpu()] = True
        return real.view_as(self.source).to(self.source.device)


class _Plot:
    """Builds the bins: nodes as (text, index, parent), and the steps to judge as (candidate, bin, node, symbol)."""

    def __init__(self, size: int):
        self.size = size
        self.bins: list[list[tuple[int, int, int | None]]] = []
        self.steps: list[tuple[int, int, int, int]] = []
        self._path: list[int] = []  # nodes of the candidate before, in the current bin
        self._ids: tuple[int, ...] = ()

    def plant(self, number: int, candidate: Candidate) -> None:
        """Add the next candidate in sorted order."""
        shared = 0
        while shared < min(len(self._path), len(candidate.ids)) and self._ids[shared] == candidate.ids[shared]:
            shared += 1
        if candidate.ids and (not self.bins or len(self.bins[-1]) + len(candidate.ids) - shared > self.size):
            self.bins.append([])
            self._path, shared = [], 0
        path = self._path[:shared]
        for index in range(shared, len(candidate.ids)):
            nodes = self.bins[-1]
            nodes.append((number, index, path[-1] if path else None))
            path.append(len(nodes) - 1)
        follows = [*candidate.ids[1:], EOS] if candidate.ends else list(candidate.ids[1:])
        bin_ = len(self.bins) - 1
        self.steps += [(number, bin_, node, symbol) for node, symbol in zip(path, follows, strict=False)]
        self._path, self._ids = path, candidate.ids
