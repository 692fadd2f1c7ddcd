"""Distillation runs as database rows: one queue, a lease, progress, cancel, retry after a crash.

A run is a row before it is a job, so a schedule, a person and a program all start it in the same way and see the same
thing; a process that dies leaves a lease that runs out, and the next one goes on where the run's folder stands. Why
not the scheduler's own job store: its rows are pickles that say nothing of progress, and it knows no lease.

    queued -> running -> promoted | rejected | skipped | failed
       `---------`--> cancelling -> cancelled

Not here: what a run does (``pipeline.py``), and when one begins (``triggers.py``).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import orm

from memory.distillation.errors import DistillationError
from storage.database import Database
from storage.models import AuditEvent, DistillationRun

RunState = Literal["queued", "running", "cancelling", "promoted", "rejected", "skipped", "failed", "cancelled"]
OPEN: tuple[RunState, ...] = ("queued", "running", "cancelling")
#: A worker that has not been heard of for so long is dead.
LEASE_SECONDS = 60.0
#: Times that a run is begun before it stays failed: a run that kills the process must not do so for ever.
MOST_ATTEMPTS = 3


class RunError(DistillationError):
    """A run was asked for something that it cannot do; the message says what to do instead."""


class RunNotFound(RunError):
    """No run has that id."""


class RunInProgress(RunError):
    """The domain has an open run already; wait for it or cancel it."""

    def __init__(self, run: Run):
        self.run = run
        super().__init__(f"{run.domain} is being distilled by run {run.id} ({run.state}); wait for it, or cancel it")


class LeaseLost(RunError):
    """Another worker has taken the run over: stop at once and write nothing more."""


@dataclass(frozen=True, slots=True)
class Run:
    """A row. ``progress`` has ``stage``, ``fraction`` (0 to 1), ``detail``, and what the stages found."""

    id: str
    domain: str
    state: RunState
    trigger: str
    config: dict[str, Any]
    progress: dict[str, Any]
    error: str | None
    created_at: float
    finished_at: float | None

    @property
    def cursor(self) -> int:
        """The newest experience that existed when the run was asked for."""
        return int(self.progress.get("cursor", 0))

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON types."""
        return asdict(self)


