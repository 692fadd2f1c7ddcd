"""The rows behind the episodic memory: texts as they are read for it, and vectors as they are kept.

A vector is written only for a living experience, in one transaction that looks; ``History`` removes it in the
transaction that sets the tombstone. So however a process ends, there is never a vector of something forgotten, and an
experience without a vector is one that is still to be embedded. Nothing here is a truth of its own: the table
``episodic_vectors`` can be emptied at any time, and is filled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from memory.catalog import Line
from memory.history import Record
from storage.database import Database
from storage.models import EpisodicVector, Experience

_PAGE = 500
_COLUMNS = (
    Experience.id,
    Experience.domain,
    Experience.session_id,
    Experience.created_at,
    Experience.score,
    Experience.observation,
    Experience.action,
    Experience.deleted_at,
)
_OBSERVED, _DONE = 1200, 800  # characters of an observation and of an action that count


@dataclass(frozen=True, slots=True)
class Remembered:
    """An experience as a search shows it: a row without the whole request."""

    id: int
    domain: str
    session_id: str | None
    observation: str
    action: str
    feedback: str | None
    score: float | None
    created_at: float

    def shown(self, longest: int) -> str:
        """Observation and action, each cut to ``longest`` characters."""
        said, done = (text[:longest].strip() for text in (self.observation, self.action))
        return f"{said}\n{done}" if said and done else said or done


@dataclass(frozen=True, slots=True)
class Page:
    """Rows in the order in which they were asked for, and the cursor behind them."""

    lines: list[Line]
    dead: list[int]  #: ids with a tombstone
    cursor: int


class EpisodicStore:
    """See the module docstring. Safe to use from all threads."""

    def __init__(self, database: Database):
        self._database = database

    def newest_id(self) -> int:
        """The highest id of any experience, 0 when there is none."""
        with self._database.read() as session:
            return int(session.scalar(sa.select(sa.func.max(Experience.id))) or 0)

    def after(self, cursor: int, limit: int = _PAGE) -> Page:
        """Experiences above ``cursor``, oldest first."""
        return self._lines(sa.select(*_COLUMNS).where(Experience.id > cursor).order_by(Experience.id), cursor, limit)

    def before(self, cursor: int, limit: int = _PAGE) -> Page:
        """Experiences below ``cursor``, newest first."""
        query = sa.select(*_COLUMNS).where(Experience.id < cursor).order_by(Experience.id.desc())
        return self._lines(query, cursor, limit)

    def texts(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """``(id, text)`` of those of ``ids`` that live, as they are embedded."""
        query = sa.select(*_COLUMNS).where(Experience.id.in_(ids), Experience.deleted_at.is_(None))
        with self._database.read() as session:
            return [(row.id, _text(row)) for row in session.execute(query)]

    def read(self, ids: Sequence[int]) -> dict[int, Remembered]:
        """Those of ``ids`` that live, by id."""
        columns = (*_COLUMNS[:-1], Experience.feedback)
        query = sa.select(*columns).where(Experience.id.in_(ids), Experience.deleted_at.is_(None))
        with self._database.read() as session:
            return {
                row.id: Remembered(
                    row.id,
                    row.domain,
                    row.session_id,
                    row.observation,
                    row.action,
                    row.feedback,
                    row.score,
                    row.created_at,
                )
                for row in session.execute(query)
            }

    def save(self, embedding: str, ids: Sequence[int], vectors: NDArray[np.float32]) -> list[int]:
        """Keep ``vectors`` [N, E] of those of ``ids`` that still live, and return which these are. Committed then."""
        by_id = dict(zip(ids, np.ascontiguousarray(vectors, "<f4"), strict=True))
        living = sa.select(Experience.id).where(Experience.id.in_(ids), Experience.deleted_at.is_(None))
        with self._database.write() as session:
            # The lock, which only PostgreSQL needs, makes a tombstone wait for us, or us see it.
            kept = list(session.scalars(living.with_for_update(read=True)))
            here = (EpisodicVector.embedding == embedding, EpisodicVector.experience_id.in_(kept))
            session.execute(sa.delete(EpisodicVector).where(*here))
            rows = [{"embedding": embedding, "experience_id": key, "vector": by_id[key].tobytes()} for key in kept]
            if rows:
                session.execute(sa.insert(EpisodicVector), rows)
        return kept

    def vectors(
        self, embedding: str, dimension: int, limit: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """``(ids [N], vectors [N, E])`` page by page, newest first, ``limit`` at most.

        Rows of another length are left out: they are embedded anew.
        """
        size, cursor = 4 * dimension, None
        while limit > 0:
            query = sa.select(EpisodicVector.experience_id, EpisodicVector.vector)
            query = query.where(EpisodicVector.embedding == embedding)
            if cursor is not None:
                query = query.where(EpisodicVector.experience_id < cursor)
            query = query.order_by(EpisodicVector.experience_id.desc()).limit(min(limit, 4 * _PAGE))
            with self._database.read() as session:
                page = [(row.experience_id, row.vector) for row in session.execute(query)]
            if not page:
                return
            cursor, limit = page[-1][0], limit - len(page)
            sound = [(key, data) for key, data in page if len(data) == size]
            ids = np.array([key for key, _ in sound], np.int64)
            matrix = np.frombuffer(b"".join(data for _, data in sound), "<f4").reshape(-1, dimension)
            whole = np.isfinite(matrix).all(axis=1)
            yield ids[whole], matrix[whole]

    def get(self, embedding: str, ids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """The vectors of ``ids``, as far as there are any."""
        query = sa.select(EpisodicVector.experience_id, EpisodicVector.vector)
        query = query.where(EpisodicVector.embedding == embedding, EpisodicVector.experience_id.in_(ids))
        with self._database.read() as session:
            return {row.experience_id: np.frombuffer(row.vector, "<f4") for row in session.execute(query)}

    def forget_others(self, embedding: str) -> int:
        """Remove the vectors of all other embeddings; returns how many."""
        with self._database.write() as session:
            result = session.execute(sa.delete(EpisodicVector).where(EpisodicVector.embedding != embedding))
            return int(getattr(result, "rowcount", 0))

    def counts(self) -> dict[str, int]:
        """How many vectors of each embedding are kept."""
        query = sa.select(EpisodicVector.embedding, sa.func.count()).group_by(EpisodicVector.embedding)
        with self._database.read() as session:
            return {name: count for name, count in session.execute(query)}

    def _lines(self, query: Any, cursor: int, limit: int) -> Page:
        with self._database.read() as session:
            rows = list(session.execute(query.limit(limit)))
        lines = [
            Line(row.id, row.domain, row.session_id, row.created_at, row.score, _text(row))
            for row in rows
            if row.deleted_at is None
        ]
        dead = [row.id for row in rows if row.deleted_at is not None]
        return Page(lines, dead, rows[-1].id if rows else cursor)


def line_of(record: Record) -> Line:
    """A record as the index takes it."""
    return Line(record.id, record.domain, record.session_id, record.created_at, record.score, _text(record))


def _text(row: Any) -> str:
    """What counts of an experience, for its words and for its meaning."""
    return f"{row.observation[:_OBSERVED]}\n{row.action[:_DONE]}".strip()
