"""Keys and values of prompts that were read before, for prompts that begin the same way.

The second turn of a conversation begins with the first one; many requests begin with one system prompt. What the model
made of these tokens lies here in blocks: a tree whose nodes hold the keys and values of ``block`` tokens each, so that
the way from a root to a node spells out a beginning. Each cartridge (what stands before the text) has a root of its
own, and a store belongs to one model. Blocks are copies and never change; a generation copies them into its own cache.
So nothing is shared that anybody writes to, and a block may be forgotten at any time.

Layers with a sliding window forget as the text goes on and cannot be cut back. A beginning of such a model is used
only at a block's end at which somebody's window was copied (``_Block.windows``): after a pass over a prompt that ended
there, and at the last end that an answer has passed.

``max_bytes`` bounds everything held; the leaf whose turn is the longest ago goes first. Blocks in a tree follow
vLLM's automatic prefix caching and SGLang's RadixAttention (2312.07104).

Not here: when to look and when to keep (``stepping.py``), and which requests may not take part: a workspace changes
the numbers that the model makes of a text.

Shapes: H key-value heads, B tokens of a block, W tokens of a window, D head size.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache
from transformers.cache_utils import StaticLayer

from workspace.prefix import KVPrefix
from workspace.row_cache import RowLayer

_Pair = tuple[Tensor, Tensor]  #: keys and values

_digests: Any = WeakIdKeyDictionary()
_digests_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """A snapshot; ``lookups``, ``hits`` and ``hit_tokens`` count from the start."""

    bytes: int
    blocks: int
    lookups: int
    hits: int
    hit_tokens: int
    evicted: int


class _Block:
    """A node. ``layers[i]`` are keys and values [1, H, B, D] of full-attention layer i, None for a sliding one."""

    __slots__ = ("children", "layers", "parent", "tokens", "windows")

    def __init__(self, parent: _Block | None, tokens: tuple[int, ...], layers: tuple[_Pair | None, ...]):
        self.parent = parent
        self.tokens = tokens
        self.layers = layers
        self.windows: dict[int, _Pair] | None = None  # of sliding layers: what they hold at its end, [1, H, <W, D]
        self.children: dict[tuple[int, ...], _Block] = {}

    @property
    def nbytes(self) -> int:
        pairs = [pair for pair in self.layers if pair is not None]
        pairs += (self.windows or {}).values()
        return sum(keys.nbytes + values.nbytes for keys, values in pairs)


class PrefixCache:
    """The store of one model. Any thread may ask for ``stats``; the rest is for the engine's thread."""

    def __init__(self, max_bytes: int, block: int = 64):
        if max_bytes < 1 or block < 1:
            raise ValueError(f"max_bytes and block must be at least 1, got {max_bytes} and {block}")
        self.max_bytes = max_bytes
        self.block = block
        self._lock = threading.RLock()  # guards everything below
        self._roots: dict[str, _Block] = {}
        self._blocks: OrderedDict[int, _Block] = OrderedDict()  # by identity, the longest unused first
        self._bytes = 0
        self._lookups = self._hits = self._hit_tokens = self._evicted = 0

    def open(self, root: str, prompt_ids: Sequence[int], cache: Cache, slots: int) -> Chain | None:
        """Append what is known of the prompt to ``cache``, which holds the ``slots`` of the prefix that ``root`` names.

        The last token of a prompt is never taken: its logits are wanted. None for caches with layers of other kinds.
        """
        sliding = _sliding(cache)
        if sliding is None:
            return None
        with self._lock:
            self._lookups += 1
            start = self._roots.setdefault(root, _Block(None, (), ()))
            found = self._walk(start, prompt_ids)
            if sliding:
                while found and found[-1].windows is None:
                    found.pop()
            chain = Chain(self, found[-1] if found else start, len(found), slots, bool(sliding))
            if found:
                self._hits += 1
                self._hit_tokens += chain.reused
                self._touch(found[-1])
                _fill(cache, found, slots + chain.reused)
            return chain

    def stats(self) -> PrefixCacheStats:
        """A consistent snapshot."""
        with self._lock:
            return PrefixCacheStats(
                self._bytes, len(self._blocks), self._lookups, self._hits, self._hit_tokens, self._evicted
            )

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the tree, the order or the bytes contradict each other."""
        with self._lock:
            assert self._bytes <= self.max_bytes, (self._bytes, self.max_bytes)
            assert self._bytes == sum(block.nbytes for block in self._blocks.values())
            reached = 0
            pending = list(self._roots.values())
            while pending:
                block = pending.pop()
                for tokens, child in block.children.items():
                    assert child.parent is block
                    assert child.tokens == tokens
                    assert len(tokens) == self.block
                    assert id(child) in self._blocks
                    reached += 1
                    pending.append(child)
            assert reached == len(self._blocks), (reached, len(self._blocks))

    # For chains, which call with the lock held.

    def _walk(self, block: _Block, prompt_ids: Sequence[int]) -> list[_Block]:
        found: list[_Block] = []
        for start in range(0, len(prompt_ids) - self.block, self.block):
            child = block.children.get(tuple(prompt_ids[start : start + self.block]))
            if child is None:
                break
            found.append(child)
            block = child
        return found

    def _holds(self, block: _Block) -> bool:
        return block.parent is None or id(block) in self._blocks

    def _add(self, block: _Block) -> bool:
        """Take ``block`` as a child of its parent; False where there is no room for it."""
        assert block.parent is not None
        if not self._make_room(block.nbytes, block.parent):
            return False
        block.parent.children[block.tokens] = block
        self._blocks[id(block)] = block
        self._bytes += block.nbytes
        return True

    def _set_windows(self, block: _Block, windows: dict[int, _Pair] | None) -> None:
        self._bytes -= block.nbytes
        block.windows = None
        size = sum(keys.nbytes + values.nbytes for keys, values in (windows or {}).values())
        self._bytes += block.nbytes
        if windows is not None and self._make_room(size, block):
            block.windows = windows
            self._bytes += size

    def _make_room(self, size: int, keep: _Block) -> bool:
        while self._bytes + size > self.max_bytes:
            oldest = next((block for block in self._blocks.values() if not block.children and block is not keep), None)
            if oldest is None:
                return False
            self._bytes -= oldest.nbytes
            self._evicted += 1
            del self._blocks[id(oldest)]
            assert oldest.parent is not None
            del oldest.parent.children[oldest.tokens]
        return True

    def _touch(self, block: _Block | None) -> None:
        """Used now, with all that it needs: those above it later, so that a leaf is always older than its branch."""
        while block is not None and block.parent is not None:
            self._blocks.move_to_end(id(block))
            block = block.parent


class Chain:
    """One generation's way through the store. Holds no tensors; what the store forgets ends it."""

    def __init__(self, store: PrefixCache, last: _Block, count: int, slots: int, sliding: bool):
        self._store, self._last, self._count, self._slots, self._sliding = store, last, count, slots, sliding
        self._passing: _Block | None = None  # the block whose window was copied while the answer went by
        self.reused = count * store.block  #: tokens that came from the store

    def due(self, count: int) -> bool:
        """Whether the first ``count`` tokens hold a whole block more than is kept."""
        return (self._count + 1) * self._store.block <= count

    def extend(self, tokens: Sequence[int], cache: Cache, *, answering: bool) -> None:
        """Keep what a pass has added to ``cache``, which now holds ``tokens`` after the prefix; whole blocks of it."""
        store, size = self._store, self._store.block
        if not self.due(len(tokens)):
            return
        with store._lock:
            if not store._holds(self._last):
                return
            while self.due(len(tokens)):
                start = self._count * size
                wanted = tuple(tokens[start : start + size])
                block = self._last.children.get(wanted)
                if block is None:
                    block = _Block(self._last, wanted, _copied(cache, self._slots + start, size))
                    if not store._add(block):
                        break
                self._last, self._count = block, self._count + 1
            if self._sliding and len(tokens) == self._count * size:
                self._keep_windows(cache, answering)
            store._touch(self._last)

    def _keep_windows(self, cache: Cache, answering: bool) -> None:
        """Of the ends that an answer passes only the last is kept: a window may be larger than many blocks."""
        if self._last.windows is None:
            if self._passing is not None:
                if self._store._holds(self._passing):
                    self._store._set_windows(self._passing, None)
                self._passing = None
            self._store._set_windows(self._last, _windows(cache))
            if answering:
                self._passing = self._last


