"""The database: eight writers without a lock error, migrations, rollback."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage import migrate
from storage.database import Database
from storage.errors import DatabaseUnavailable, SchemaTooNew
from storage.models import Base, Experience, MetricPoint


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


def _experience(text: str) -> Experience:
    return Experience(domain="d", source="test", observation=text, action="a", content_hash=text)


def test_eight_writers_have_no_lock_errors(database: Database, tmp_path: Path) -> None:
    """Six threads share the process's database, two use their own connections, as another process would."""
    other = Database(f"sqlite:///{tmp_path}/test.db")
    stop = time.monotonic() + 2.0
    counts, errors = [0] * 8, []

    def write(index: int, target: Database) -> None:
        while time.monotonic() < stop:
            try:
                with target.write() as session:
                    # Read, then write: what fails at once in a deferred transaction.
                    session.scalar(sa.select(sa.func.count(Experience.id)))
                    session.add(_experience(f"{index}-{counts[index]}"))
                counts[index] += 1
            except sa.exc.OperationalError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(i, database if i < 6 else other)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert errors == []
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Experience.id))) == sum(counts) > 0


def test_readers_see_one_snapshot_and_do_not_block_writers(database: Database) -> None:
    with database.read() as reader:
        assert reader.scalar(sa.select(sa.func.count(Experience.id))) == 0
        with database.write() as writer:
            writer.add(_experience("x"))
        assert reader.scalar(sa.select(sa.func.count(Experience.id))) == 0
    with database.read() as reader:
        assert reader.scalar(sa.select(sa.func.count(Experience.id))) == 1


def test_an_exception_rolls_back(database: Database) -> None:
    def fail_half_way() -> None:
        with database.write() as session:
            session.add(_experience("x"))
            session.flush()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Experience.id))) == 0
    with database.write() as session:  # the writer's lock was given back
        session.add(_experience("y"))


def test_sqlite_is_durable_and_enforces_foreign_keys(database: Database) -> None:
    with database.read() as session:
        pragmas = {name: session.scalar(sa.text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    with pytest.raises(sa.exc.IntegrityError), database.write() as session:
        session.add(MetricPoint(kernel_id="nobody", level=0, step=1, first_step=1, values={}))


def test_migrations_and_models_agree(database: Database) -> None:
    assert migrate.current(database) == migrate.head()
    assert migrate.drift(database) == []
    assert migrate.upgrade(database) is None


def test_measurements_of_the_first_schema_are_taken_over(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/old.db")
    config = migrate._config()
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        migrate.command.upgrade(config, "0001")
        kernel = {"id": "athena-000000", "god_name": "athena", "domain": "d", "state": "paused", "config": "{}"}
        kernel |= {"state_reason": "", "wanted": "pause", "step": 9, "seed": 1, "parents": "[]", "reason": ""}
        kernel |= {"summary": "{}", "created_at": 0.0, "updated_at": 0.0}
        names = ", ".join(kernel)
        connection.execute(sa.text(f"INSERT INTO kernels ({names}) VALUES (:{names.replace(', ', ', :')})"), kernel)
        connection.execute(
            sa.text(
                "INSERT INTO kernel_metrics (kernel_id, step, at, loss, phi, regime) VALUES (:k, :s, 1.5, :l, :p, :r)"
            ),
            [
                {"k": "athena-000000", "s": s, "l": s / 2, "p": 0.25 if s == 8 else None, "r": "linear"}
                for s in (3, 8, 9)
            ],
        )
    migrate.upgrade(database)
    assert migrate.drift(database) == []
    with database.read() as session:
        rows = session.scalars(sa.select(MetricPoint).order_by(MetricPoint.step)).all()
        found = [(row.level, row.first_step, row.step, row.at, row.regime, row.values) for row in rows]
    assert found == [
        (0, 1, 3, 1.5, "linear", {"loss": 1.5}),
        (0, 4, 8, 1.5, "linear", {"loss": 4.0, "phi": 0.25}),
        (0, 9, 9, 1.5, "linear", {"loss": 4.5}),
    ]
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        migrate.command.downgrade(config, "0001")
        back = connection.execute(sa.text("SELECT step, loss, phi FROM kernel_metrics ORDER BY step")).all()
    assert [tuple(row) for row in back] == [(3, 1.5, None), (8, 4.0, 0.25), (9, 4.5, None)]
    database.close()


def test_a_newer_schema_is_refused(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaTooNew, match="schema 9999, which this version does not know"):
        migrate.upgrade(database)


def test_an_older_database_is_copied_before_it_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path}/old.db")
    migrate.upgrade(database)
    with database.write() as session:
        session.add(_experience("precious"))
    monkeypatch.setattr(migrate, "head", lambda: "9998")  # as if this version knew a newer one
    monkeypatch.setattr(migrate.command, "upgrade", lambda config, target: None)
    backup = migrate.upgrade(database)
    database.close()
    assert backup is not None
    copy = sqlite3.connect(backup)
    assert copy.execute("SELECT observation FROM experiences").fetchall() == [("precious",)]
    copy.close()


def test_a_database_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    database = Database(f"sqlite:///{tmp_path}/folder.db")
    with pytest.raises(DatabaseUnavailable, match="cannot open the database"):
        migrate.upgrade(database)
    database.close()


def test_every_table_of_the_design_exists() -> None:
    assert set(Base.metadata.tables) >= {
        "experiences", "episodes", "sessions", "kernels", "kernel_metric_points", "checkpoints", "cartridges",
        "distillation_runs", "api_keys", "audit",
    }  # fmt: skip
