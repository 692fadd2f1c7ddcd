"""The audit log: who did what to what, and when. Written by whoever acts, read by administrators.

What changes rows of its own writes its line in the same transaction (keys, kernels, cartridges, runs, the history).
What has no transaction of its own is noted here, after it was done and before the caller hears of it. A line holds
names, counts and reasons, never a text of the history and never a secret. Nothing is ever changed or removed; the
database refuses it (migration 0006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.models import ApiKey, AuditEvent

_TARGET_CHARACTERS = 128
#: Actors that are no keys, as people know them.
NAMES = {
    "local": "this machine",
    "cli": "the command line",
    "system": "the server",
    "schedule": "the schedule",
    "distillation": "the distillation",
    "zeus": "Zeus",
}


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """What to show; None: everything. ``action`` may be a family, such as ``key``, which means ``key.*``, too."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None  #: a part of it
    since: float | None = None  #: UTC seconds since the epoch
    until: float | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """As SQL."""
        found: list[sa.ColumnElement[bool]] = []
        if self.actor is not None:
            found.append(AuditEvent.actor == self.actor)
        if self.action is not None:
            family = AuditEvent.action.startswith(f"{self.action}.", autoescape=True)
            found.append(sa.or_(AuditEvent.action == self.action, family))
        if self.target is not None:
            found.append(AuditEvent.target.contains(self.target, autoescape=True))
        if self.since is not None:
            found.append(AuditEvent.at >= self.since)
        if self.until is not None:
            found.append(AuditEvent.at < self.until)
        return found


class AuditLog:
    """Notes and reads lines. Safe to use from all threads."""

    def __init__(self, database: Database):
        self._database = database
        self._choices: tuple[int, dict[str, list[dict[str, Any]]]] | None = None  # as of the newest line then

    def note(self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None) -> None:
        """Add a line. ``detail`` holds JSON types only."""
        line = AuditEvent(actor=actor, action=action, target=target[:_TARGET_CHARACTERS], detail=dict(detail or {}))
        with self._database.write() as session:
            session.add(line)

    def page(self, which: AuditFilter, before: int | None = None, limit: int = 50) -> Sequence[dict[str, Any]]:
        """The newest ``limit`` lines older than id ``before``, newest first; ``actor_name`` is the key's name."""
        query = sa.select(AuditEvent, ApiKey.name).outerjoin(ApiKey, ApiKey.id == AuditEvent.actor)
        query = query.where(*which.conditions()).order_by(AuditEvent.id.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditEvent.id < before)
        with self._database.read() as session:
            return [_shown(row, name) for row, name in session.execute(query)]

    def choices(self) -> dict[str, list[dict[str, Any]]]:
        """What there is to filter by: actors with their names, and actions, each with its number of lines."""
        with self._database.read() as session:
            newest = session.scalar(sa.select(sa.func.max(AuditEvent.id))) or 0
            known = self._choices  # counting reads every line, and pages ask every few seconds
            if known is not None and known[0] == newest:
                return known[1]
            actors = session.execute(
                sa.select(AuditEvent.actor, ApiKey.name, sa.func.count())
                .outerjoin(ApiKey, ApiKey.id == AuditEvent.actor)
                .group_by(AuditEvent.actor, ApiKey.name)
                .order_by(AuditEvent.actor)
            ).all()
            actions = session.execute(
                sa.select(AuditEvent.action, sa.func.count()).group_by(AuditEvent.action).order_by(AuditEvent.action)
            ).all()
        told: dict[str, list[dict[str, Any]]] = {
            "actors": [{"actor": actor, "name": _name(actor, name), "entries": count} for actor, name, count in actors],
            "actions": [{"action": action, "entries": count} for action, count in actions],
        }
        self._choices = newest, told
        return told


def _name(actor: str, key_name: str | None) -> str | None:
    if key_name is not None:
        return key_name
    return "the bootstrap key" if actor.startswith("bootstrap-") else NAMES.get(actor)


def _shown(row: AuditEvent, key_name: str | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "at": row.at,
        "actor": row.actor,
        "actor_name": _name(row.actor, key_name),
        "action": row.action,
        "target": row.target,
        "detail": row.detail,
    }
