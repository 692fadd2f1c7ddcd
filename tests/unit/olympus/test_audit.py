"""The audit log: lines, filters, pages; and that the database itself keeps them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa

from olympus.access import KeyStore
from olympus.audit import AuditFilter, AuditLog
from olympus.errors import InvalidAction
from olympus.kernel_desk import KernelDesk
from olympus.zeus import Zeus
from storage import migrate
from storage.database import Database
from storage.models import AuditEvent


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/olympus.db")
    migrate.upgrade(made)
    yield made
    made.close()


@pytest.fixture
def log(database: Database) -> AuditLog:
    return AuditLog(database)


def _targets(log: AuditLog, **which: object) -> list[str]:
    return [entry["target"] for entry in log.page(AuditFilter(**which))]  # type: ignore[arg-type]


def test_pages_go_back_without_a_gap_or_a_repetition(log: AuditLog) -> None:
    for number in range(23):
        log.note("local", "kernel.pause", f"k{number}")
    seen: list[str] = []
    before = None
    while page := log.page(AuditFilter(), before, limit=7):
        seen += [entry["target"] for entry in page]
        before = page[-1]["id"]
        log.note("local", "kernel.resume", "meanwhile")  # newer lines do not move the older pages
    assert seen == [f"k{number}" for number in reversed(range(23))]


def test_filters(database: Database, log: AuditLog) -> None:
    lines = [
        ("a", "key.create", "one"),
        ("a", "key.revoke", "one"),
        ("b", "keyring.x", "t_o"),
        ("b", "kernel.pin", "two"),
    ]
    with database.write() as session:
        for at, (actor, action, target) in enumerate(lines):
            session.add(AuditEvent(at=100.0 + at, actor=actor, action=action, target=target))
    assert _targets(log, actor="b") == ["two", "t_o"]
    assert _targets(log, action="key") == ["one", "one"], "a family, and nothing that only begins like it"
    assert _targets(log, action="kernel.pin") == ["two"]
    assert _targets(log, target="t_") == ["t_o"], "an underscore is a letter here"
    assert _targets(log, target="o") == ["two", "t_o", "one", "one"]
    assert _targets(log, since=101.0, until=103.0) == ["t_o", "one"]
    assert _targets(log, actor="a", action="key.create", since=101.0) == []


def test_actors_are_called_as_people_know_them(database: Database, log: AuditLog) -> None:
    key_id, _ = KeyStore(database).create("Ada's notebook", ["chat"])
    for actor in (key_id, "local", "bootstrap-1a2b3c4d", "gone"):
        log.note(actor, "kernel.stop", "k")
    names = [entry["actor_name"] for entry in log.page(AuditFilter(action="kernel"))]
    assert names == [None, "the bootstrap key", "this machine", "Ada's notebook"]
    choices = log.choices()
    assert {"actor": key_id, "name": "Ada's notebook", "entries": 1} in choices["actors"]
    assert {"actor": "local", "name": "this machine", "entries": 2} in choices["actors"]
    assert choices["actions"] == [{"action": "kernel.stop", "entries": 4}, {"action": "key.create", "entries": 1}]
    assert log.choices() is choices, "nothing is counted again while no line has come"
    log.note("local", "kernel.pin", "k")
    assert {"action": "kernel.pin", "entries": 1} in log.choices()["actions"]


def test_a_long_target_is_cut_not_refused(log: AuditLog) -> None:
    log.note("local", "history.import", "d" * 500, {"imported": 3})
    (entry,) = log.page(AuditFilter())
    assert (len(entry["target"]), entry["detail"]) == (128, {"imported": 3})


@pytest.mark.parametrize("statement", [sa.update(AuditEvent).values(actor="nobody"), sa.delete(AuditEvent)])
def test_the_database_refuses_to_change_a_line(database: Database, log: AuditLog, statement: sa.Executable) -> None:
    log.note("local", "kernel.delete", "k")
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write() as session:
        session.execute(statement)
    (entry,) = log.page(AuditFilter())
    assert entry["actor"] == "local"


class _Zeus:
    """Says yes to everything, but to a second pause."""

    def __init__(self) -> None:
        self.paused = False

    def pause(self, kernel_id: str) -> dict[str, Any]:
        if self.paused:
            raise InvalidAction("it is paused already")
        self.paused = True
        return {"kernel_id": kernel_id}

    def checkpoint_now(self, kernel_id: str) -> dict[str, Any]:
        return {"success": True, "name": "step-00000007"}

    def restore(self, kernel_id: str, name: str) -> dict[str, Any]:
        return {"success": True, "restored_from": name, "name": "step-00000008"}

    def pin(self, kernel_id: str, name: str, pinned: bool) -> dict[str, Any]:
        return {"checkpoints": []}

    def delete_checkpoint(self, kernel_id: str, name: str) -> dict[str, Any]:
        return {"checkpoints": []}


def test_what_is_decided_about_kernels_is_noted_and_what_is_refused_is_not(log: AuditLog) -> None:
    desk = KernelDesk(cast("Zeus", _Zeus()), log)
    desk.pause("k", actor="a")
    with pytest.raises(InvalidAction):
        desk.pause("k", actor="a")
    desk.checkpoint_now("k", actor="a")
    desk.pin("k", "step-00000007", False, actor="a")
    desk.pin("k", "step-00000007", True, actor="a")
    desk.restore("k", "step-00000007", actor="b")
    desk.delete_checkpoint("k", "step-00000007", actor="b")
    told = [(entry["actor"], entry["action"], entry["detail"]) for entry in log.page(AuditFilter(target="k"))]
    name = {"checkpoint": "step-00000007"}
    assert told == [
        ("b", "kernel.checkpoint.delete", name),
        ("b", "kernel.restore", {**name, "published_as": "step-00000008"}),
        ("a", "kernel.pin", name),
        ("a", "kernel.unpin", name),
        ("a", "kernel.checkpoint", name),
        ("a", "kernel.pause", {}),
    ]
