"""Which cartridges exist, what each is allowed to do, and which one serves a domain.

A cartridge is a folder named by its id (``files.py``) and a row. The folder is written first, whole; then the row. Ids
and folders never change and are never given twice, so whoever holds an id holds the same numbers for ever.

    candidate -> serving -> retired        one serves per domain; promoting is one transaction, in which the one
        |          ^           |           before is retired
        |          `-----------'           (rollback, or promoted again)
        `-> rejected                       any of them but a serving one -> deleted, whose row stays

``stale`` is no state: something that the cartridge was trained on was forgotten since. It goes on serving until a new
one is promoted, but is not promoted itself. What is learned of a cartridge later (``metrics`` of the gate) stands in
the row; the manifest is as it was written.

Not here: loading (``shelf.py``), what a gate measures, telling anybody of a change.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import orm

from memory.cartridges.errors import CartridgeConflict, CartridgeNotFound
from memory.cartridges.ids import MOST_CHARACTERS, check_id, domain_part, make_id
from memory.cartridges.manifest import Manifest
from memory.cartridges.rows import CartridgeRow, detached
from storage import files
from storage.database import Database
from storage.models import AuditEvent, Experience
from storage.models import Cartridge as Row

if TYPE_CHECKING:  # it brings torch, which the server imports with the model
    from memory.cartridges.cartridge import Cartridge

_PAGE = 500


class CartridgeRegistry:
    """The cartridges of one data directory. Safe to use from all threads; ``recover`` it once at start-up."""

    def __init__(self, database: Database, folder: Path):
        self._database = database
        self.folder = folder
        self._registering = threading.Lock()

    # Reading.

    def get(self, cartridge_id: str) -> CartridgeRow:
        """The row of an id. Raises ``InvalidCartridgeId``, ``CartridgeNotFound`` (also when it was deleted)."""
        check_id(cartridge_id)
        with self._database.read() as session:
            row = session.get(Row, cartridge_id)
            return detached(_existing(row, cartridge_id))

    def list(
        self,
        domain: str | None = None,
        *,
        state: str | None = None,
        deleted: bool = False,
        experience: int | None = None,
    ) -> Sequence[CartridgeRow]:
        """All that are not deleted, newest first. ``experience``: only those that were trained on it."""
        query = sa.select(Row).order_by(Row.created_at.desc(), Row.version.desc())
        if domain is not None:
            query = query.where(Row.domain == domain)
        if state is not None:
            query = query.where(Row.state == state)
        if not deleted:
            query = query.where(Row.state != "deleted")
        with self._database.read() as session:
            rows = session.scalars(query)
            return [detached(row) for row in rows if experience is None or experience in row.experience_ids]

    def lineage(self, domain: str) -> Sequence[CartridgeRow]:
        """Every cartridge that a domain ever had, oldest first, deleted ones included."""
        query = sa.select(Row).where(Row.domain == domain).order_by(Row.version)
        with self._database.read() as session:
            return [detached(row) for row in session.scalars(query)]

    def serving(self, domain: str) -> CartridgeRow | None:
        """The one that serves ``domain`` now."""
        query = sa.select(Row).where(Row.domain == domain, Row.state == "serving")
        with self._database.read() as session:
            row = session.scalars(query).first()
            return None if row is None else detached(row)

    def resolve(self, name: str) -> CartridgeRow:
        """An id, or a domain (or the first part of its ids), which means the one that serves it now.

        Raises ``InvalidCartridgeId`` or ``CartridgeNotFound``.
        """
        if len(name) > MOST_CHARACTERS or not name.isprintable():  # no database is asked about those
            check_id(name)
        with self._database.read() as session:
            query = sa.select(Row).where(Row.state == "serving", Row.domain == name)
            row = session.get(Row, name) or session.scalars(query).first()
            if row is None:
                serving = session.scalars(sa.select(Row).where(Row.state == "serving"))
                row = next((item for item in serving if domain_part(item.domain) == name), None)
            if row is None:
                check_id(name)
            return detached(_existing(row, name))

    def path(self, cartridge_id: str) -> Path:
        """The folder of an id, which must be one."""
        return self.folder / check_id(cartridge_id)

    # Writing.

    def register(self, cartridge: Cartridge, *, actor: str = "local") -> CartridgeRow:
        """Give ``cartridge`` the next version of its domain and keep it as a candidate; durable when this returns.

        Raises ``ValueError`` for numbers that are not finite, ``OSError`` on a full disk; nothing is kept then.
        """
        from memory.cartridges.files import save_cartridge

        domain = cartridge.manifest.domain
        with self._registering:
            version = self._next_version(domain)
            while True:
                named = {"id": make_id(domain, version), "version": version}
                own = replace(cartridge, manifest=cartridge.manifest.model_copy(update=named))
                try:
                    manifest = save_cartridge(self.folder / own.manifest.id, own)
                    break
                except FileExistsError:  # of a process that shares the folder
                    version += 1
            return self._insert(manifest, own.experience_ids, actor, "cartridge.register")

    def promote(
        self,
        cartridge_id: str,
        *,
        actor: str = "local",
        reason: str = "",
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> CartridgeRow:
        """Let it serve its domain from now on; the one before is retired in the same transaction.

        ``force`` also takes a rejected or stale one. Raises ``CartridgeConflict`` for those, ``CartridgeNotFound``.
        """
        with self._write(cartridge_id) as (session, row):
            if row.state == "serving":
                return detached(row)
            if not force and (row.state == "rejected" or row.stale):
                why = "is stale: something that it was trained on was forgotten since"
                if row.state == "rejected":
                    why = f"was rejected ({row.state_reason or 'no reason given'})"
                raise CartridgeConflict(f"{cartridge_id} {why}; distil a new one, or promote it with force")
            before = self._retire_serving(session, row.domain, f"{cartridge_id} was promoted")
            row.state, row.state_reason = "serving", reason
            row.promoted_at, row.replaced_id = time.time(), before
            _note_metrics(row, metrics)
            detail = {"domain": row.domain, "before": before, "reason": reason, "forced": force}
            session.add(AuditEvent(actor=actor, action="cartridge.promote", target=cartridge_id, detail=detail))
            return detached(row)

    def reject(
        self, cartridge_id: str, reason: str, *, actor: str = "local", metrics: Mapping[str, Any] | None = None
    ) -> CartridgeRow:
        """A candidate is not good enough. Raises ``CartridgeConflict`` for any other state, ``CartridgeNotFound``."""
        with self._write(cartridge_id) as (session, row):
            if row.state != "candidate":
                raise CartridgeConflict(f"{cartridge_id} is {row.state}; only a candidate can be rejected")
            row.state, row.state_reason = "rejected", reason
            _note_metrics(row, metrics)
            session.add(
                AuditEvent(actor=actor, action="cartridge.reject", target=cartridge_id, detail={"reason": reason})
            )
            return detached(row)

    def retire(self, cartridge_id: str, reason: str = "", *, actor: str = "local") -> CartridgeRow:
        """Let it serve no longer, with nothing in its place. Raises ``CartridgeConflict``, ``CartridgeNotFound``."""
        with self._write(cartridge_id) as (session, row):
            if row.state != "serving":
                raise CartridgeConflict(f"{cartridge_id} is {row.state}; only the serving one can be retired")
            row.state, row.state_reason = "retired", reason
            session.add(
                AuditEvent(actor=actor, action="cartridge.retire", target=cartridge_id, detail={"reason": reason})
            )
            return detached(row)

    def rollback(self, domain: str, *, actor: str = "local", reason: str = "") -> CartridgeRow:
        """Back to the one that served before; called again, one further back. Stale ones are passed over.

        Raises ``CartridgeConflict`` when nothing serves, or nothing served before.
        """
        with self._database.write(ordered=True) as session:
            now = session.scalars(sa.select(Row).where(Row.domain == domain, Row.state == "serving")).first()
            if now is None:
                raise CartridgeConflict(f"nothing serves the domain {domain!r}; promote a cartridge instead")
            before = self._servable_before(session, now)
            if before is None:
                raise CartridgeConflict(
                    f"no cartridge that may serve did so before {now.id} in the domain {domain!r}; retire {now.id} to "
                    "serve without one, or promote another"
                )
            now.state, now.state_reason = "retired", reason or f"rolled back to {before.id}"
            before.state, before.state_reason = "serving", f"rolled back from {now.id}"
            detail = {"domain": domain, "before": now.id, "reason": reason}
            session.add(AuditEvent(actor=actor, action="cartridge.rollback", target=before.id, detail=detail))
            return detached(before)

    def note_metrics(self, cartridge_id: str, metrics: Mapping[str, Any]) -> CartridgeRow:
        """Add what was measured to what is known of it. Raises ``CartridgeNotFound``."""
        with self._write(cartridge_id) as (_, row):
            _note_metrics(row, metrics)
            return detached(row)

    def delete(self, cartridge_id: str, *, actor: str = "local") -> CartridgeRow:
        """Remove its tensors for good; the row stays. Raises ``CartridgeConflict`` for a serving one."""
        with self._write(cartridge_id) as (session, row):
            if row.state == "serving":
                raise CartridgeConflict(f"{cartridge_id} serves {row.domain!r}; promote another or retire it first")
            row.state, row.state_reason, row.experience_ids = "deleted", f"was {row.state}", []
            session.add(AuditEvent(actor=actor, action="cartridge.delete", target=cartridge_id, detail={}))
            deleted = detached(row)
        if (self.folder / cartridge_id).is_dir():  # a crash before this leaves it to ``recover``
            files.remove_directory(self.folder / cartridge_id)
        return deleted

    def mark_stale(self, experience_ids: Iterable[int], *, actor: str = "local") -> Sequence[CartridgeRow]:
        """Mark what was trained on any of these experiences; returns those that were not stale before."""
        gone = set(experience_ids)
        with self._database.write() as session:
            query = sa.select(Row).where(Row.state != "deleted", Row.stale.is_(False))
            hit = [row for row in session.scalars(query) if gone.intersection(row.experience_ids)]
            for row in hit:
                row.stale = True
                count = len(gone.intersection(row.experience_ids))
                session.add(
                    AuditEvent(actor=actor, action="cartridge.stale", target=row.id, detail={"experiences": count})
                )
            return [detached(row) for row in hit]

    def refresh_stale(self, *, actor: str = "local") -> Sequence[CartridgeRow]:
        """Mark what was trained on experiences that are forgotten by now; returns those that were not stale before.

        Reads the history's tombstones, so it also finds what a crash between forgetting and marking left.
        """
        with self._database.read() as session:
            query = sa.select(Row.experience_ids).where(Row.state != "deleted", Row.stale.is_(False))
            known = sorted({number for ids in session.scalars(query) for number in ids})
            gone: set[int] = set()
            for start in range(0, len(known), _PAGE):
                page = known[start : start + _PAGE]
                forgotten = sa.select(Experience.id).where(Experience.id.in_(page), Experience.deleted_at.is_not(None))
                gone.update(session.scalars(forgotten))
        return self.mark_stale(gone, actor=actor) if gone else []

    # Start-up, and the truth.

    def recover(self) -> dict[str, str]:
        """Bring folders and rows together after a crash; returns what was done or found, by id (``recovery.py``)."""
        from memory.cartridges.recovery import recover

        told = recover(self, self._database)
        self.refresh_stale()
        return told

    def adopt(self, manifest: Manifest, experience_ids: Iterable[int]) -> CartridgeRow:
        """A row for a folder that lies there already; for ``recovery.py``."""
        return self._insert(manifest, experience_ids, "system", "cartridge.adopt")

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if rows, folders and states contradict each other."""
        rows = self.list(deleted=True)
        serving = [row.domain for row in rows if row.state == "serving"]
        assert len(serving) == len(set(serving)), f"two serve one domain: {serving}"
        assert len({(row.domain, row.version) for row in rows}) == len(rows)
        for row in rows:
            assert (self.folder / row.id).is_dir() == (row.state != "deleted"), row.id
            assert row.manifest["id"] == row.id
            assert row.state != "serving" or row.promoted_at is not None

    def _next_version(self, domain: str) -> int:
        with self._database.read() as session:
            known = session.scalar(sa.select(sa.func.max(Row.version)).where(Row.domain == domain)) or 0
        part = domain_part(domain)
        for folder in self.folder.glob(f"{part}_v*"):  # one that a crash left without a row keeps its number
            number = folder.name.removeprefix(f"{part}_v")
            if number.isdecimal():
                known = max(known, int(number))
        return known + 1

    def _insert(self, manifest: Manifest, experience_ids: Iterable[int], actor: str, action: str) -> CartridgeRow:
        with self._database.write() as session:
            row = Row(
                id=manifest.id,
                domain=manifest.domain,
                version=manifest.version,
                parent_id=manifest.parent,
                run_id=manifest.run_id,
                state="candidate",
                state_reason="",
                stale=False,
                model_fingerprint=manifest.model_fingerprint,
                slots=manifest.slots,
                bytes=sum(entry.bytes for entry in manifest.files.values()),
                manifest=manifest.to_json(),
                metrics={},
                experience_ids=list(experience_ids),
                created_at=manifest.created_at,
            )
            session.add(row)
            detail = {name: getattr(manifest, name) for name in ("domain", "slots", "run_id", "origin")}
            session.add(AuditEvent(actor=actor, action=action, target=manifest.id, detail=detail))
            return detached(row)

    @contextlib.contextmanager
    def _write(self, cartridge_id: str) -> Iterator[tuple[orm.Session, Row]]:
        """One row in one write transaction; on PostgreSQL, too, one after the other. Raises ``CartridgeNotFound``."""
        check_id(cartridge_id)
        with self._database.write(ordered=True) as session:
            row = session.get(Row, cartridge_id)
            yield session, _existing(row, cartridge_id)

    @staticmethod
    def _servable_before(session: orm.Session, row: Row) -> Row | None:
        """What served before ``row`` and may serve again."""
        passed = {row.id}
        while row.replaced_id is not None and row.replaced_id not in passed:
            found = session.get(Row, row.replaced_id)
            if found is None:
                return None
            if found.state == "retired" and not found.stale:
                return found
            passed.add(found.id)
            row = found
        return None

    @staticmethod
    def _retire_serving(session: orm.Session, domain: str, reason: str) -> str | None:
        now = session.scalars(sa.select(Row).where(Row.domain == domain, Row.state == "serving")).first()
        if now is None:
            return None
        now.state, now.state_reason = "retired", reason
        session.flush()
        return now.id


def _existing(row: Row | None, name: str) -> Row:
    if row is None:
        raise CartridgeNotFound(f"there is no cartridge {name!r}, and no domain of that name is served by one")
    if row.state == "deleted":
        raise CartridgeNotFound(f"the cartridge {name} was deleted")
    return row


def _note_metrics(row: Row, metrics: Mapping[str, Any] | None) -> None:
    if metrics:
        row.metrics = {**row.metrics, **metrics}
