"""Keys and values of several sequences in one tensor for each layer, so that one product is the attention of all.

A row alone takes a handful of calls for each layer, most of whose time is not spent on its few hundred tokens. Rows
that lie beside each other in one tensor are attended in two products, with a mask for what each does not see
(``packed.packed_rows``). The price is padding: all are attended over as many tokens as the longest of them has.
``chosen`` weighs that anew in each pass.

Nothing depends on it: a sequence that finds no place, that outgrows its place, whose layer slides, or whose keys were
replaced has buffers of its own and attends alone.

Measured (one thread of an EPYC, 3 key-value heads of 3 queries, size 64, bfloat16, caches of 30 layers in turn,
microseconds for the attention of 8 rows in one layer, each alone by the quickest way | as one):
64 tokens 143 | 69, 144: 245 | 125, 240: 355 | 183, 512: 625 | 325, 1024: 838 | 570, 2000: 1283 | 1052. 2 rows of 240
tokens 66 | 68, 3: 103 | 84, 4: 138 | 112.

Shapes: R rows of a pass, S places beside each other, H key-value heads, G query heads for each of them, D head size.
"""

from __future__ import annotations

import heapq
import math
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workspace.packed import packed_rows

#: Tokens that a place has room for. Longer rows gain little, and their padding costs more.
TOKENS = 2048

# What attention takes, in the time in which one more token of a row is attended (0.063 microseconds where that was
# measured): of rows as one, the calls; of a row alone, the calls and each token, by the fused kernel and by products.
_TOGETHER = 600
_FUSED, _FUSED_TOKEN = 450, 1.5
_TWO = 800


class Slabs:
    """``count`` places for sequences of up to ``tokens`` tokens, on a CPU. May be used from several threads.

    A place is taken for all layers at once. Pages of memory are used when something is written to them, and all are
    given back when the last sequence has left.
    """

    def __init__(self, count: int, tokens: int = TOKENS):
        self.tokens = tokens
        self._lock = threading.RLock()  # the garbage collector may give a place back in the midst of anything
        self._count = count
        self._free = list(range(count))  # a heap: the lowest first, so that rows lie beside each other
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._used: dict[int, int] = {}  # tokens that the last sequence of a place has written

    def take(self) -> int | None:
        """A place, or None where all are taken."""
        with self._lock:
            return heapq.heappop(self._free) if self._free else None

    def give_back(self, place: int, used: int) -> None:
        """``place`` is free; up to ``used`` tokens were written to it."""
        with self._lock:
            heapq.heappush(self._free, place)
            self._used[place] = used
            if len(self._free) == self._count:
                self._layers.clear()
                self._used.clear()

    def part(self, layer: int, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """The keys and values of ``place``, each [1, H, tokens, D], for tensors like ``key`` and ``value``.

        None where there cannot be any. What a sequence left is wiped out: of a padded row everything is multiplied, if
        by zero, and zero times a number that is none would be felt.
        """
        with self._lock:
            if layer not in self._layers:
                try:
                    self._layers[layer] = self._made(key), self._made(value)
                except OSError:  # no room for it in the address space, or by the rules of this machine
                    return None
            parts = []
            for whole, like in zip(self._layers[layer], (key, value), strict=True):
                alike = whole.shape[1] == like.shape[1] and whole.shape[3] == like.shape[3]
                if not alike or whole.dtype != like.dtype or like.device.type != "cpu":
                    return None
                parts.append(whole[place : place + 1])
            for part in parts:
                part[:, :, : self._used.get(place, 0)].zero_()
        return parts[0], parts[1]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all places [count, H, tokens, D] in a layer where somebody has a place."""
        return self._layers[index]

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if places are free twice, or memory is held for nobody."""
        with self._lock:
            assert len(set(self._free)) == len(self._free) <= self._count
            assert len(self._free) < self._count or not (self._layers or self._used)

    def _made(self, like: Tensor) -> Tensor:
        """Zeros that take no memory until they are written to, which those of torch and numpy do not promise."""
        shape = self._count, like.shape[1], self.tokens, like.shape[3]
        size = math.prod(shape) * like.element_size()
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # with huge ones a first token would bring, and clear, two megabytes
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        with torch.inference_mode(mode=False):  # a tensor made there could not be written to elsewhere
            return torch.frombuffer(pages, dtype=like.dtype).view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rows of a pass that attend as one, and the places that are read for that; made for one pass."""

    rows: tuple[int, ...]
    alone: tuple[int, ...]  #: the others
    first: int  #: place
    span: int  #: places from there on, some of which may belong to nobody
    tokens: int  #: that are attended, by all
    hidden: Tensor  #: [S, 1, 1, tokens]: what is added to scores, 0 or minus infinity
    chosen: Tensor | None  #: indices of ``rows`` [len(rows)]; None where they are all rows of the pass
    spread: Tensor | None  #: [S]: which row's query each place takes; None where place and row are the same number
    gathered: Tensor | None  #: [len(rows)]: which place each row has, counted from ``first``; None as ``spread``
    _ends: Tensor  # [len(rows)]: where the new token goes in each place
    _places: Tensor  # [len(rows)]
    _targets: dict[int, Tensor] = field(default_factory=dict)

    def write(self, slab: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        """Put the new token's ``key`` and ``value`` [R, H, 1, D] of the rows behind the end of each."""
        heads, tokens = slab[0].shape[1:3]
        if heads not in self._targets:  # for most models the same in all layers
            lines = self._places[:, None] * heads + torch.arange(heads)
            self._targets[heads] = (lines * tokens + self._ends[:, None]).flatten()
        for whole, added in zip(slab, (key, value), strict=True):
            own = added if self.chosen is None else added.index_select(0, self.chosen)
            width = whole.shape[3]
            whole.view(-1, width).index_copy_(0, self._targets[heads], own.reshape(-1, width))

    def attend(self, slab: tuple[Tensor, Tensor], query: Tensor, scaling: float, sinks: Tensor | None = None) -> Tensor:
        """``query`` [R, H * G, 1, D] over what each of ``rows`` has: [len(rows), 1, H * G, D]."""
        keys, values = (whole.narrow(0, self.first, self.span).narrow(2, 0, self.tokens) for whole in slab)
        grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])  # [R, H, G, D]
        asked = grouped if self.spread is None else grouped.index_select(0, self.spread)
        out = packed_rows(asked, keys, values, self.hidden, scaling, sinks)
        own = out if self.gathered is None else out.index_select(0, self.gathered)
        return own.reshape(len(self.rows), 1, -1, own.shape[-1])


