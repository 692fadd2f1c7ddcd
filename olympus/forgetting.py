"""What was learned from what, asked before something is forgotten: nothing is changed here.

``preview`` says what a deletion would reach: how many experiences, the cartridges that would become stale, the kernels
that rehearse them, the virtual tokens that their sessions keep. ``taught`` is the way back: what a cartridge learned
from. The deletion itself is ``workbench.forget_experiences``.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from memory.history import History, HistoryError, Record
from olympus.requests import ALL_DOMAINS
from storage.database import Database
from storage.models import Cartridge, Experience, Kernel, LatentSession


class Forgetting:
    """Reads only; safe to use from all threads."""

    def __init__(self, database: Database, history: History):
        self._database = database
        self._history = history

    def taught(self, cartridge_id: str, before: int | None = None, limit: int = 50) -> tuple[list[Record], int, int]:
        """What a cartridge was trained on and is still there, newest first, at most ``limit`` below id ``before``.

        With it, how many there were, and how many of them are forgotten by now. A deleted cartridge has no list.
        """
        with self._database.read() as session:
            ids = session.scalar(sa.select(Cartridge.experience_ids).where(Cartridge.id == cartridge_id)) or []
        alive = sorted((known for known, _, deleted in self._history.verdicts(ids) if not deleted), reverse=True)
        chosen = [known for known in alive if before is None or known < before][:limit]
        return list(reversed(self._history.many(chosen))), len(ids), len(ids) - len(alive)

    def preview(self, *, session_id: str | None = None, domain: str | None = None) -> dict[str, Any]:
        """What deleting a session, a domain, or the part of a domain in a session would reach.

        Raises ``HistoryError`` without either.
        """
        given = {Experience.session_id: session_id, Experience.domain: domain}
        filters = [column == value for column, value in given.items() if value is not None]
        if not filters:
            raise HistoryError("say what would be forgotten: a session, or a domain")
        query = sa.select(Experience.id, Experience.domain, Experience.session_id)
        with self._database.read() as session:
            rows = session.execute(query.where(*filters, Experience.deleted_at.is_(None))).all()
            sessions = {row.session_id for row in rows if row.session_id is not None}
            latent = session.scalars(sa.select(LatentSession.session_id).distinct())
            kernels = session.execute(sa.select(Kernel.id, Kernel.domain).order_by(Kernel.created_at))
            domains = {row.domain for row in rows} | ({ALL_DOMAINS} if rows else set())
            return {
                "experiences": len(rows),
                "sessions": len(sessions),
                "cartridges": _learners(session, {row.id for row in rows}),
                "kernels": [row.id for row in kernels if row.domain in domains],
                "sessions_with_virtual_tokens": len(sessions.intersection(latent)),
            }


def _learners(session: Any, ids: set[int]) -> list[dict[str, Any]]:
    """The cartridges that were trained on any of ``ids``, newest first."""
    rows = session.scalars(
        sa.select(Cartridge).where(Cartridge.state != "deleted").order_by(Cartridge.created_at.desc())
    )
    found = [(row, len(ids.intersection(row.experience_ids))) for row in rows]
    return [
        {"id": row.id, "state": row.state, "stale": row.stale, "learned": count, "experiences": len(row.experience_ids)}
        for row, count in found
        if count
    ]
