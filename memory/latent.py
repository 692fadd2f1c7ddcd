"""The virtual tokens of every session, across restarts: one row per session and model, holding one snapshot.

``LatentSessions.load`` and ``save`` are the persistence of ``workspace.virtual_kv``. A save is one transaction that is
committed, and on disk, when it returns; it replaces the row as a whole, so that ``kill -9`` leaves the old snapshot
or the new one. What is read is checked against its SHA-256, and a damaged row is an error, never an empty session:
it stays until somebody clears the session.

The bytes are not looked into here: the store validates them, and names the session when it refuses them.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.models import AuditEvent, LatentSession


class LatentError(RuntimeError):
    """A stored session cannot be used; the message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A row, without its snapshot."""

    session: str
    model_fingerprint: str
    size: int  #: bytes of the snapshot
    updated_at: float


class LatentSessions:
    """Snapshots of one model's sessions in the database. Safe to use from all threads."""

    def __init__(self, database: Database, model_fingerprint: str):
        if not 0 < len(model_fingerprint) <= 64:
            raise ValueError(f"a model fingerprint has 1 to 64 characters, got {model_fingerprint!r}")
        self._database = database
        self._model = model_fingerprint

    def load(self, session: str) -> bytes | None:
        """The snapshot that was saved last, or None. Raises ``LatentError`` when it is not what was saved."""
        with self._database.read() as transaction:
            row = transaction.get(LatentSession, (session, self._model))
            if row is None:
                return None
            data, expected = row.data, row.sha256
        if hashlib.sha256(data).hexdigest() != expected:
            raise LatentError(
                f"table latent_sessions: the virtual tokens of session {session!r} do not match their SHA-256; "
                "clear the session, or restore the database from a backup"
            )
        return data

    def save(self, session: str, snapshot: bytes | None) -> None:
        """Replace the session's snapshot; None removes it. It is committed when this returns."""
        own = (LatentSession.session_id == session, LatentSession.model_fingerprint == self._model)
        with self._database.write() as transaction:
            if snapshot is None:
                transaction.execute(sa.delete(LatentSession).where(*own))
                return
            values = {
                "data": snapshot,
                "size": len(snapshot),
                "sha256": hashlib.sha256(snapshot).hexdigest(),
                "updated_at": time.time(),
            }
            # Not through the row object, which would read the old snapshot first.
            if not _count(transaction.execute(sa.update(LatentSession).where(*own).values(values))):
                transaction.add(LatentSession(session_id=session, model_fingerprint=self._model, **values))

    def sessions(self, limit: int = 100) -> list[StoredSession]:
        """What is stored for this model, most recently saved first."""
        query = _rows().where(LatentSession.model_fingerprint == self._model).limit(limit)
        with self._database.read() as transaction:
            return [_stored(row) for row in transaction.execute(query)]

    def forget(self, session: str, actor: str = "local") -> int:
        """Remove a session's snapshots for every model; returns how many there were. It is noted in the audit log.

        Clear it in the store first: what is still in memory would be saved again.
        """
        statement = sa.delete(LatentSession).where(LatentSession.session_id == session)
        with self._database.write() as transaction:
            count = _count(transaction.execute(statement))
            if count:
                detail = {"session_id": session, "count": count}
                transaction.add(
                    AuditEvent(actor=actor, action="latent.forget", target="latent_sessions", detail=detail)
                )
            return count

    def prune(self, max_bytes: int) -> list[StoredSession]:
        """Remove the sessions of all models that were not saved for longest, until ``max_bytes`` hold the rest.

        Returns what was removed. A session that is in the store's memory lives on there until it is spilled.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        removed: list[StoredSession] = []
        with self._database.write() as transaction:
            total = 0
            for stored in [_stored(row) for row in transaction.execute(_rows())]:
                total += stored.size
                if total > max_bytes:
                    removed.append(stored)
                    key = (stored.session, stored.model_fingerprint)
                    columns = sa.tuple_(LatentSession.session_id, LatentSession.model_fingerprint)
                    transaction.execute(sa.delete(LatentSession).where(columns == key))
        return removed


def _rows() -> sa.Select[str, str, int, float]:
    """Everything but the snapshots, which may be large; newest first."""
    key = (LatentSession.session_id, LatentSession.model_fingerprint)
    query = sa.select(*key, LatentSession.size, LatentSession.updated_at)
    return query.order_by(LatentSession.updated_at.desc(), *key)


def _stored(row: sa.Row[str, str, int, float]) -> StoredSession:
    return StoredSession(row.session_id, row.model_fingerprint, row.size, row.updated_at)


def _count(result: sa.Result[Any]) -> int:
    """How many rows a statement changed."""
    return int(getattr(result, "rowcount", 0))