def prefix_digest(prefix: KVPrefix | None) -> str:
    """A name for what ``prefix`` holds: equal for equal numbers. Computed once for the same tensors; "" for none."""
    if prefix is None:
        return ""
    tensors = (*prefix.keys, *prefix.values)
    with _digests_lock:
        known: tuple[tuple[weakref.ref[Tensor], ...], str] | None = _digests.get(tensors[0])
    if known is not None and all(ref() is tensor for ref, tensor in zip(known[0], tensors, strict=True)):
        return known[1]
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    name = digest.hexdigest()
    with _digests_lock:
        _digests[tensors[0]] = tuple(weakref.ref(tensor) for tensor in tensors), name
    return name


def _sliding(cache: Cache) -> list[int] | None:
    """Indices of the layers with a window; None where a layer is of a kind that cannot be copied in blocks."""
    layers: list[Any] = cache.layers
    if not layers or not all(type(layer) in (RowLayer, StaticLayer) for layer in layers):
        return None
    return [index for index, layer in enumerate(layers) if layer.is_sliding]


def _copied(cache: Cache, start: int, count: int) -> tuple[_Pair | None, ...]:
    layers: list[Any] = cache.layers
    span = slice(start, start + count)
    return tuple(
        None if layer.is_sliding else (layer.keys[:, :, span].clone(), layer.values[:, :, span].clone())
        for layer in layers
    )


def _windows(cache: Cache) -> dict[int, _Pair]:
    layers: list[Any] = cache.layers
    return {index: (layer.keys.clone(), layer.values.clone()) for index, layer in enumerate(layers) if layer.is_sliding}


def _fill(cache: Cache, blocks: Sequence[_Block], seen: int) -> None:
    """Append what ``blocks`` hold; afterwards the cache has seen ``seen`` tokens and slots."""
    layers: list[Any] = cache.layers
    windows = blocks[-1].windows or {}
    for index, layer in enumerate(layers):
        if layer.is_sliding:
            layer.restore(*windows[index], seen)
        else:
            pairs = [block.layers[index] for block in blocks]
            keys, values = (torch.cat([pair[part] for pair in pairs if pair is not None], dim=2) for part in (0, 1))
            layer.update(keys, values)
