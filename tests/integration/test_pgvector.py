"""The episodic memory on PostgreSQL: pgvector in FAISS's place, and FAISS where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa

from memory.embedding import unit_rows
from memory.episodic import EpisodicMemory, EpisodicOptions, Filters
from memory.episodic_pg import PgVectorIndex, PgVectorUnavailable
from memory.episodic_store import EpisodicStore
from memory.history import History, NewExperience
from storage import migrate
from storage.database import Database
from tests.support.letters import Letters

pytestmark = pytest.mark.postgres


def _empty(url: str) -> Database:
    database = Database(url)
    with database.transaction() as connection:
        connection.execute(sa.text("DROP SCHEMA IF EXISTS episodic CASCADE"))
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    migrate.upgrade(database)
    return database


@pytest.fixture
def database(pgvector_url: str) -> Iterator[Database]:
    database = _empty(pgvector_url)
    yield database
    database.close()


def _memory(database: Database, history: History, **options: object) -> EpisodicMemory:
    chosen = EpisodicOptions(**options)  # type: ignore[arg-type]
    memory = EpisodicMemory(database, history, chosen, default_domain="general", embedding=Letters())
    memory.start()
    return memory


def _tell(history: History, *texts: str, **fields: str) -> list[int]:
    fields = {"domain": "general", "source": "test", **fields}
    return [record.id for record in history.append([NewExperience(text, "a", **fields) for text in texts])]


def test_it_is_found_filtered_and_forgotten_as_with_faiss(database: Database) -> None:
    history = History(database)
    memory = _memory(database, history)
    first, second = _tell(history, "herring is a fish", "herring is cheap")
    (other,) = _tell(history, "herring elsewhere", domain="bank")
    assert memory.wait_until_settled(60)
    assert str(memory.status()["index"]).startswith("pgvector")
    assert [item.experience.id for item in memory.search("herring is a fish", limit=1)] == [first]
    query = Letters().embed(["herring is a fish"])[0]
    ids, cosines = memory.nearest(query, 10, Filters(domain="general"))
    assert ids.tolist() == [first, second]
    vectors = EpisodicStore(database).get("letters", [first, second])
    assert cosines == pytest.approx([float(vectors[known] @ query) for known in (first, second)], abs=1e-5)
    history.delete(experience_id=first)
    assert first not in memory.nearest(query, 10)[0].tolist()
    with database.read() as session:
        held = set(session.scalars(sa.text("SELECT experience_id FROM episodic.vectors_32")))
    assert held == {second, other}, "gone with the tombstone, before the index heard of it"
    assert memory.wait_until_settled(60)
    memory.stop()
    memory.check_invariants()
    again = _memory(database, history)
    assert {item.experience.id for item in again.search("herring")} <= {second, other}
    assert again.wait_until_settled(60)
    _tell(history, "herring again")  # something to embed, so that the embedding is opened
    assert again.wait_until_settled(60)
    assert again.status()["vectors"] == 3
    again.stop()
    again.check_invariants()
    assert migrate.drift(database) == []


def test_many_are_found_through_a_graph(database: Database) -> None:
    drawer = np.random.default_rng(1)
    vectors = unit_rows(
        drawer.standard_normal((20, 16))[drawer.integers(0, 20, 400)] + drawer.standard_normal((400, 16))
    )
    history, store = History(database), EpisodicStore(database)
    ids = np.array(_tell(history, *(f"text {number}" for number in range(400))), np.int64)
    assert sorted(store.save("made", ids.tolist(), vectors)) == ids.tolist()
    index = PgVectorIndex(database, "made", 16, 100)
    index.add(ids, vectors)
    index.add(ids, vectors)
    assert len(index) == 400
    exact = index.search(vectors[0], 10)[0]
    assert exact.tolist() == ids[np.argsort(-(vectors @ vectors[0]), kind="stable")[:10]].tolist()
    index.tidy()
    assert index.kind.endswith("hnsw")
    hits = sum(
        len(set(index.search(query, 10)[0].tolist()) & set(ids[np.argsort(-(vectors @ query))[:10]].tolist()))
        for query in vectors[::20]
    )
    assert hits >= 0.95 * 10 * len(vectors[::20])
    few = ids[::50]
    assert set(index.search(vectors[1], 8, few)[0].tolist()) == set(few.tolist())
    index.remove(ids[:399])
    assert index.search(vectors[0], 5)[0].tolist() == [ids[399]]
    assert PgVectorIndex(database, "made", 16, 100).kind == index.kind, "PostgreSQL keeps it"


def test_without_the_extension_vectors_are_searched_here(postgres_url: str) -> None:
    database = _empty(postgres_url)
    history = History(database)
    with database.read() as session:
        has_it = session.scalar(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"))
    if has_it:
        pytest.skip("this PostgreSQL has pgvector, too")
    with pytest.raises(PgVectorUnavailable, match="install pgvector"):
        PgVectorIndex(database, "letters", 32, 100)
    memory = _memory(database, history)
    (known,) = _tell(history, "herring is a fish")
    assert memory.wait_until_settled(60)
    assert memory.status()["index"] == "faiss, exact"
    assert [item.experience.id for item in memory.search("herring")] == [known]
    history.delete(experience_id=known)
    assert memory.search("herring") == []
    memory.stop()
    memory.check_invariants()
    database.close()
