"""The table of kernels: who exists, what was asked of it, and where its training stands.

Every change of state is one short transaction followed by a ``kernel.state`` event, so that the database, the API and
the dashboard never tell three stories. Not here: what the states mean (``kernel_thread``, ``continuous_trainer``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from olympus.errors import DuplicateKernel, KernelNotFound
from storage.database import Database
from storage.models import AuditEvent, Kernel
from telemetry.hub import EventHub

State = Literal["queued", "training", "paused", "waiting", "converged", "settled", "stalled", "failed", "stopped"]
Wanted = Literal["train", "pause", "stop"]
#: A thread is at work, or was when the process died.
ACTIVE_STATES = frozenset({"training", "stalled"})
#: Nothing to do until new experience arrives.
RESTING_STATES = frozenset({"waiting", "converged", "settled"})


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """One row, detached from the database."""

    id: str
    god_name: str
    domain: str
    state: State
    state_reason: str
    wanted: Wanted
    step: int
    config: dict[str, Any]
    seed: int
    parents: tuple[str, ...]
    reason: str
    idempotency_key: str | None
    summary: dict[str, Any]
    created_at: float
    updated_at: float


class KernelRows:
    """Reads and writes the table ``kernels``. Safe to use from all threads."""

    def __init__(self, database: Database, hub: EventHub):
        self._database = database
        self._hub = hub

    def all(self) -> list[KernelRecord]:
        """Every kernel, oldest first."""
        with self._database.read() as session:
            return [_record(row) for row in session.scalars(sa.select(Kernel).order_by(Kernel.created_at, Kernel.id))]

    def states(self) -> dict[str, int]:
        """How many kernels are in each state; none is not told."""
        with self._database.read() as session:
            counted = session.execute(sa.select(Kernel.state, sa.func.count()).group_by(Kernel.state))
            return {state: count for state, count in counted}

    def get(self, kernel_id: str) -> KernelRecord:
        """One kernel. Raises ``KernelNotFound``."""
        with self._database.read() as session:
            row = session.get(Kernel, kernel_id)
            if row is None:
                raise KernelNotFound(f"there is no kernel {kernel_id}; GET /olympus/kernels lists them")
            return _record(row)

    def by_idempotency_key(self, key: str) -> KernelRecord | None:
        """The kernel that an earlier, equal request made."""
        with self._database.read() as session:
            row = session.scalar(sa.select(Kernel).where(Kernel.idempotency_key == key))
            return None if row is None else _record(row)

    def create(self, values: dict[str, Any], actor: str) -> KernelRecord:
        """Insert a kernel and the audit line of its spawning, in one transaction."""
        try:
            with self._database.write() as session:
                row = Kernel(**values)
                session.add(row)
                detail = {"domain": row.domain, "reason": row.reason}
                session.add(AuditEvent(actor=actor, action="kernel.spawn", target=row.id, detail=detail))
                session.flush()
                record = _record(row)
        except IntegrityError:
            raise DuplicateKernel("an equal request made a kernel at this very moment; list the kernels") from None
        self._announce(record.id, record.state, record.state_reason, record.step)
        return record

    def ever_spawned(self) -> bool:
        """True when a kernel was ever made here, also when it was deleted since."""
        query = sa.select(AuditEvent.id).where(AuditEvent.action == "kernel.spawn").limit(1)
        with self._database.read() as session:
            return session.scalar(query) is not None

    def set_state(
        self,
        kernel_id: str,
        state: State,
        reason: str = "",
        *,
        step: int | None = None,
        summary: dict[str, Any] | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        """Write what is given and tell the dashboard; a kernel that was deleted meanwhile is ignored."""
        with self._database.write() as session:
            row = session.get(Kernel, kernel_id)
            if row is None:
                return
            changed = (row.state, row.state_reason) != (state, reason)
            row.state, row.state_reason, row.updated_at = state, reason, time.time()
            row.step = row.step if step is None else step
            row.summary = row.summary if summary is None else summary
            row.wanted = row.wanted if wanted is None else wanted
            at_step = row.step
        if changed:
            self._announce(kernel_id, state, reason, at_step)

    def progress(self, kernel_id: str, step: int, summary: dict[str, Any]) -> None:
        """Remember how far a kernel has come, without a change of state."""
        values = {"step": step, "summary": summary, "updated_at": time.time()}
        with self._database.write() as session:
            session.execute(sa.update(Kernel).where(Kernel.id == kernel_id).values(**values))

    def delete(self, kernel_id: str, actor: str) -> None:
        """Remove the row, and with it its metrics and checkpoint rows."""
        with self._database.write() as session:
            session.execute(sa.delete(Kernel).where(Kernel.id == kernel_id))
            session.add(AuditEvent(actor=actor, action="kernel.delete", target=kernel_id, detail={}))
        self._hub.publish("kernel.state", {"kernel_id": kernel_id, "state": "deleted", "reason": "", "step": 0})

    def _announce(self, kernel_id: str, state: str, reason: str, step: int) -> None:
        data = {"kernel_id": kernel_id, "state": state, "reason": reason, "step": step}
        self._hub.publish("kernel.state", data)


def _record(row: Kernel) -> KernelRecord:
    return KernelRecord(
        id=row.id,
        god_name=row.god_name,
        domain=row.domain,
        state=row.state,  # type: ignore[arg-type]
        state_reason=row.state_reason,
        wanted=row.wanted,  # type: ignore[arg-type]
        step=row.step,
        config=dict(row.config),
        seed=row.seed,
        parents=tuple(row.parents),
        reason=row.reason,
        idempotency_key=row.idempotency_key,
        summary=dict(row.summary),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
