"""Virtual tokens across restarts: the table, the store on top of it, and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from memory.latent import LatentError, LatentSessions
from storage import migrate
from storage.database import Database
from storage.models import AuditEvent, LatentSession
from tests.support.virtual_tokens import make_layers, make_shape, same_view
from workspace.errors import InvalidSnapshot
from workspace.virtual_kv import VirtualKVStore
from workspace.virtual_kv_limits import StoreLimits

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


def _store(database: Database, **limits: int) -> VirtualKVStore:
    latent = LatentSessions(database, "model-a")
    return VirtualKVStore(make_shape(), StoreLimits(**limits), load=latent.load, save=latent.save)


def test_what_was_saved_last_is_loaded_for_its_model_only(database: Database) -> None:
    one, other = LatentSessions(database, "model-a"), LatentSessions(database, "model-b")
    one.save("s", b"first")
    one.save("s", b"second")
    other.save("s", b"of another model")
    assert (one.load("s"), other.load("s"), one.load("t")) == (b"second", b"of another model", None)
    stored = one.sessions()
    assert [(own.session, own.model_fingerprint, own.size) for own in stored] == [("s", "model-a", 6)]
    one.save("s", None)
    one.save("s", None)
    assert (one.load("s"), other.load("s")) == (None, b"of another model")


def test_a_damaged_row_is_an_error_and_stays_until_it_is_cleared(database: Database) -> None:
    latent = LatentSessions(database, "model-a")
    latent.save("s", b"snapshot")
    with database.write() as transaction:
        transaction.execute(sa.update(LatentSession).values(data=b"snapshoT"))
    store = _store(database)
    with pytest.raises(LatentError, match="session 's' do not match their SHA-256; clear the session"):
        store.view("s")
    store.flush_all()
    assert len(latent.sessions()) == 1
    store.clear("s")
    store.flush("s")
    assert latent.sessions() == []
    assert store.view("s") == {}


def test_a_row_that_is_no_snapshot_is_refused_by_the_store(database: Database) -> None:
    LatentSessions(database, "model-a").save("s", b"something else")
    with pytest.raises(InvalidSnapshot, match="stored virtual tokens of session 's'"):
        _store(database).view("s")


def test_the_store_brings_back_what_it_flushed_and_what_it_spilled(database: Database) -> None:
    token = make_shape().token_bytes
    store = _store(database, max_bytes=4 * token, spill_bytes=4 * token)
    store.write("a", make_layers({1: 2, 3: 1}, 1), born=5, kind="plan", meta={"Φ": 1})
    view = store.view("a")
    store.write("b", make_layers({5: 3}, 2), born=6, kind="plan")  # spills "a"
    assert store.sessions() == ["b"]
    store.flush("b")
    again = _store(database)
    assert same_view(again.view("a"), view)
    assert same_view(again.view("b"), store.view("b"))
    assert again.segments("a")[0].meta == {"Φ": 1}
    again.check_invariants()


def test_forgetting_a_session_reaches_every_model_and_the_audit_log(database: Database) -> None:
    one, other = LatentSessions(database, "model-a"), LatentSessions(database, "model-b")
    for latent in (one, other):
        latent.save("s", b"x")
    one.save("t", b"y")
    assert one.forget("s", actor="key-1") == 2
    assert one.forget("s") == 0
    assert (one.load("s"), other.load("s"), one.load("t")) == (None, None, b"y")
    with database.read() as transaction:
        event = transaction.scalars(sa.select(AuditEvent)).one()
    assert (event.actor, event.action, event.detail) == ("key-1", "latent.forget", {"session_id": "s", "count": 2})


def test_pruning_removes_what_was_not_saved_for_longest(database: Database) -> None:
    latent = LatentSessions(database, "model-a")
    for at, name in enumerate("abcd"):
        latent.save(name, b"x" * 10)
        with database.write() as transaction:
            own = LatentSession.session_id == name
            transaction.execute(sa.update(LatentSession).where(own).values(updated_at=float(at)))
    assert latent.prune(1000) == []
    assert [own.session for own in latent.prune(25)] == ["b", "a"]
    assert [own.session for own in latent.sessions()] == ["d", "c"]
    assert [own.session for own in latent.sessions(limit=1)] == ["d"]
    assert len(latent.prune(0)) == 2
    with pytest.raises(ValueError, match="max_bytes"):
        latent.prune(-1)


@pytest.mark.parametrize("fingerprint", ["", "x" * 65])
def test_a_fingerprint_fits_its_column(database: Database, fingerprint: str) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        LatentSessions(database, fingerprint)


_WRITER = """
    import sys, threading
    from memory.latent import LatentSessions
    from storage.database import Database
    from tests.support.virtual_tokens import make_layers, make_shape
    from workspace.virtual_kv import VirtualKVStore

    latent = LatentSessions(Database(sys.argv[1]), "model-a")
    store = VirtualKVStore(make_shape(), load=latent.load, save=latent.save)
    number = int(sys.argv[2])
    while True:
        number += 1
        store.write("s", make_layers({1: 2, 3: 1}, number), born=number, kind="plan")
        store.tick("s")
        store.flush("s")
        print(number, flush=True)  # acknowledged
"""


def test_kill_9_loses_no_acknowledged_write(database: Database) -> None:
    last = 0
    for _ in range(2):
        url = database.url.render_as_string(hide_password=False)
        arguments = [sys.executable, "-c", textwrap.dedent(_WRITER), url, str(last)]
        writer = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(5):
            last = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        last = int((writer.stdout.read().split() or [str(last)])[-1])
        writer.wait()
        writer.stdout.close()
        store = _store(database)
        newest = store.segments("s")[-1].born
        assert newest in (last, last + 1), f"{last} was acknowledged, {newest} is there"
        assert torch.equal(store.view("s")[1].keys[:, :, -2:], make_layers({1: 2, 3: 1}, newest)[1][0])
        store.check_invariants()
        last = newest
