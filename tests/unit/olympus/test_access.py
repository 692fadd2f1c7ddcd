"""Keys: what proves somebody, what no longer does, and what the database knows of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from olympus import access
from olympus.access import LOCAL, SCOPES, KeyStore, Principal
from settings import SettingsError
from storage import migrate
from storage.database import Database
from storage.models import ApiKey, AuditEvent

BOOTSTRAP = "a-long-enough-bootstrap-key"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def test_a_key_proves_its_principal_and_only_its_hash_is_stored(database: Database, keys: KeyStore) -> None:
    key_id, text = keys.create("alice", ["chat", "kernels:read"])
    assert re.fullmatch(rf"oly_{key_id}_[A-Za-z0-9_-]{{43}}", text)
    assert keys.verify(text) == Principal(key_id, "alice", frozenset({"chat", "kernels:read"}))
    secret = text.split("_", 2)[2]
    with database.read() as session:
        row = session.get_one(ApiKey, key_id)
        assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    raw = Path(database.url.database or "").read_bytes()
    assert secret.encode() not in raw


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"),
        lambda text: text.replace("oly_", "olx_"),
        lambda text: text + "x",
        lambda text: text[:-1],
        lambda text: "oly_00000000" + text[12:],
        lambda text: "",
        lambda text: "oly_",
        lambda text: text + "\n",
        lambda text: "oly_\udcff" + text,
    ],
)
def test_anything_else_proves_nothing(keys: KeyStore, change: object) -> None:
    _, text = keys.create("alice", ["chat"])
    assert callable(change)
    assert keys.verify(change(text)) is None


def test_scopes(keys: KeyStore) -> None:
    _, text = keys.create("reader", ["history:read"])
    reader = keys.verify(text)
    assert reader is not None
    assert [scope for scope in SCOPES if reader.allows(scope)] == ["history:read"]
    _, text = keys.create("boss", ["admin"])
    boss = keys.verify(text)
    assert boss is not None
    assert all(boss.allows(scope) for scope in SCOPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", ["root"]), "unknown scope root; known are chat"),
        (("x", []), "at least one scope"),
        (("", ["chat"]), "name of 1 to 100"),
        (("x" * 101, ["chat"]), "name of 1 to 100"),
        (("x", ["chat"], 0.0), "must be positive"),
        (("x", ["chat"], float("nan")), "must be positive"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(keys: KeyStore, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keys.create(*arguments)  # type: ignore[arg-type]
    assert keys.list() == []


def test_revoking_works_at_once_and_once(keys: KeyStore) -> None:
    key_id, text = keys.create("alice", ["chat"])
    assert keys.find(key_id) is not None
    assert keys.revoke(key_id)
    assert keys.verify(text) is None
    assert keys.find(key_id) is None
    assert not keys.revoke(key_id)
    assert not keys.revoke("ffffffff")


def test_expiry(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key_id, text = keys.create("alice", ["chat"], 60)
    assert keys.verify(text) is not None
    now = access.time.time()
    monkeypatch.setattr(access.time, "time", lambda: now + 61)
    assert keys.verify(text) is None
    assert keys.find(key_id) is None
    assert not keys.any_active()


def test_last_use_is_written_at_most_once_a_minute(
    database: Database, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = keys.create("alice", ["chat"])
    assert keys.list()[0]["last_used_at"] is None
    writes: list[float] = []
    database.observe_writes(writes.append)
    for _ in range(5):
        keys.verify(text)
    first = keys.list()[0]["last_used_at"]
    assert len(writes) == 1
    monkeypatch.setattr(access.time, "time", lambda: first + 60)
    keys.verify(text)
    assert len(writes) == 2
    assert keys.list()[0]["last_used_at"] == first + 60


def test_the_bootstrap_key_is_an_administrator_that_is_not_stored(database: Database) -> None:
    keys = KeyStore(database, SecretStr(BOOTSTRAP))
    found = keys.verify(BOOTSTRAP)
    assert found is not None
    assert found.allows("history:write")
    assert keys.find(found.id) == found
    assert keys.any_active()
    assert keys.list() == []
    assert keys.verify(BOOTSTRAP + "x") is None
    replaced = KeyStore(database, SecretStr("another-long-bootstrap-key"))
    assert replaced.find(found.id) is None, "sessions of a replaced bootstrap key end"


@pytest.mark.parametrize("short", ["", "hunter2", "x" * 15])
def test_a_short_bootstrap_key_is_refused(database: Database, short: str) -> None:
    with pytest.raises(SettingsError, match=r"server\.api_key: must have at least 16 characters"):
        KeyStore(database, SecretStr(short))


def test_any_active(keys: KeyStore) -> None:
    assert not keys.any_active()
    key_id, _ = keys.create("alice", ["chat"])
    assert keys.any_active()
    keys.revoke(key_id)
    assert not keys.any_active()


def test_making_and_revoking_is_audited(database: Database, keys: KeyStore) -> None:
    key_id, text = keys.create("alice", ["chat"], actor="root")
    keys.revoke(key_id, actor="root")
    with database.read() as session:
        rows = session.scalars(sa.select(AuditEvent).order_by(AuditEvent.id)).all()
        assert [(row.actor, row.action, row.target) for row in rows] == [
            ("root", "key.create", key_id),
            ("root", "key.revoke", key_id),
        ]
        assert text not in str([row.detail for row in rows])


def test_the_person_at_the_machine_is_always_found(keys: KeyStore) -> None:
    assert keys.find("local") is LOCAL
    assert keys.find("") is None
