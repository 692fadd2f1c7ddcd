"""A cartridge's row, detached from the database: what the registry hands out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from storage.models import Cartridge as Row

State = Literal["candidate", "serving", "retired", "rejected", "deleted"]


@dataclass(frozen=True, slots=True)
class CartridgeRow:
    """A row, detached from the database."""

    id: str
    domain: str
    version: int
    parent_id: str | None
    replaced_id: str | None  #: what served before it was promoted
    run_id: str | None
    state: State
    state_reason: str
    stale: bool
    model_fingerprint: str
    slots: int
    bytes: int
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    experiences: int  #: how many it was trained on
    created_at: float
    promoted_at: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def detached(row: Row) -> CartridgeRow:
    """The values of ``row``; its session must be open."""
    return CartridgeRow(
        id=row.id,
        domain=row.domain,
        version=row.version,
        parent_id=row.parent_id,
        replaced_id=row.replaced_id,
        run_id=row.run_id,
        state=row.state,  # type: ignore[arg-type]
        state_reason=row.state_reason,
        stale=row.stale,
        model_fingerprint=row.model_fingerprint,
        slots=row.slots,
        bytes=row.bytes,
        manifest=dict(row.manifest),
        metrics=dict(row.metrics),
        experiences=len(row.experience_ids),
        created_at=row.created_at,
        promoted_at=row.promoted_at,
    )
