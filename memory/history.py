"""The history: the one append-only record of what was lived through.

Everything that learns reads from here by increasing id: experience buffers, the episodic index, distillation.
Nobody keeps a second truth. An exchange is one row, written in one transaction before its request is acknowledged
as finished, so ``kill -9`` can lose an answer in flight but never one that the client saw end.

Deleting sets a tombstone: the row's text is blanked at once, its id stays so that cursors do not move. What was
derived from the text and lies in the same database (``episodic_vectors``) goes in the same transaction. A correction is
a new experience and the tombstone of the old one.
Not here: what an experience teaches (``olympus``), how it is recalled (episodic memory).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import orm

from storage.database import Database
from storage.models import AuditEvent, EpisodicVector, Experience, Session

EntryType = Literal["Observation", "Action", "Feedback"]
_PAGE = 500
Listener = Callable[[list["Record"]], None]
ChangeListener = Callable[[Sequence[int]], None]


class HistoryError(ValueError):
    """The history was asked for something it cannot do; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an agent's life, as the agents and the snapshots see it."""

    type: EntryType
    content: str


@dataclass(frozen=True, slots=True)
class NewExperience:
    """What a caller wants remembered. ``request_id`` makes a retry harmless: the first write wins."""

    observation: str
    action: str
    domain: str
    source: str
    feedback: str | None = None
    score: float | None = None
    session_id: str | None = None
    episode_id: str | None = None
    messages: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not self.domain or len(self.domain) > 64:
            raise HistoryError("domain: give a name of 1 to 64 characters")
        if not self.observation and not self.action:
            raise HistoryError("an experience needs an observation, an action, or both")
        if any("\x00" in text for text in (self.observation, self.action, self.feedback or "")):
            raise HistoryError("text must not contain NUL characters")  # PostgreSQL cannot store them


@dataclass(frozen=True, slots=True)
class Record:
    """A stored experience. ``deleted`` ones have empty texts."""

    id: int
    domain: str
    source: str
    observation: str
    action: str
    feedback: str | None
    score: float | None
    session_id: str | None
    episode_id: str | None
    messages: list[dict[str, Any]] | None
    meta: dict[str, Any]
    content_hash: str
    created_at: float
    deleted: bool

    def entries(self) -> list[Entry]:
        """The record as agent entries, in the order they happened."""
        named: list[tuple[EntryType, str | None]] = [
            ("Observation", self.observation),
            ("Action", self.action),
            ("Feedback", self.feedback),
        ]
        return [Entry(kind, text) for kind, text in named if text]


def content_hash(observation: str, action: str) -> str:
    """Hex SHA-256 of what was observed and done; equal content, equal hash, whatever the feedback."""
    return hashlib.sha256(f"{len(observation)}:{observation}{action}".encode()).hexdigest()


class History:
    """Append, read by cursor, give feedback, delete. Safe to use from all threads."""

    def __init__(self, database: Database):
        self._database = database
        self._listeners: list[Listener] = []
        self._change_listeners: list[ChangeListener] = []
        self._listeners_lock = threading.Lock()

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener(records)`` after each commit, in the writer's thread: it must return at once."""
        with self._listeners_lock:
            self._listeners.append(listener)

    def subscribe_changes(self, listener: ChangeListener) -> None:
        """Call ``listener(ids)`` after records were judged or deleted, before the caller hears that they were.

        In the writer's thread: it must return at once. ``verdicts`` says what became of them.
        """
        with self._listeners_lock:
            self._change_listeners.append(listener)

    def append(self, items: Sequence[NewExperience]) -> list[Record]:
        """Write ``items`` in one transaction and return them stored, in order.

        An item whose ``request_id`` is known already is not written again: the stored one is returned.
        """
        fresh: list[Record] = []
        stored: list[Record] = []
        with self._database.write(ordered=True) as session:
            known = self._known(session, [item.request_id for item in items if item.request_id])
            for item in items:
                row = known.get(item.request_id or "")
                if row is None:
                    row = _row(item)
                    session.add(row)
                    session.flush()
                    if item.request_id:
                        known[item.request_id] = row
                    self._touch_session(session, item, row.created_at)
                    fresh.append(_record(row))
                stored.append(_record(row))
        self._tell_new(fresh)
        return stored

    def page(
        self,
        *,
        domain: str | None = None,
        session_id: str | None = None,
        before: int | None = None,
        limit: int = 50,
        include_deleted: bool = False,
    ) -> list[Record]:
        """The newest ``limit`` records older than id ``before``, newest first."""
        query = sa.select(Experience).order_by(Experience.id.desc()).limit(limit)
        if before is not None:
            query = query.where(Experience.id < before)
        return self._fetch(_filtered(query, domain, session_id, include_deleted))

    def since(self, cursor: int, *, domain: str | None = None, limit: int = 500) -> list[Record]:
        """Up to ``limit`` records with id above ``cursor``, oldest first, tombstones included.

        Tombstones are included so that a reader that remembers texts learns to forget them.
        """
        query = sa.select(Experience).where(Experience.id > cursor).order_by(Experience.id).limit(limit)
        return self._fetch(_filtered(query, domain, None, include_deleted=True))

    def get(self, experience_id: int) -> Record | None:
        """One record, or None."""
        with self._database.read() as session:
            row = session.get(Experience, experience_id)
            return None if row is None else _record(row)

    def many(self, ids: Sequence[int]) -> list[Record]:
        """The records of ``ids`` by increasing id, tombstones included; unknown ids are absent."""
        found: list[Record] = []
        for some in _pages(ids):
            found += self._fetch(sa.select(Experience).where(Experience.id.in_(some)))
        return sorted(found, key=lambda record: record.id)

    def verdicts(self, ids: Sequence[int]) -> list[tuple[int, float | None, bool]]:
        """``(id, score, deleted)`` of ``ids``, without their texts; unknown ids are absent.

        Judgements and tombstones change rows below a reader's cursor: this is how it learns of them.
        """
        found: list[tuple[int, float | None, bool]] = []
        for some in _pages(ids):
            columns = (Experience.id, Experience.score, Experience.deleted_at)
            with self._database.read() as session:
                rows = session.execute(sa.select(*columns).where(Experience.id.in_(some)))
                found += [(row.id, row.score, row.deleted_at is not None) for row in rows]
        return found

    def known_contents(self, domain: str, hashes: Sequence[str]) -> dict[str, int]:
        """Content hash -> oldest id, for those of ``hashes`` that ``domain`` holds and that are not deleted."""
        known: dict[str, int] = {}
        for some in _pages(hashes):
            query = sa.select(Experience.content_hash, Experience.id).where(Experience.content_hash.in_(some))
            query = _filtered(query, domain, None, include_deleted=False).order_by(Experience.id.desc())
            with self._database.read() as session:
                known.update({row.content_hash: row.id for row in session.execute(query)})
        return known

    def content_counts(self, domain: str, hashes: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Content hash -> how many rows of ``domain`` have it, and how many of those are tombstones; 0 is absent."""
        found: dict[str, tuple[int, int]] = {}
        columns = (Experience.content_hash, sa.func.count(Experience.id), sa.func.count(Experience.deleted_at))
        for some in _pages(hashes):
            query = sa.select(*columns).where(Experience.domain == domain, Experience.content_hash.in_(some))
            with self._database.read() as session:
                rows = session.execute(query.group_by(Experience.content_hash))
                found.update({name: (count, deleted) for name, count, deleted in rows})
        return found

    def find_request(self, request_id: str) -> Record | None:
        """What was written for this request id, if anything was."""
        with self._database.read() as session:
            row = session.scalar(sa.select(Experience).where(Experience.request_id == request_id))
            return None if row is None else _record(row)

    def count(self, *, domain: str | None = None) -> int:
        """How many records are not deleted."""
        query = _filtered(sa.select(sa.func.count(Experience.id)), domain, None, include_deleted=False)
        with self._database.read() as session:
            return session.scalar(query) or 0

    def domains(self) -> dict[str, tuple[int, int]]:
        """Of every domain with records that are not deleted: how many, and the newest id."""
        query = sa.select(Experience.domain, sa.func.count(Experience.id), sa.func.max(Experience.id))
        query = query.where(Experience.deleted_at.is_(None)).group_by(Experience.domain)
        with self._database.read() as session:
            return {domain: (count, newest) for domain, count, newest in session.execute(query)}

    def give_feedback(self, experience_id: int, feedback: str | None, score: float | None) -> Record | None:
        """Attach what came back later to a record; None when there is no such record."""
        with self._database.write() as session:
            row = session.get(Experience, experience_id)
            if row is None or row.deleted_at is not None:
                return None
            row.feedback, row.score = feedback, score
            record = _record(row)
        self._tell_changed([experience_id])
        return record

    def correct(
        self,
        experience_id: int,
        *,
        observation: str | None = None,
        action: str | None = None,
        feedback: str | None = None,
        score: float | None = 1.0,
        actor: str = "local",
    ) -> Record | None:
        """Put a new experience with what is given here in a record's place, and forget the old one, in one transaction.

        What is not given stays. ``meta["corrects"]`` of the new one names the old one. Who corrects knows how it
        is right, so that it counts as confirmed (``score``). None when there is no such record; raises ``HistoryError``
        when nothing would be different.
        """
        with self._database.write(ordered=True) as session:
            old = session.get(Experience, experience_id)
            if old is None or old.deleted_at is not None:
                return None
            item = NewExperience(
                observation=old.observation if observation is None else observation,
                action=old.action if action is None else action,
                domain=old.domain,
                source="correction",
                feedback=feedback,
                score=score,
                session_id=old.session_id,
                episode_id=old.episode_id,
                messages=old.messages if observation in (None, old.observation) else None,  # they end with it
                meta={**old.meta, "corrects": old.id},
            )
            if (item.observation, item.action) == (old.observation, old.action):
                raise HistoryError("a correction changes the observation or the action; to judge them, give feedback")
            row = _row(item)
            session.add(row)
            session.flush()
            _forget(session, [Experience.id == experience_id])
            detail = {"id": experience_id, "by": row.id}
            session.add(AuditEvent(actor=actor, action="history.correct", target="experiences", detail=detail))
            record = _record(row)
        self._tell_changed([experience_id])
        self._tell_new([record])
        return record

    def sessions_of(
        self, *, experience_id: int | None = None, session_id: str | None = None, domain: str | None = None
    ) -> list[str]:
        """The sessions that hold what ``delete`` with the same filters would delete."""
        given = {Experience.id: experience_id, Experience.session_id: session_id, Experience.domain: domain}
        filters = [column == value for column, value in given.items() if value is not None]
        query = sa.select(Experience.session_id).distinct().where(*filters, Experience.session_id.is_not(None))
        with self._database.read() as session:
            return sorted(str(name) for name in session.scalars(query))

    def delete(
        self,
        *,
        experience_id: int | None = None,
        session_id: str | None = None,
        domain: str | None = None,
        actor: str = "local",
    ) -> int:
        """Tombstone what matches all the given filters and blank its text; returns how many.

        ``actor`` is noted in the audit log, with the filters and the number, never with what was deleted.

        Raises ``HistoryError`` when no filter is given: forgetting everything must be asked for by domain.
        """
        given = {Experience.id: experience_id, Experience.session_id: session_id, Experience.domain: domain}
        filters = [column == value for column, value in given.items() if value is not None]
        if not filters:
            raise HistoryError("say what to delete: an id, a session, or a domain")
        with self._database.write() as session:
            ids = _forget(session, filters)
            if ids:
                named = {column.key: value for column, value in given.items() if value is not None}
                detail = {**named, "count": len(ids)}
                session.add(AuditEvent(actor=actor, action="history.delete", target="experiences", detail=detail))
        self._tell_changed(ids)
        return len(ids)

    def sessions(self, limit: int = 100) -> list[dict[str, Any]]:
        """The conversations of which something is left, most recently used first, as plain dicts."""
        left = sa.exists().where(Experience.session_id == Session.id, Experience.deleted_at.is_(None))
        query = sa.select(Session).where(left).order_by(Session.updated_at.desc()).limit(limit)
        with self._database.read() as session:
            return [
                {"id": row.id, "title": row.title, "domain": row.domain, "updated_at": row.updated_at}
                for row in session.scalars(query)
            ]

    def _fetch(self, query: Any) -> list[Record]:
        with self._database.read() as session:
            return [_record(row) for row in session.scalars(query)]

    def _tell_new(self, records: list[Record]) -> None:
        with self._listeners_lock:
            listeners = list(self._listeners)
        for listener in listeners if records else ():
            listener(records)

    def _tell_changed(self, ids: Sequence[int]) -> None:
        with self._listeners_lock:
            listeners = list(self._change_listeners)
        for listener in listeners if ids else ():
            listener(ids)

    @staticmethod
    def _known(session: orm.Session, request_ids: list[str]) -> dict[str, Experience]:
        if not request_ids:
            return {}
        rows = session.scalars(sa.select(Experience).where(Experience.request_id.in_(request_ids)))
        return {row.request_id: row for row in rows if row.request_id}

    @staticmethod
    def _touch_session(session: orm.Session, item: NewExperience, now: float) -> None:
        if item.session_id is None:
            return
        row = session.get(Session, item.session_id)
        if row is None:
            session.add(Session(id=item.session_id, title=_title(item.observation), domain=item.domain, updated_at=now))
            session.flush()
        else:
            row.updated_at = now
            row.title = row.title or _title(item.observation)  # what gave it its name was forgotten


def _pages(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Few enough values for one IN list."""
    for begin in range(0, len(items), _PAGE):
        yield items[begin : begin + _PAGE]


def _filtered(query: Any, domain: str | None, session_id: str | None, include_deleted: bool) -> Any:
    if domain is not None:
        query = query.where(Experience.domain == domain)
    if session_id is not None:
        query = query.where(Experience.session_id == session_id)
    return query if include_deleted else query.where(Experience.deleted_at.is_(None))


def _forget(session: orm.Session, filters: Sequence[Any]) -> list[int]:
    """Set the tombstones of what matches, blank the texts, remove what was derived from them; returns their ids."""
    now = time.time()
    living, doomed = [*filters, Experience.deleted_at.is_(None)], [*filters, Experience.deleted_at == now]
    blank: dict[str, Any] = {"observation": "", "action": "", "feedback": None, "messages": None, "meta": {}}
    session.execute(sa.update(Experience).where(*living).values(deleted_at=now, **blank))
    # The rows are locked from here on: on PostgreSQL, too, nobody can derive anything from them any more.
    chosen = sa.select(Experience.id).where(*doomed)
    session.execute(sa.delete(EpisodicVector).where(EpisodicVector.experience_id.in_(chosen)))
    sessions = sa.select(Experience.session_id).where(*doomed, Experience.session_id.is_not(None))
    for conversation in session.scalars(sa.select(Session).where(Session.id.in_(sessions))):
        conversation.title = _title(_first_words(session, conversation.id))
    return list(session.scalars(chosen))


def _title(observation: str) -> str:
    """What a conversation is called: how it begins."""
    return " ".join(observation.split())[:80]


def _first_words(session: orm.Session, session_id: str) -> str:
    """The oldest observation of a conversation that was not forgotten; "" when none is left."""
    mine = (Experience.session_id == session_id, Experience.deleted_at.is_(None))
    return session.scalar(sa.select(Experience.observation).where(*mine).order_by(Experience.id).limit(1)) or ""


def _row(item: NewExperience) -> Experience:
    return Experience(
        domain=item.domain,
        session_id=item.session_id,
        episode_id=item.episode_id,
        source=item.source,
        observation=item.observation,
        action=item.action,
        feedback=item.feedback,
        score=item.score,
        messages=item.messages,
        meta=item.meta,
        content_hash=content_hash(item.observation, item.action),
        request_id=item.request_id,
        created_at=time.time(),
    )


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
        messages=row.messages,
        meta=row.meta,
        content_hash=row.content_hash,
        created_at=row.created_at,
        deleted=row.deleted_at is not None,
    )
