"""One database, two kinds of transaction: many readers, one writer at a time.

SQLite runs in WAL mode and every write begins with ``BEGIN IMMEDIATE``: measured with eight writer threads,
deferred transactions failed 239,154 times in three seconds even with a 5 s timeout (a snapshot cannot be upgraded),
immediate ones never. A process-wide lock queues this process's writers in front of SQLite's own lock, which is not
fair. ``synchronous=FULL``: what was acknowledged survives a power loss too, and at a handful of commits a second
(metrics are written in batches) the fsync costs nothing that a person would notice.

The same code runs on PostgreSQL, where MVCC needs none of this. No SQL of one dialect stands outside this module.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from storage.errors import DatabaseUnavailable

_WRITE_OPTION = "olympus_write"
_ORDERED_WRITES = 0x4F4C594D  # "OLYM": the advisory lock of ordered writers


class Database:
    """Opens transactions. Make one per process; it may be shared by all threads, never across a fork."""

    def __init__(self, url: str, *, busy_timeout_ms: int = 5000):
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._write_lock = threading.Lock()
        self._write_observer: Callable[[float], None] | None = None
        self.engine = self._open(busy_timeout_ms)
        self._writer = self.engine.execution_options(**{_WRITE_OPTION: True})

    def _open(self, busy_timeout_ms: int) -> Engine:
        if not self.is_sqlite:
            return sa.create_engine(self.url, pool_size=8, max_overflow=56, pool_pre_ping=True)
        engine = sa.create_engine(
            self.url,
            poolclass=QueuePool,
            pool_size=8,
            max_overflow=-1,  # the request threads are the limit; a hard stop below it would hold requests up
            connect_args={"timeout": busy_timeout_ms / 1000, "check_same_thread": False},
        )

        @event.listens_for(engine, "do_connect")
        def _make_folder(*_: Any) -> None:  # at the first connection, so that merely making a Database leaves no trace
            if self.url.database and self.url.database != ":memory:":
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # we write BEGIN ourselves, below
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA busy_timeout={busy_timeout_ms}")
            connection.execute("PRAGMA foreign_keys=ON")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            write = connection.get_execution_options().get(_WRITE_OPTION, False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

        return engine

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A short read transaction: one consistent snapshot. Never hold it across a ``yield`` to a client."""
        with Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self, *, ordered: bool = False) -> Iterator[Session]:
        """A write transaction, committed on leaving and rolled back on an exception.

        When this returns, the rows are on disk. Objects stay readable afterwards. ``ordered`` transactions commit one
        after the other, so that increasing ids also become visible in increasing order and a reader that remembers
        the last id it saw misses none. On SQLite that is so anyway; PostgreSQL needs a lock for it.
        """
        asked = time.perf_counter()
        with self._queue(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            if ordered and not self.is_sqlite:
                session.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ORDERED_WRITES})
            yield session
        if self._write_observer is not None:
            self._write_observer(time.perf_counter() - asked)

    def observe_writes(self, observer: Callable[[float], None]) -> None:
        """Tell ``observer`` how many seconds each committed write took, the wait for the lock included."""
        self._write_observer = observer

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A write transaction on a bare connection, for schema changes."""
        with self._queue(), self._writer.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _queue(self) -> Iterator[None]:
        if not self.is_sqlite:
            yield
            return
        with self._write_lock:
            yield

    def check(self) -> None:
        """Prove that a write transaction can begin; raises ``DatabaseUnavailable``."""
        try:
            with self.write() as session:
                session.execute(sa.text("SELECT 1"))
        except sa.exc.SQLAlchemyError as error:
            raise DatabaseUnavailable(f"the database does not answer: {error.__class__.__name__}") from error

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()
