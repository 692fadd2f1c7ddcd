"""The key-value cache of one sequence that grows in place, and several of them under one forward pass.

transformers' dynamic cache concatenates: every token copies all keys and values before it. Here each layer owns a
buffer with room at its end, and what attention sees is a view of it. A layer with a sliding window keeps the last
``window - 1`` tokens, as the stock one does, and moves them to a new buffer when the old one is full.

``Rows`` stands for the caches of several sequences while a pass takes one token of each: nothing is copied together,
so sequences of any lengths join and leave a batch without cost. It writes behind the end of each cache, and only
``commit`` says that this counts: a pass that fails half way leaves every cache as it was. On a CPU the buffers of
several sequences lie in one tensor where there is room (``row_slab.py``): those attend as one where that is quicker.

Shapes: R rows, H key-value heads, T tokens of a pass, N tokens a layer holds, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from workspace.row_slab import FEWEST, Group, Lease, Slabs, chosen

#: Tokens of room that a buffer has at least when it is made anew.
_ROOM = 256
#: Places of single tokens that are worked out at once.
_AHEAD = 32


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of one sequence; ``window`` None keeps everything.

    ``keys`` and ``values`` [1, H, N, D] are views, good while the layer lives, and None while there is nothing. Whoever
    assigns other tensors (a capped cache does) replaces the content; they are copied before anything is written.
    """

    def __init__(self, window: int | None = None, room: int = _ROOM):
        self.is_sliding = window is not None
        self.sliding_window = window
        self.cumulative_length = 0  #: tokens seen so far, forgotten ones included
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None  # each [1, H, capacity, D]
        self._assigned = False  # whether they are somebody else's tensors, never written to
        self._start = self._end = self._capacity = 0
        self._ahead: tuple[tuple[Tensor, Tensor], ...] = ()  # places of single tokens, from ``_ahead_from`` on
        self._ahead_from = 0
        self.place = -1  #: in the slabs, while the buffers are part of them
        self._home: tuple[Lease, int] | None = None  # the place, and which of the model's layers this is
        self._left = False  # once they no longer are
        super().__init__()

    def settle(self, lease: Lease, layer: int) -> None:
        """Have buffers in a place of slabs, as this ``layer``, while there is room for all that it holds.

        They are written over once nobody holds the lease, which layers do: what ``keys`` and ``values`` gave does not.
        """
        self._home = lease, layer

    # What transformers asks of a layer.

    @property
    def is_initialized(self) -> bool:
        """True once it holds something; set by the base class, which is ignored."""
        return self._buffers is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens make the buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [1, H, T, D]; what these tokens may see: all, or with a window the ``window - 1`` before them too."""
        seen = self.write(key_states, value_states)
        self.commit(key_states.shape[2])
        return seen

    def get_seq_length(self) -> int:
        """Tokens that it holds; with a window, tokens that it has seen."""
        return self.cumulative_length if self.is_sliding else self._end - self._start

    def get_max_length(self) -> int:
        """The window, or -1."""
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what ``query_length`` more tokens would see, and the position of its first."""
        offset = self.cumulative_length - (self._end - self._start) if self.is_sliding else 0
        return self._end - self._start + query_length, offset

    def reset(self) -> None:
        """Forget everything."""
        self._leave()
        self._buffers, self._assigned = None, False
        self._start = self._end = self._capacity = self.cumulative_length = 0
        self._ahead, self._ahead_from = (), 0

    @property
    def keys(self) -> Tensor | None:
        """[1, H, N, D]."""
        return self._part(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._replace(0, tensor)

    @property
    def values(self) -> Tensor | None:
        """[1, H, N, D]."""
        return self._part(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._replace(1, tensor)

    # What a batch of rows needs.

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put [1, H, T, D] behind the end and return what they see; without ``commit`` it is as if it never was."""
        count = key.shape[2]
        if self._end + count > self._capacity:
            self._make_room(key, value)
        assert self._buffers is not None
        for buffer, added in zip(self._buffers, (key, value), strict=True):
            buffer.narrow(2, self._end, count).copy_(added)
        return self.seen(count)

    def target(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Where one token [1, H, 1, D] is to be put: two tensors [1, H, D]."""
        if self._end == self._capacity:
            self._make_room(key, value)
        assert self._buffers is not None
        if self._end >= self._ahead_from + len(self._ahead):  # views of the next places, made in one go
            count = min(_AHEAD, self._capacity - self._end)
            keys, values = (buffer.narrow(2, self._end, count).unbind(2) for buffer in self._buffers)
            self._ahead, self._ahead_from = tuple(zip(keys, values, strict=True)), self._end
        return self._ahead[self._end - self._ahead_from]

    @property
    def end(self) -> int:
        """Where in the buffers the next token goes."""
        return self._end

    def seen(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, N, D] that the last of ``count`` tokens sees, which are written and not committed."""
        assert self._buffers is not None
        keys, values = self._buffers
        start, length = self._start, self._end + count - self._start
        return keys.narrow(2, start, length), values.narrow(2, start, length)  # a slice takes three times as long

    def commit(self, count: int) -> None:
        """The last ``count`` written tokens are part of the sequence."""
        self._end += count
        self.cumulative_length += count
        if self.sliding_window is not None:
            self._start = max(self._start, self._end - self.sliding_window + 1)

    def restore(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Hold a copy of ``keys`` and ``values`` [1, H, N, D], the last of ``seen`` tokens, and nothing else."""
        self.reset()
        self.write(keys, values)
        self.commit(keys.shape[2])
        self.cumulative_length = seen

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if lengths contradict each other."""
        assert 0 <= self._start <= self._end <= self._capacity
        assert self._buffers is None or all(buffer.shape[2] == self._capacity for buffer in self._buffers)
        assert not self.is_sliding or self._end - self._start <= max(self.sliding_window or 1, 2) - 1
        assert self.cumulative_length >= self._end - self._start or not self.is_sliding

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        """New buffers with what is held at their beginning, and room for the given tokens and more."""
        held = self._end - self._start
        needed = held + key.shape[2]
        if self.is_sliding:
            capacity = needed + _ROOM
        else:  # a half more, so that a long answer copies what is before it seldom
            capacity = max(self._room, needed + max(_ROOM, needed // 2) if self._capacity else needed)
        made = self._housed(key, value, needed)
        if made is None:
            shapes = [(1, like.shape[1], capacity, like.shape[3]) for like in (key, value)]
            made = key.new_empty(shapes[0]), value.new_empty(shapes[1])
        if self._buffers is not None:
            for buffer, old in zip(made, self._buffers, strict=True):
                buffer[:, :, :held] = old[:, :, self._start : self._end]
        self._buffers, self._assigned = made, False
        self._start, self._end, self._capacity = 0, held, made[0].shape[2]
        self._ahead, self._ahead_from = (), held

    def _housed(self, key: Tensor, value: Tensor, needed: int) -> tuple[Tensor, Tensor] | None:
        """Its part of the slabs, where it may be there; otherwise it is there no longer."""
        if self._home is None or self._left:
            return None
        lease, layer = self._home
        made = None
        if self._buffers is None and max(needed, self._room) <= lease.slabs.tokens:
            made = lease.slabs.part(layer, lease.place, key, value)
        if made is None:
            self._leave()
        else:
            self.place = lease.place
        return made

    def _leave(self) -> None:
        """For good: what it has written there, and may still show, would be in the way of what it writes later."""
        if self.place >= 0:
            self.place, self._left = -1, True

    def _part(self, which: int) -> Tensor | None:
        if self._buffers is None:
            return None
        part = self._buffers[which]
        return part if self._assigned else part[:, :, self._start : self._end]

    def _replace(self, which: int, tensor: Tensor | None) -> None:
        """Keys and values are assigned one after the other: until both are, their lengths may differ."""
        if tensor is None:
            self.reset()
            return
        other = self._part(1 - which)
        if other is None:
            other = tensor
        self._leave()
        self._buffers = (tensor, other) if which == 0 else (other, tensor)
        self._assigned = True
        self._start, self._end, self._capacity = 0, tensor.shape[2], tensor.shape[2]
        self._ahead, self._ahead_from = (), self._end


class RowCache(DynamicCache):  # type: ignore[misc]
    """The cache of one sequence, with the layers that the configuration asks for. ``room``: tokens expected at first.

    With ``slabs`` it has a place there, if one is free, until it and its layers are gone.
    Layers of kinds that are neither full nor sliding attention stay what transformers makes of them; such a cache
    cannot be a row of several (``batchable``).
    """

    layers: list[Any]

    def __init__(self, config: Any, room: int = _ROOM, slabs: Slabs | None = None):
        super().__init__(config=config)
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        self.layers = [_row_layer(kind, layer, room) for kind, layer in zip(kinds, self.layers, strict=True)]
        self.slabs = slabs
        lease = None if slabs is None or room > slabs.tokens else slabs.take()
        for index, layer in enumerate(self.layers):
            if lease is not None and type(layer) is RowLayer and not layer.is_sliding:
                layer.settle(lease, index)

    @property
    def batchable(self) -> bool:
        """True when ``Rows`` may take it."""
        return all(type(layer) is RowLayer for layer in self.layers)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if a layer contradicts itself or another one."""
        for layer in self.layers:
            if type(layer) is RowLayer:
                layer.check_invariants()


class Rows(Cache):  # type: ignore[misc]
    """The caches of R sequences, of which a pass takes one token each. Made for one pass."""

    def __init__(self, caches: Sequence[RowCache]):
        super().__init__(layers=[])
        self._caches = tuple(caches)
        slabs = {cache.slabs for cache in self._caches} - {None}
        self._slabs = slabs.pop() if len(slabs) == 1 else None
        self._groups: dict[int, Group | None] = {}
        self._chosen: dict[tuple[int, ...], Group | None] = {}  # by places and ends

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Give each cache its row of [R, H, 1, D]; what rows see is asked for with ``seen``, or not at all."""
        layers: list[RowLayer] = [cache.layers[layer_idx] for cache in self._caches]
        group = self._groups[layer_idx] = self._group(layers)
        alone: Sequence[int] = range(len(layers))
        if group is not None and self._slabs is not None:
            group.write(self._slabs.layer(layer_idx), key_states, value_states)
            alone = group.alone
        if alone:
            first = key_states[:1], value_states[:1]
            # All copies in one call: each by itself would take longer to call than to do.
            keys, values = (states.squeeze(2).chunk(len(layers)) for states in (key_states, value_states))
            targets = [part for row in alone for part in layers[row].target(*first)]
            torch._foreach_copy_(targets, [part for row in alone for part in (keys[row], values[row])])
        return key_states, value_states

    def _group(self, layers: Sequence[RowLayer]) -> Group | None:
        """The same for all layers that lie alike, as those of one kind do."""
        if self._slabs is None or len(layers) < (2 if self._slabs.forced else FEWEST):
            return None
        places, ends = [layer.place for layer in layers], [layer.end for layer in layers]
        lie = (*places, *ends)
        if lie not in self._chosen:
            self._chosen[lie] = chosen(places, ends, self._slabs.tokens, forced=self._slabs.forced)
        return self._chosen[lie]

    def update_one(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """``update`` and ``seen`` for the only row [1, H, 1, D], in as few calls as can be."""
        (cache,) = self._caches
        own: RowLayer = cache.layers[layer]
        to_key, to_value = own.target(key, value)
        to_key.copy_(key.squeeze(2))
        to_value.copy_(value.squeeze(2))
        return own.seen()

    def seen(self, layer: int, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, H, N, D] that the token of each of ``rows`` sees, after ``update``."""
        return [self._caches[row].layers[layer].seen() for row in rows]

    def group(self, layer: int) -> Group | None:
        """The rows whose attention is quicker as one, after ``update``; one row is none."""
        return self._groups.get(layer)

    def attend(self, group: Group, layer: int, query: Tensor, scaling: float, sinks: Tensor | None) -> Tensor:
        """Of the rows of ``group`` among ``query`` [R, Hq, 1, D]: [len(group.rows), 1, Hq, D]."""
        assert self._slabs is not None
        return group.attend(self._slabs.layer(layer), query, scaling, sinks)

    def commit(self) -> None:
        """The pass is done: its tokens are part of their sequences."""
        for cache in self._caches:
            for layer in cache.layers:
                layer.commit(1)

    # Masks are made for what the attention of the rows does not use; they are as small as can be.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing before the tokens of this pass."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Only they."""
        return query_length, 0


def _row_layer(kind: str, layer: Any, room: int) -> Any:
    if kind == "sliding_attention" and type(layer) is DynamicSlidingWindowLayer:
        return RowLayer(layer.sliding_window)
    if kind == "full_attention" and type(layer) is DynamicLayer:
        return RowLayer(room=room)
    return layer  # among them chunked attention, where a token does not see all that the cache holds


def as_row(cache: Cache | None) -> RowCache | None:
    """``cache`` where it can be a row of several."""
    return cache if isinstance(cache, RowCache) and cache.batchable else None
