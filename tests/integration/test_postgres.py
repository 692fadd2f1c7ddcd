"""The same storage code on PostgreSQL: migrations, history, eight writers, virtual tokens, measurements."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from memory.distillation import runs
from memory.distillation.runs import RunError, RunStore
from memory.history import History, NewExperience
from memory.latent import LatentSessions
from olympus.audit import AuditFilter, AuditLog
from olympus.metrics_store import COLUMNS, MetricsStore, StepMetrics
from storage import migrate
from storage.database import Database
from storage.models import AuditEvent, Kernel
from tests.support.server import free_port
from tests.support.virtual_tokens import make_layers, make_shape
from workspace.virtual_kv import VirtualKVStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    database = Database(postgres_url)
    with database.transaction() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    migrate.upgrade(database)
    yield database
    database.close()


def test_migrations_and_models_agree(database: Database) -> None:
    assert migrate.current(database) == migrate.head()
    assert migrate.drift(database) == []


def test_the_audit_log_can_only_be_added_to(database: Database) -> None:
    log = AuditLog(database)
    log.note("local", "kernel.pause", "k", {"why": "noise"})
    for statement in (sa.update(AuditEvent).values(actor="nobody"), sa.delete(AuditEvent), sa.text("TRUNCATE audit")):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write() as session:
            session.execute(statement)
    (entry,) = log.page(AuditFilter(action="kernel"))
    assert (entry["actor"], entry["actor_name"], entry["detail"]) == ("local", "this machine", {"why": "noise"})
    assert log.choices()["actors"] == [{"actor": "local", "name": "this machine", "entries": 1}]


def test_eight_writers_lose_nothing(database: Database) -> None:
    history = History(database)
    errors: list[Exception] = []

    def write(index: int) -> None:
        try:
            for number in range(20):
                history.append(
                    [NewExperience(f"{index}-{number}", "a", "general", "test", request_id=f"{index}-{number}")]
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    followed: list[str] = []
    cursor = 0
    while any(thread.is_alive() for thread in threads):  # a reader by cursor, as every learner is
        for record in history.since(cursor):
            followed.append(record.observation)
            cursor = record.id
    followed += [record.observation for record in history.since(cursor)]
    assert errors == []
    assert history.count() == len(followed) == len(set(followed)) == 160


def test_history_behaves_as_on_sqlite(database: Database) -> None:
    history = History(database)
    first = history.append([NewExperience("Φ > 0.7", "yes", "general", "test", session_id="s", meta={"n": 1})])[0]
    assert history.get(first.id) == first
    assert history.sessions()[0]["title"] == "Φ > 0.7"
    assert history.delete(session_id="s") == 1
    assert history.page() == []


def test_virtual_tokens_behave_as_on_sqlite(database: Database) -> None:
    latent = LatentSessions(database, "model-a")
    store = VirtualKVStore(make_shape(), load=latent.load, save=latent.save)
    store.write("Φ", make_layers({1: 2, 3: 1}, 1), born=5, kind="plan")
    store.flush("Φ")
    store.write("Φ", make_layers({1: 1}, 2), born=6, kind="plan")
    store.flush("Φ")
    again = VirtualKVStore(make_shape(), load=latent.load, save=latent.save)
    assert again.snapshot("Φ") == store.snapshot("Φ") == latent.load("Φ")
    LatentSessions(database, "model-b").save("Φ", b"x")
    assert [own.session for own in latent.sessions()] == ["Φ"]
    assert len(latent.prune(1)) == 1
    assert latent.forget("Φ") == 1
    assert latent.load("Φ") is None


@pytest.mark.parametrize("columns", [("loss",), ("phi", "loss", "kappa"), COLUMNS])
def test_measurements_are_read_as_on_sqlite(database: Database, tmp_path: Path, columns: tuple[str, ...]) -> None:
    """Rows leave the database as one text, and each database writes such a text in its own way."""
    local = Database(f"sqlite:///{tmp_path / 'same.db'}")
    migrate.upgrade(local)
    kernel_id, stores = "athena-0a1b2c", [MetricsStore(place) for place in (database, local)]
    for place, store in zip((database, local), stores, strict=True):
        with place.write() as session:
            session.add(Kernel(id=kernel_id, god_name="x", domain="d", state="queued", config={}, seed=1))
        for step in range(1, 300):
            store.add(kernel_id, StepMetrics(step, loss=1 / step, phi=1e-7 * step if step % 3 == 0 else None))
            if step % 2 == 0:
                store.flush(kernel_id)
    for since, most in ((None, 2000), (None, 30), (101, 2000), (101, 20), (298, 10), (299, 10)):
        ours, theirs = (store.read(kernel_id, since, most, columns=columns, spread=True) for store in stores)
        assert ours == theirs
    local.close()


def test_an_unreachable_server_is_a_clear_error() -> None:
    from storage.errors import DatabaseUnavailable

    database = Database(f"postgresql+psycopg://olympus@127.0.0.1:{free_port()}/postgres")
    with pytest.raises(DatabaseUnavailable, match="cannot open the database"):
        migrate.current(database)
    database.close()


def test_a_run_is_not_both_ended_and_cancelled(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    read, has_read = runs._row, threading.Event()

    def slow(session: Any, run_id: str) -> Any:
        found = read(session, run_id)
        has_read.set()
        time.sleep(0.2)  # between reading a state and changing it
        return found

    store = RunStore(database)
    run_id = store.create("zoo", trigger="manual", config={}, cursor=0).id
    assert store.claim("me") is not None
    monkeypatch.setattr(runs, "_row", slow)

    def cancel() -> None:
        with contextlib.suppress(RunError):  # it was too late
            store.cancel(run_id)

    threads = [threading.Thread(target=cancel), threading.Thread(target=store.finish, args=(run_id, "me", "promoted"))]
    threads[1].start()
    assert has_read.wait(30)
    threads[0].start()
    for thread in threads:
        thread.join()
    assert store.get(run_id).state == "promoted"
    store.check_invariants()
