"""FAISS: exact is exact, lists are nearly so, and both forget."""

from __future__ import annotations

import numpy as np
import pytest

from memory.embedding import unit_rows
from memory.vector_index import FaissIndex, Ids, Matrix

DIMENSION = 16


def _vectors(count: int, seed: int = 1) -> tuple[Ids, Matrix]:
    drawer = np.random.default_rng(seed)
    centres = drawer.standard_normal((20, DIMENSION))
    rows = centres[drawer.integers(0, 20, count)] + 0.5 * drawer.standard_normal((count, DIMENSION))
    return np.arange(count, dtype=np.int64) * 3 + 7, unit_rows(rows)


def _exact(ids: Ids, vectors: Matrix, query: Matrix, limit: int) -> list[int]:
    return [int(known) for known in ids[np.argsort(-(vectors @ query), kind="stable")][:limit]]


@pytest.mark.parametrize("approximate_from", [10_000, 200])
def test_the_nearest_are_found_filtered_and_not(approximate_from: int) -> None:
    ids, vectors = _vectors(600)
    index = FaissIndex(DIMENSION, approximate_from)
    index.add(ids, vectors)
    index.tidy()
    assert ("lists" in index.kind) == (approximate_from == 200)
    even = ids % 2 == 0
    rare = ids[:5]
    hits = 0
    for query in vectors[::37]:
        found, cosines = index.search(query, 10)
        assert np.allclose(cosines, vectors[(found - 7) // 3] @ query, atol=1e-5)
        hits += len(set(found.tolist()) & set(_exact(ids, vectors, query, 10)))
        found, _ = index.search(query, 10, ids[even])
        assert found.tolist() == _exact(ids[even], vectors[even], query, 10)
        found, _ = index.search(query, 10, rare)
        assert found.tolist() == _exact(rare, vectors[:5], query, 10), "few are all looked at"
    assert hits >= 0.95 * 10 * len(vectors[::37])
    assert len(index.search(vectors[0], 10, ids[:0])[0]) == len(index.search(vectors[0], 0)[0]) == 0


def test_lists_come_and_go_with_the_number_of_vectors() -> None:
    ids, vectors = _vectors(800)
    index = FaissIndex(DIMENSION, 200)
    index.tidy()
    assert index.search(vectors[0], 3)[0].tolist() == []
    index.add(ids[:199], vectors[:199])
    index.tidy()
    assert index.kind == "faiss, exact"
    index.add(ids[199:200], vectors[199:200])
    index.tidy()
    first = index.kind
    assert "lists" in first
    index.add(ids[200:], vectors[200:])
    index.tidy()
    assert index.kind != first, "four times as many vectors ask for new lists"
    assert len(index) == 800
    index.remove(ids[50:])
    index.remove(ids[50:])
    assert len(index) == 50
    assert set(index.search(vectors[700], 60)[0].tolist()) <= set(ids[:50].tolist())
    index.tidy()
    assert index.kind == "faiss, exact"
    assert index.search(vectors[3], 5)[0].tolist() == _exact(ids[:50], vectors[:50], vectors[3], 5)


def test_huge_ids_are_filtered_too() -> None:
    _, vectors = _vectors(10)
    ids = np.arange(10, dtype=np.int64) + (1 << 40)
    index = FaissIndex(DIMENSION, 100)
    index.add(ids, vectors)
    assert set(index.search(vectors[0], 10, ids[2:4])[0].tolist()) == set(ids[2:4].tolist())