def chosen(places: Sequence[int], ends: Sequence[int], room: int) -> Group | None:
    """The rows whose attention is quicker as one than alone; None where there are none.

    ``places`` of the rows, -1 for one that has none; ``ends``: tokens that each holds, to which this pass adds one.
    """
    lengths = [end + 1 for end in ends]
    can = [row for row, place in enumerate(places) if place >= 0 and lengths[row] <= room]
    best, members = sum(map(_alone, lengths)), list[int]()
    for tokens in sorted({lengths[row] for row in can}):
        rows = [row for row in can if lengths[row] <= tokens]
        taken = [places[row] for row in rows]
        span = max(taken) - min(taken) + 1
        others = sum(_alone(length) for row, length in enumerate(lengths) if row not in rows)
        cost = _TOGETHER + span * tokens + others
        if len(rows) > 1 and cost < best:
            best, members = cost, rows
    return _group(places, lengths, members) if members else None


def _alone(length: int) -> float:
    return min(_FUSED + _FUSED_TOKEN * length, _TWO + length)


def _group(places: Sequence[int], lengths: Sequence[int], rows: Sequence[int]) -> Group:
    taken = [places[row] for row in rows]
    first, span = min(taken), max(taken) - min(taken) + 1
    tokens = max(lengths[row] for row in rows)
    of_place = {place - first: row for place, row in zip(taken, rows, strict=True)}
    seen = torch.tensor([lengths[of_place[place]] if place in of_place else 1 for place in range(span)])  # [S]
    hidden = torch.zeros(span, tokens).masked_fill_(torch.arange(tokens) >= seen[:, None], -math.inf)
    straight = span == len(places) and all(of_place.get(place) == place for place in range(span))
    return Group(
        rows=tuple(rows),
        alone=tuple(row for row in range(len(places)) if row not in rows),
        first=first,
        span=span,
        tokens=tokens,
        hidden=hidden[:, None, None],
        chosen=None if len(rows) == len(places) else torch.tensor(rows),
        spread=None if straight else torch.tensor([of_place.get(place, rows[0]) for place in range(span)]),
        gathered=None if straight else torch.tensor([place - first for place in taken]),
        _ends=torch.tensor([lengths[row] - 1 for row in rows]),
        _places=torch.tensor(taken),
    )
