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
tokens 66 | 68, 3: 103 | 84, 4: 138 | 112. Besides, a row alone takes 8 to get there and a group 10.

Shapes: R rows of a pass, S places beside each other, H key-value heads, G query heads for each of them, D head size.
"""

from __future__ import annotations

import heapq
import itertools
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workspace.packed import packed_rows

#: Tokens that a place has room for. Longer rows gain little, and their padding costs more.
TOKENS = 2048

# What attention takes, in the time in which one more token of a row is attended (0.063 microseconds where that was
# measured): of rows as one, the calls; of a row alone, the calls and each token, by the fused kernel and by products.
_TOGETHER = 870.0
_FUSED, _FUSED_TOKEN = 290, 2.1
_TWO = 840
_ANY = -1e9  # instead of the first: whatever it costs

#: Fewer rows of a pass than this attend alone. Up to four get what each would get alone, to the bit, where weights are
#: quantised: a seed gives the same answer beside others. With five the head's product changes, too (``quantised.py``).
FEWEST = 5

#: The attended tokens are a multiple of this: the products' kernels are compiled for each length, and kept.
_STEP = 32


class Lease:
    """A place in ``slabs``, for as long as somebody holds this object."""

    __slots__ = ("__weakref__", "place", "slabs")

    def __init__(self, slabs: Slabs, place: int):
        self.slabs, self.place = slabs, place


class Slabs:
    """``count`` places for sequences of up to ``tokens`` tokens, on a CPU. May be used from several threads.

    A place is taken for all layers at once. Pages of memory are used when something is written to them, and given back
    when the sequence leaves. ``forced``: rows attend as one wherever they can, not where it is worth it.
    """

    def __init__(self, count: int, tokens: int = TOKENS, *, forced: bool = False):
        self.tokens, self.forced = tokens, forced
        self._lock = threading.RLock()  # the garbage collector may give a place back in the midst of anything
        self._count = count
        self._free = list(range(count))  # a heap: the lowest first, so that rows lie beside each other
        self._layers: dict[int, tuple[_Whole, _Whole]] = {}  # keys and values

    def take(self) -> Lease | None:
        """A place, or None where all are taken."""
        with self._lock:
            if not self._free:
                return None
            lease = Lease(self, heapq.heappop(self._free))
        weakref.finalize(lease, self._give_back, lease.place).atexit = False
        return lease

    def part(self, layer: int, place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """The keys and values of ``place``, each [1, H, tokens, D], for tensors like ``key`` and ``value``.

        None where there cannot be any. All of it is zero, or was written by who has the place.
        """
        with self._lock:
            if layer not in self._layers and not self._make(layer, key, value):
                return None
            keys, values = (whole.tensor for whole in self._layers[layer])
            for tensor, like in ((keys, key), (values, value)):
                alike = tensor.shape[1] == like.shape[1] and tensor.shape[3] == like.shape[3]
                if not alike or tensor.dtype != like.dtype or tensor.device != like.device:
                    return None
            return keys[place : place + 1], values[place : place + 1]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all places [count, H, tokens, D] in a layer where somebody has a place."""
        keys, values = self._layers[index]
        return keys.tensor, values.tensor

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if places are free twice or not empty, or memory is held for nobody."""
        with self._lock:
            assert len(set(self._free)) == len(self._free) <= self._count
            assert len(self._free) < self._count or not self._layers
            for pair in self._layers.values():
                assert not any(bool(whole.tensor[place].any()) for whole in pair for place in self._free)

    def _make(self, layer: int, key: Tensor, value: Tensor) -> bool:
        if key.device.type != "cpu" or value.device.type != "cpu":
            return False
        try:
            self._layers[layer] = self._made(key), self._made(value)
        except OSError:  # no room for it in the address space, or by the rules of this machine
            return False
        return True

    def _made(self, like: Tensor) -> _Whole:
        """Zeros that take no memory until they are written to, which those of torch and numpy do not promise."""
        shape = self._count, like.shape[1], self.tokens, like.shape[3]
        size = math.prod(shape) * like.element_size()
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # with huge ones a first token would bring, and clear, two megabytes
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        with torch.inference_mode(mode=False):  # a tensor made there could not be written to elsewhere
            return _Whole(torch.frombuffer(pages, dtype=like.dtype).view(shape), pages, size // self._count)

    def _give_back(self, place: int) -> None:
        """Wipe out what the sequence has left: of a padded row everything is multiplied, if by zero, and zero times a
        number that is none would be felt."""
        with self._lock:
            for whole in itertools.chain.from_iterable(list(self._layers.values())):
                whole.wipe(place)
            heapq.heappush(self._free, place)
            if len(self._free) == self._count:
                self._layers.clear()


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """The keys or the values of all places of a layer."""

    tensor: Tensor  #: [count, H, tokens, D]
    pages: mmap.mmap  #: its memory
    size: int  #: of a place, bytes

    def wipe(self, place: int) -> None:
        """Zeros in ``place``: on Linux by giving its memory back."""
        if sys.platform == "linux" and self.size % mmap.PAGESIZE == 0:
            self.pages.madvise(mmap.MADV_DONTNEED, place * self.size, self.size)
        else:
            self.tensor[place].zero_()


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rows of a pass that attend as one, and the places that are read for that; made for one pass."""

    rows: tuple[int, ...]
    alone: tuple[int, ...]  #: the others
    first: int  #: place
    span: int  #: places from there on, some of which may belong to nobody
    tokens: int  #: that are attended, by all
    hidden: Tensor  #: [S, 1, 1, tokens]: what is added to scores, 0 or minus infinity
    indices: Tensor | None  #: of ``rows`` [len(rows)]; None where they are all rows of the pass
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
            own = added if self.indices is None else added.index_select(0, self.indices)
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


