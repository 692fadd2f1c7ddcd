"""pgvector in FAISS's place: the vectors are searched by PostgreSQL, and take no memory of this process.

A table per width, in a schema of its own, filled from ``episodic_vectors`` like any index and bound to it by a foreign
key: what is deleted there is gone here in the same transaction. Up to ``approximate_from`` vectors every one is looked
at; from there on there is an HNSW index (Malkov and Yashunin 2016, arXiv 1603.09320), which PostgreSQL keeps.

This module speaks PostgreSQL's SQL and is used on nothing else. The extension
(https://github.com/pgvector/pgvector, 0.5 or newer) must be installed on the server; creating it in the database needs
the rights of its owner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sqlalchemy as sa

from memory.vector_index import Ids, Matrix
from storage.database import Database

_SCHEMA = "episodic"
_PAGE = 500
_EF_SEARCH = 100  # candidates that a walk through the graph holds


class PgVectorUnavailable(RuntimeError):
    """This database has no pgvector; the message says what is missing."""


class PgVectorIndex:
    """A ``memory.vector_index.VectorIndex``. Safe to use from all threads."""

    def __init__(self, database: Database, embedding: str, dimension: int, approximate_from: int):
        self._database, self._embedding, self._dimension = database, embedding, dimension
        self._approximate_from = approximate_from
        self._table = f"{_SCHEMA}.vectors_{int(dimension)}"
        self._version = self._prepare()
        self._graph = self._has_graph()

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return f"pgvector {self._version}, {'hnsw' if self._graph else 'exact'}"

    def __len__(self) -> int:
        return int(self._ask(f"SELECT count(*) FROM {self._table} WHERE embedding = :e")[0][0])

    def add(self, ids: Ids, vectors: Matrix) -> None:
        """See ``VectorIndex``. Those that PostgreSQL holds already are not sent again."""
        for begin in range(0, len(ids), _PAGE):
            some = ids[begin : begin + _PAGE].tolist()
            query = f"SELECT experience_id FROM {self._table} WHERE embedding = :e AND experience_id = ANY(:ids)"
            held = {row[0] for row in self._ask(query, ids=some)}
            rows = [
                {"e": self._embedding, "id": known, "v": _literal(vectors[begin + at])}
                for at, known in enumerate(some)
                if known not in held
            ]
            if rows:
                insert = f"INSERT INTO {self._table} VALUES (:e, :id, CAST(:v AS vector)) ON CONFLICT DO NOTHING"
                with self._database.write() as session:
                    session.execute(sa.text(insert), rows)

    def remove(self, ids: Ids) -> None:
        """See ``VectorIndex``. The foreign key has removed what was deleted; this is for what only leaves the index."""
        if len(ids):
            statement = f"DELETE FROM {self._table} WHERE embedding = :e AND experience_id = ANY(:ids)"
            with self._database.write() as session:
                session.execute(sa.text(statement), {"e": self._embedding, "ids": ids.tolist()})

    def search(self, query: Matrix, limit: int, allowed: Ids | None = None) -> tuple[Ids, Matrix]:
        """See ``VectorIndex``."""
        if limit < 1 or (allowed is not None and not len(allowed)):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        filtered = "" if allowed is None else "AND experience_id = ANY(:allowed)"
        statement = (
            f"SELECT experience_id, -(vector <#> CAST(:q AS vector)) FROM {self._table} "
            f"WHERE embedding = :e {filtered} ORDER BY vector <#> CAST(:q AS vector) LIMIT :limit"
        )
        given = {"q": _literal(query), "limit": limit}
        rows = self._ask(statement, **given, **({} if allowed is None else {"allowed": allowed.tolist()}))
        return np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.float32)

    def tidy(self) -> None:
        """See ``VectorIndex``: a graph from ``approximate_from`` vectors on."""
        if not self._graph and len(self) >= self._approximate_from:
            with self._database.transaction() as connection:
                name = f"ix_vectors_{self._dimension}_hnsw"
                connection.execute(
                    sa.text(f"CREATE INDEX IF NOT EXISTS {name} ON {self._table} USING hnsw (vector vector_ip_ops)")
                )
            self._graph = True

    def _prepare(self) -> str:
        """Extension, schema and table; returns the extension's version."""
        with self._database.read() as session:
            if not session.scalar(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")):
                raise PgVectorUnavailable("the PostgreSQL server has no extension vector; install pgvector there")
        try:
            with self._database.transaction() as connection:
                connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
                connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {_SCHEMA}"))
                connection.execute(
                    sa.text(
                        f"CREATE TABLE IF NOT EXISTS {self._table} ("
                        f"embedding varchar(96), experience_id bigint, vector vector({self._dimension}) NOT NULL, "
                        "PRIMARY KEY (embedding, experience_id), FOREIGN KEY (embedding, experience_id) "
                        "REFERENCES episodic_vectors (embedding, experience_id) ON DELETE CASCADE)"
                    )
                )
        except sa.exc.SQLAlchemyError as error:
            raise PgVectorUnavailable(
                f"the extension vector cannot be created ({error.__class__.__name__}); "
                "run CREATE EXTENSION vector in the database as its owner"
            ) from None
        with self._database.read() as session:
            return str(session.scalar(sa.text("SELECT extversion FROM pg_extension WHERE extname = 'vector'")))

    def _has_graph(self) -> bool:
        query = "SELECT 1 FROM pg_indexes WHERE schemaname = :s AND indexname = :n"
        with self._database.read() as session:
            given = {"s": _SCHEMA, "n": f"ix_vectors_{self._dimension}_hnsw"}
            return session.scalar(sa.text(query), given) is not None

    def _ask(self, query: str, **given: Any) -> list[Any]:
        with self._database.read() as session:
            if self._graph:
                session.execute(sa.text(f"SET LOCAL hnsw.ef_search = {_EF_SEARCH}"))
                if _at_least(self._version, (0, 8)):  # walk on until the filter leaves enough
                    session.execute(sa.text("SET LOCAL hnsw.iterative_scan = strict_order"))
            return list(session.execute(sa.text(query), {"e": self._embedding, **given}))


def _at_least(version: str, wanted: tuple[int, int]) -> bool:
    major, minor, *_ = (int(part) for part in version.split("."))
    return (major, minor) >= wanted


def _literal(vector: Matrix) -> str:
    """pgvector's text form."""
    return "[" + ",".join(f"{value:.8g}" for value in vector.tolist()) + "]"
