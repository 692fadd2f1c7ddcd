"""How much a session may keep, and what goes first when it is too much.

Order of leaving: what has expired; then the oldest segment that is not pinned and that frees what is short (a segment
without tokens in the overfull layer is left alone). A pin holds a segment against limits and against its time to
live alike; only ``drop`` and ``clear`` remove it. A write that does not fit beside the pins is refused as a whole,
before anything has been removed for it.

Only arithmetic over descriptions is here; tensors are in ``virtual_kv_session.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NewType

import torch

from workspace.errors import StoreFull

SegmentId = NewType("SegmentId", int)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits that exist are valid. The first three are for one session, the next two for all sessions together."""

    max_tokens_per_layer: int = 256
    max_segments: int = 64
    max_bytes: int = 64 * _MIB
    spill_bytes: int = 512 * _MIB  #: on the store's device; above it, least recently used sessions are spilled
    parked_bytes: int = 2048 * _MIB  #: in CPU memory, for a store on another device; above it, they leave memory
    ttl_steps: int | None = None  #: for writes that do not say; None: no limit
    ttl_seconds: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None and item.name.startswith("ttl_"):
                continue
            if not 0 < value < float("inf"):  # which NaN is not either
                raise ValueError(f"{item.name} must be positive and finite, got {value!r}")
        if self.spill_bytes < self.max_bytes:
            raise ValueError(
                f"spill_bytes ({self.spill_bytes}) must be at least max_bytes ({self.max_bytes}): "
                "the session in use has to fit"
            )


@dataclass(frozen=True, slots=True)
class StoreShape:
    """What virtual tokens look like for one hooked model."""

    fingerprint: str  #: of the model, as in ``LoadedModel``
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  #: of keys and values; biases are float32, where a bias of -16 still has its digits
    device: torch.device

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must be increasing indices, at least one, got {self.layers}")
        if self.kv_heads < 1 or self.head_dim < 1:
            raise ValueError(f"kv_heads and head_dim must be positive, got {self.kv_heads} and {self.head_dim}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {self.dtype}")
        # "cuda" becomes "cuda:0", as tensors report it.
        object.__setattr__(self, "device", torch.empty(0, device=self.device).device)

    @property
    def token_bytes(self) -> int:
        """Bytes of one virtual token in one layer: key, value, bias, and its int64 birth."""
        return self.kv_heads * (2 * self.head_dim * self.dtype.itemsize + 4) + 8


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One write, without its tensors. ``tokens`` says how many virtual tokens it has in each layer."""

    id: SegmentId
    kind: str
    tokens: Mapping[int, int]
    born: int  #: visible to queries at this position and later
    distance: int  #: in tokens, at which its keys stand before every query
    written_step: int  #: of its session
    written_at: float  #: by the store's clock
    expires_step: int | None
    expires_at: float | None
    pinned: bool
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", MappingProxyType(dict(self.tokens)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def total_tokens(self) -> int:
        """Over all its layers."""
        return sum(self.tokens.values())

    def due(self, step: int, now: float) -> bool:
        """Whether its time is over, pinned or not."""
        by_step = self.expires_step is not None and step >= self.expires_step
        return by_step or (self.expires_at is not None and now >= self.expires_at)


class _Usage:
    """Tokens, segments and bytes of a set of segments, held against the limits."""

    def __init__(self, limits: StoreLimits, shape: StoreShape):
        self._limits, self._shape = limits, shape
        self.tokens: Counter[int] = Counter()
        self.segments = 0

    def add(self, info: SegmentInfo) -> None:
        self.tokens.update(info.tokens)
        self.segments += 1

    def remove(self, info: SegmentInfo) -> None:
        self.tokens.subtract(info.tokens)
        self.segments -= 1

    @property
    def bytes(self) -> int:
        return self.tokens.total() * self._shape.token_bytes

    def overfull_layers(self) -> list[int]:
        return [layer for layer, count in self.tokens.items() if count > self._limits.max_tokens_per_layer]

    def over(self) -> bool:
        return self._over_as_a_whole() or bool(self.overfull_layers())

    def _over_as_a_whole(self) -> bool:
        return self.segments > self._limits.max_segments or self.bytes > self._limits.max_bytes

    def helped_by_removing(self, info: SegmentInfo) -> bool:
        return self._over_as_a_whole() or any(layer in info.tokens for layer in self.overfull_layers())

    def explain(self) -> str:
        """What is over, in words; called when something is."""
        limits = self._limits
        words = [
            f"layer {layer} would hold {self.tokens[layer]} tokens (max_tokens_per_layer {limits.max_tokens_per_layer})"
            for layer in self.overfull_layers()
        ]
        if self.segments > limits.max_segments:
            words.append(f"the session would hold {self.segments} segments (max_segments {limits.max_segments})")
        if self.bytes > limits.max_bytes:
            words.append(f"the session would hold {self.bytes} bytes (max_bytes {limits.max_bytes})")
        return "; ".join(words)


def choose_evictions(
    held: Sequence[SegmentInfo], incoming: SegmentInfo | None, limits: StoreLimits, shape: StoreShape
) -> frozenset[SegmentId]:
    """Which of ``held`` (oldest first) must go so that the rest and ``incoming`` are within ``limits``.

    Raises ``StoreFull`` when pins leave no room for ``incoming``. Without one, nothing is raised: pins that exceed
    limits which were lowered meanwhile stay.
    """
    usage = _Usage(limits, shape)
    for info in held if incoming is None else (*held, incoming):
        usage.add(info)
    victims: set[SegmentId] = set()
    for info in held:  # one pass is enough: what does not help now helps even less once others are gone
        if not usage.over():
            break
        if not info.pinned and usage.helped_by_removing(info):
            usage.remove(info)
            victims.add(info.id)
    if incoming is not None and usage.over():
        pinned = sum(info.pinned for info in held)
        beside = f"even after removing all but the {pinned} pinned segments" if pinned else "even alone"
        raise StoreFull(
            f"the segment does not fit, {beside}: {usage.explain()}; "
            "unpin or drop segments, write fewer tokens, or raise that limit"
        )
    return frozenset(victims)