def chosen(places: Sequence[int], ends: Sequence[int], room: int, *, forced: bool = False) -> Group | None:
    """The rows whose attention saves most as one, by the constants above; None where none does.

    They are all rows up to some length in a run of places. ``places`` of the rows, -1 for one that has none; ``ends``:
    tokens that each holds, to which this pass adds one.
    """
    calls = _ANY if forced else _TOGETHER
    lengths = [end + 1 for end in ends]
    can = [row for row, place in enumerate(places) if place >= 0 and lengths[row] <= room]
    can.sort(key=places.__getitem__)
    most, members = 0.0, list[int]()
    for tokens in sorted({lengths[row] for row in can}):
        rows = [row for row in can if lengths[row] <= tokens]
        # The best run in one go: what it saves is what lies between two sums, so the best beginning is kept.
        saved, begin, first = 0.0, -math.inf, 0
        for last, row in enumerate(rows):
            if places[row] * tokens - saved > begin:
                begin, first = places[row] * tokens - saved, last
            saved += _alone(lengths[row])
            gain = saved + begin - (places[row] + 1) * tokens - calls
            if gain > most and last > first:
                most, members = gain, rows[first : last + 1]
    return _group(places, lengths, sorted(members), room) if members else None


def _alone(length: int) -> float:
    return min(_FUSED + _FUSED_TOKEN * length, _TWO + length)


def _group(places: Sequence[int], lengths: Sequence[int], rows: Sequence[int], room: int) -> Group:
    taken = [places[row] for row in rows]
    first, span = min(taken), max(taken) - min(taken) + 1
    tokens = min(room, -(-max(lengths[row] for row in rows) // _STEP) * _STEP)
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
        indices=None if len(rows) == len(places) else torch.tensor(rows),
        spread=None if straight else torch.tensor([of_place.get(place, rows[0]) for place in range(span)]),
        gathered=None if straight else torch.tensor([place - first for place in taken]),
        _ends=torch.tensor([lengths[row] - 1 for row in rows]),
        _places=torch.tensor(taken),
    )
