"""A fast linear path: what the words of the observation say at once, before any recursion.

A recursion learns what cannot be looked up, and it learns slowly. Much of what a kernel is asked can be looked up:
some n-grams of the observation speak for some actions. So a kernel may have, next to its recursion, a linear
associative memory, and its logits are the sum of both:

    b    = norm(sum over the n-grams g of the observation of E[h(g)])               a bag of hashed n-grams
    l_t += O (b * V[h(the action so far)] + U[h(the action so far)])                [V]

The bag is that of fastText (Joulin et al. 2016, arXiv 1607.01759) over bytes instead of words: the sizes 2 to 5, with
ASCII letters in lower case and the marks at both ends. V is what makes it linear in the bag and yet different at every
byte of the action: each beginning of an action reads the bag in its own way, so every branching of a set of actions
is a linear classifier of its own, of rank ``dim``. Collisions are accepted.

O begins at zero: a fresh kernel answers as if the path were not there. Causal: only ids up to a position enter its
logits, and up to SEP there are none. ``recall`` and ``follow`` read on where an earlier text stopped
(``incremental``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qig_core.forest import Forest
from qig_core.vocabulary import PAD, SEP, VOCAB_SIZE

SIZES = (2, 3, 4, 5)
BUCKETS = 32_768
PREFIX_ROWS = 4096
#: The path is linear and its rows are met rarely, so it bears, and needs, larger steps than the recursion.
LR_FACTOR = 2.5
_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that multiplication modulo 2^64 loses nothing (xorshift64*)
_TABLE_SCALE = 0.1


@dataclass(frozen=True)
class Recall:
    """Where texts stopped. Rows that have not come to SEP yet are silent."""

    bag: Tensor  # [B, d]
    code: Tensor  # [B] of the action so far
    place: Tensor  # [B] ids from SEP on, SEP included; 0 before

    def take(self, rows: Tensor) -> Recall:
        """Some of the rows."""
        return Recall(self.bag[rows], self.code[rows], self.place[rows])


class Association(nn.Module):
    """``dim``: rank of the path."""

    def __init__(self, dim: int, generator: torch.Generator):
        super().__init__()
        self.table = nn.Parameter(torch.randn(BUCKETS, dim, generator=generator) * _TABLE_SCALE)
        self.gate = nn.Parameter(torch.randn(PREFIX_ROWS, dim, generator=generator))
        self.prior = nn.Parameter(torch.zeros(PREFIX_ROWS, dim))
        self.out = nn.Linear(dim, VOCAB_SIZE, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T], padded right -> logits to add [B, T, V]; zero before SEP."""
        start = Recall(self._bag(ids), *ids.new_zeros(2, len(ids)).unbind())
        return self._logits(start, *_codes(start, ids))

    def recall(self, ids: Tensor) -> Recall:
        """Where ids [B, T], padded right, stop."""
        start = Recall(self._bag(ids), *ids.new_zeros(2, len(ids)).unbind())
        code, place = _codes(start, ids)
        return Recall(start.bag, code[:, -1], place[:, -1])

    def after(self, recall: Recall) -> Tensor:
        """Logits [B, V] of what follows the texts."""
        return self._logits(recall, recall.code[:, None], recall.place[:, None]).squeeze(1)

    def follow(self, recall: Recall, ids: Tensor) -> tuple[Tensor, Recall]:
        """Logits [B, L, V] after each of the ids [B, L] that follow, which bring no SEP, and where they stop."""
        code, place = _codes(recall, ids)
        return self._logits(recall, code, place), Recall(recall.bag, code[:, -1], place[:, -1])

    def beside(self, recall: Recall, forest: Forest) -> Tensor:
        """Logits [B, G, Q, V] after every node of a forest of candidate actions that follow the texts."""
        code, place = _codes(Recall(recall.bag, recall.code[:, None], recall.place[:, None]), forest.texts[None])
        chosen = (slice(None), forest.source, forest.depth)  # [B, C, L] -> [B, G, Q]
        logits = self._logits(recall, code[chosen].flatten(1), place[chosen].flatten(1))
        return logits.view(len(logits), *forest.source.shape, -1)

    def _logits(self, recall: Recall, code: Tensor, place: Tensor) -> Tensor:
        """code, place [B, L] -> [B, L, V]."""
        rows = _row(code + place, PREFIX_ROWS)
        read = F.embedding(rows, self.gate) * recall.bag.unsqueeze(1) + F.embedding(rows, self.prior)
        return self.out(read * (place > 0).unsqueeze(-1))  # type: ignore[no-any-return]

    def _bag(self, ids: Tensor) -> Tensor:
        """The normed sum of the rows of all n-grams that end at or before SEP: [B, d]."""
        lower = torch.where((ids >= 65) & (ids <= 90), ids + 32, ids) + 1
        observed = (ids == SEP).cumsum(dim=1).cumsum(dim=1) <= 1  # up to SEP, and SEP itself
        code, rows, counts = lower, [], []
        for back in range(1, max(SIZES)):
            code = code * _MULTIPLIER + F.pad(lower, (back, 0))[:, : ids.shape[1]]  # wraps modulo 2^64
            rows.append(_row(code + back, BUCKETS))
            counts.append(observed & (ids != PAD) & (torch.arange(ids.shape[1], device=ids.device) >= back))
        weights = torch.cat(counts, dim=1).to(self.table.dtype)  # [B, 4 T]
        total = F.embedding_bag(torch.cat(rows, dim=1), self.table, mode="sum", per_sample_weights=weights)
        return F.rms_norm(total, total.shape[-1:])


def _codes(start: Recall, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Code and place after each of ids [B, ..., L]: a polynomial hash as a running sum, SEP being its first id.

    The codes and places of ``start`` have the shape of ids without the last dimension, or broadcast against it.
    """
    told = (ids == SEP).cumsum(dim=-1) + (start.place > 0)[..., None] > 0
    counted = told & (ids != PAD)
    place = start.place[..., None] + counted.cumsum(dim=-1)
    # The power of a place is an odd number that looks random, so no order of bytes is lost.
    power = (place * _MULTIPLIER ^ (place << 7)) * _MULTIPLIER | 1
    return start.code[..., None] + ((ids + 1) * power * counted).cumsum(dim=-1), place


def _row(code: Tensor, rows: int) -> Tensor:
    mixed = (code ^ (code >> 29)) * _MULTIPLIER
    return ((mixed >> 17) & 0x7FFFFFFF) % rows
