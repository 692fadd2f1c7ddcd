"""What a request may switch, and what it is told afterwards: plain values around ``steering.py`` and ``run.py``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Toggles:
    """Which parts of the workspace serve one generation. ``trace`` also keeps the numbers of every token."""

    virtual_kv: bool = True
    residual_delta: bool = True
    controller: bool = True
    memory: bool = True
    trace: bool = False


@dataclass(slots=True)
class WorkspaceReport:
    """What the workspace did in one generation. Counts; bytes and tokens are those of the last pass."""

    virtual_tokens: int = 0  #: seen by the last token, over all layers
    kv_bytes: int = 0  #: what they take
    session_segments: int = 0  #: brought along from earlier requests of the session
    slot_updates: int = 0
    broadcasts: int = 0
    retrievals: int = 0
    recollections: list[str] = field(default_factory=list)  #: where what was remembered came from
    writes: int = 0
    halted: bool = False
    evicted_tokens: int = 0  #: left the active cache; virtual tokens stand in for them
    cache_tokens: int = 0  #: in the active cache at the end
    saved_segment: int | None = None  #: what the session keeps of this request
    norms: dict[int, tuple[float, float]] = field(default_factory=dict)  #: mean key and value norm by layer
    slots: list[dict[str, float]] = field(default_factory=list)  #: with a trace: norm, share, moved at the last update
    toggles: dict[str, bool] = field(default_factory=dict)
    trace: list[dict[str, Any]] | None = None  #: one entry per token

    def to_json(self) -> dict[str, Any]:
        """For ``usage.workspace``: JSON types; the trace apart."""
        told = asdict(self)
        del told["trace"]
        told["norms"] = {str(layer): [round(value, 4) for value in pair] for layer, pair in self.norms.items()}
        return told
