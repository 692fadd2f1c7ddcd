"""Keeps an experience buffer in step with the history: new rows, late judgements, deletions.

New rows are read by cursor. Judgements and tombstones change rows *below* the cursor, so the rows of the ids that
the buffer holds or watches are looked at again, without their texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from memory.history import History, Record
from olympus.experience_buffer import ExperienceBuffer
from olympus.requests import ALL_DOMAINS
from storage.database import Database
from storage.models import Experience

_PAGE = 500


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one synchronisation changed."""

    added: int = 0
    forgotten: int = 0


class ExperienceSource:
    """The part of the history that one kernel learns from: a domain, or all of them."""

    def __init__(self, database: Database, history: History, domain: str):
        self._database = database
        self._history = history
        self.domain = None if domain == ALL_DOMAINS else domain

    def concerns(self, domain: str) -> bool:
        """True when a new experience of ``domain`` is for this kernel."""
        return self.domain is None or domain == self.domain

    def has_after(self, cursor: int) -> bool:
        """True when the history holds something for this kernel after ``cursor``."""
        return bool(self._history.since(cursor, domain=self.domain, limit=1))

    def read_new(self, buffer: ExperienceBuffer) -> int:
        """Add everything after the buffer's cursor; returns how many examples came in."""
        added = 0
        while True:
            records = self._history.since(buffer.cursor, domain=self.domain, limit=_PAGE)
            added += sum(buffer.add(record) in ("training", "holdout") for record in records)
            if len(records) < _PAGE:
                return added

    def sync(self, buffer: ExperienceBuffer) -> SyncReport:
        """Read what is new, then apply deletions and judgements to what is held."""
        added = self.read_new(buffer)
        gone: list[int] = []
        reconsider: list[int] = []
        held = set(buffer.held_ids)
        watched = held - {example.id for example in buffer.training()} - {item.id for item in buffer.holdout()}
        seen: set[int] = set()
        for example_id, score, deleted_at in self._verdicts(sorted(held)):
            seen.add(example_id)
            if deleted_at is not None:
                gone.append(example_id)
            elif example_id not in watched:
                buffer.judge(example_id, score)
            elif score is not None and score >= 0:
                reconsider.append(example_id)
        forgotten = buffer.forget([*gone, *(held - seen)])
        added += sum(buffer.add(record) in ("training", "holdout") for record in self.records(reconsider))
        return SyncReport(added, forgotten)

    def records(self, ids: Sequence[int]) -> list[Record]:
        """The stored records of ``ids``, by id; unknown ids are absent."""
        found: list[Record] = []
        for begin in range(0, len(ids), _PAGE):
            query = sa.select(Experience).where(Experience.id.in_(ids[begin : begin + _PAGE]))
            with self._database.read() as session:
                found += [_record(row) for row in session.scalars(query)]
        return sorted(found, key=lambda record: record.id)

    def restore(self, buffer: ExperienceBuffer, state: dict[str, Any]) -> None:
        """Fill ``buffer`` from a checkpoint's state."""
        buffer.load_state_dict(state, self.records(ExperienceBuffer.ids_in(state)))

    def _verdicts(self, ids: Sequence[int]) -> Iterator[tuple[int, float | None, float | None]]:
        columns = (Experience.id, Experience.score, Experience.deleted_at)
        for begin in range(0, len(ids), _PAGE):
            query = sa.select(*columns).where(Experience.id.in_(ids[begin : begin + _PAGE]))
            with self._database.read() as session:
                rows = [(row.id, row.score, row.deleted_at) for row in session.execute(query)]
            yield from rows


def known_contents(database: Database, domain: str, hashes: Sequence[str]) -> dict[str, int]:
    """Content hash -> id, for those of ``hashes`` that the domain's history holds and that are not deleted."""
    known: dict[str, int] = {}
    for begin in range(0, len(hashes), _PAGE):
        some = Experience.content_hash.in_(hashes[begin : begin + _PAGE])
        query = sa.select(Experience.content_hash, Experience.id).where(
            some, Experience.domain == domain, Experience.deleted_at.is_(None)
        )
        with database.read() as session:
            known.update({row.content_hash: row.id for row in session.execute(query.order_by(Experience.id.desc()))})
    return known


def _record(row: Experience) -> Record:
    return Record(
        id=row.id,
        domain=row.domain,
        source=row.source,
        observation=row.observation,
        action=row.action,
        feedback=row.feedback,
        score=row.score,
        session_id=row.session_id,
        episode_id=row.episode_id,
        messages=None,  # a kernel learns from the last turn only
        meta=row.meta,
        content_hash=row.content_hash,
        created_at=row.created_at,
        deleted=row.deleted_at is not None,
    )