class RunStore:
    """See the module docstring. Safe to use from all threads and processes.

    Whatever changes a state is an ordered transaction: on PostgreSQL, too, it sees what the one before has decided.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time):
        self._database = database
        self._clock = clock

    # -- asking -----------------------------------------------------------------------------------------------

    def create(self, domain: str, *, trigger: str, config: Mapping[str, Any], cursor: int, actor: str = "local") -> Run:
        """A new queued run. Raises ``RunInProgress`` while the domain has an open one."""
        with self._database.write(ordered=True) as session:
            found = session.scalar(
                sa.select(DistillationRun).where(DistillationRun.domain == domain, DistillationRun.state.in_(OPEN))
            )
            if found is not None:
                raise RunInProgress(_run(found))
            row = DistillationRun(
                id=f"run-{uuid.uuid4().hex[:12]}",
                domain=domain,
                state="queued",
                trigger=trigger,
                config=dict(config),
                progress={"stage": "queued", "fraction": 0.0, "cursor": cursor, "attempts": 0},
                created_at=self._clock(),
            )
            session.add(row)
            detail = {"domain": domain, "trigger": trigger}
            session.add(AuditEvent(actor=actor, action="distillation.start", target=row.id, detail=detail))
            session.flush()
            return _run(row)

    def cancel(self, run_id: str, actor: str = "local") -> Run:
        """Ask for the end: at once where it waits, at the next step where it runs. Raises ``RunError``."""
        with self._database.write(ordered=True) as session:
            row = _row(session, run_id)
            if row.state not in OPEN:
                raise RunError(f"run {run_id} has ended ({row.state}); there is nothing to cancel")
            if row.state == "queued":
                self._end(row, "cancelled")
            else:
                row.state = "cancelling"
            session.add(AuditEvent(actor=actor, action="distillation.cancel", target=run_id, detail={}))
            return _run(row)

    def get(self, run_id: str) -> Run:
        """One run. Raises ``RunNotFound``."""
        with self._database.read() as session:
            return _run(_row(session, run_id))

    def page(self, *, domain: str | None = None, limit: int = 50) -> list[Run]:
        """The newest ``limit`` runs, newest first."""
        query = sa.select(DistillationRun).order_by(DistillationRun.created_at.desc(), DistillationRun.id).limit(limit)
        if domain is not None:
            query = query.where(DistillationRun.domain == domain)
        with self._database.read() as session:
            return [_run(row) for row in session.scalars(query)]

    def open_ids(self) -> list[str]:
        """The runs that have not ended."""
        query = sa.select(DistillationRun.id).where(DistillationRun.state.in_(OPEN))
        with self._database.read() as session:
            return list(session.scalars(query))

    def newest(self, domain: str, *states: RunState) -> Run | None:
        """The domain's newest run, of these states where some are given."""
        query = sa.select(DistillationRun).where(DistillationRun.domain == domain)
        if states:
            query = query.where(DistillationRun.state.in_(states))
        with self._database.read() as session:
            row = session.scalar(query.order_by(DistillationRun.created_at.desc()).limit(1))
            return None if row is None else _run(row)

    # -- working ----------------------------------------------------------------------------------------------

    def claim(self, owner: str) -> Run | None:
        """The oldest run that nobody works on, now leased to ``owner``; None when there is none."""
        now = self._clock()
        dead = sa.and_(DistillationRun.state.in_(("running", "cancelling")), DistillationRun.lease_expires_at < now)
        query = sa.select(DistillationRun).where(sa.or_(DistillationRun.state == "queued", dead))
        with self._database.write(ordered=True) as session:
            for row in session.scalars(query.order_by(DistillationRun.created_at)).all():
                attempts = int(row.progress.get("attempts", 0)) + 1
                if row.state == "cancelling":
                    self._end(row, "cancelled")
                elif attempts > MOST_ATTEMPTS:
                    self._end(row, "failed")
                    row.error = f"given up: the process ended {attempts - 1} times in this run; see the server's log"
                else:
                    row.state, row.lease_owner, row.lease_expires_at = "running", owner, now + LEASE_SECONDS
                    row.progress = {**row.progress, "attempts": attempts}
                    return _run(row)
            return None

    def beat(self, run_id: str, owner: str, progress: Mapping[str, Any] | None = None) -> bool:
        """Still at it: extend the lease, note ``progress`` (merged); True when the end was asked for.

        Raises ``LeaseLost``.
        """
        with self._database.write() as session:
            row = _row(session, run_id)
            self._check_lease(row, owner)
            row.lease_expires_at = self._clock() + LEASE_SECONDS
            if progress:
                row.progress = {**row.progress, **progress}
            return row.state == "cancelling"

    def finish(
        self,
        run_id: str,
        owner: str,
        state: RunState,
        *,
        error: str | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> Run:
        """The run has ended as ``state``. Raises ``LeaseLost``."""
        if state in OPEN:
            raise ValueError(f"{state} is no end of a run")
        with self._database.write(ordered=True) as session:
            row = _row(session, run_id)
            self._check_lease(row, owner)
            self._end(row, state)
            row.error = error
            row.progress = {**row.progress, **(progress or {})}
            return _run(row)

    def hand_back(self, run_id: str, owner: str) -> None:
        """The process stops in an orderly way: the run waits for the next one, and this attempt does not count."""
        with self._database.write(ordered=True) as session:
            row = _row(session, run_id)
            self._check_lease(row, owner)
            if row.state == "cancelling":
                self._end(row, "cancelled")
                return
            row.state = "queued"
            row.lease_owner = row.lease_expires_at = None
            row.progress = {**row.progress, "attempts": max(0, int(row.progress.get("attempts", 1)) - 1)}

    def _end(self, row: DistillationRun, state: RunState) -> None:
        row.state, row.finished_at = state, self._clock()
        row.lease_owner = row.lease_expires_at = None

    @staticmethod
    def _check_lease(row: DistillationRun, owner: str) -> None:
        if row.lease_owner != owner or row.state not in ("running", "cancelling"):
            raise LeaseLost(f"run {row.id} is {row.state} and not led by {owner} any more")

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if rows contradict themselves."""
        with self._database.read() as session:
            rows = list(session.scalars(sa.select(DistillationRun)))
        led = [row.domain for row in rows if row.state in OPEN]
        assert len(led) == len(set(led)), "one open run a domain"
        for row in rows:
            assert (row.lease_owner is not None) == (row.state in ("running", "cancelling")), (row.id, row.state)
            assert (row.finished_at is None) == (row.state in OPEN), (row.id, row.state)


def _row(session: orm.Session, run_id: str) -> DistillationRun:
    row = session.get(DistillationRun, run_id)
    if row is None:
        raise RunNotFound(f"there is no run {run_id!r}; the list of runs has all of them")
    return row


def _run(row: DistillationRun) -> Run:
    state: Any = row.state
    return Run(
        id=row.id,
        domain=row.domain,
        state=state,
        trigger=row.trigger,
        config=dict(row.config),
        progress=dict(row.progress),
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )
