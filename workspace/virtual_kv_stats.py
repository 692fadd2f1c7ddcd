"""Numbers about stored virtual tokens: per layer, per session, and for all sessions of a store.

Norms are those of the vectors as they are kept (keys before RoPE), averaged over tokens and heads: the projector
matches them to the layer's own, and telemetry shows when they drift.
"""

from __future__ import annotations

from dataclasses import dataclass

from workspace.virtual_kv_limits import StoreShape
from workspace.virtual_kv_session import SessionState


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer of one session."""

    tokens: int
    bytes: int
    key_norm: float  #: mean Euclidean norm of the keys
    value_norm: float


@dataclass(frozen=True, slots=True)
class SessionStats:
    """One session; all zero for one that has nothing."""

    segments: int
    pinned: int
    bytes: int
    step: int  #: ticks so far, as far as its segments can tell
    layers: dict[int, LayerStats]


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """All sessions in memory, and what happened since the store was made."""

    sessions: int
    parked_sessions: int
    segments: int
    tokens: int  #: over all layers
    resident_bytes: int  #: on the store's device
    parked_bytes: int  #: in CPU memory, spilled
    writes: int
    refused: int  #: writes that did not fit
    evicted: int  #: segments that made room
    expired: int  #: segments whose time was over
    spilled: int  #: sessions that left the device, or memory
    brought_back: int  #: sessions that came back
    forgotten: int  #: sessions that had to go without persistence
    failed_saves: int


def measure(state: SessionState, shape: StoreShape) -> SessionStats:
    """Statistics of a session at one moment."""
    layers = {
        layer: LayerStats(
            tokens=segment.tokens,
            bytes=segment.tokens * shape.token_bytes,
            key_norm=float(segment.keys.float().norm(dim=-1).mean()),
            value_norm=float(segment.values.float().norm(dim=-1).mean()),
        )
        for layer, segment in state.layers.items()
    }
    return SessionStats(
        segments=len(state.infos),
        pinned=sum(info.pinned for info in state.infos),
        bytes=sum(layer.bytes for layer in layers.values()),
        step=state.step,
        layers=layers,
    )
