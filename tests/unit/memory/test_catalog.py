"""The columns: what each filter lets through, and places that come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memory.catalog import Catalog, Filters, Line

LINES = [
    Line(1, "general", "a", 100.0, None, ""),
    Line(2, "general", "b", 200.0, 1.0, ""),
    Line(3, "bank", None, 300.0, -1.0, ""),
    Line(4, "bank", "a", 400.0, 0.5, ""),
]


def _passing(catalog: Catalog, filters: Filters) -> set[int]:
    mask = catalog.mask(filters)
    return {1, 2, 3, 4} if mask is None else set(catalog.ids[mask].tolist())


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog()
    for line in LINES:
        made.add(line)
    return made


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), {1, 2, 3, 4}),
        (Filters(domain="bank"), {3, 4}),
        (Filters(domain="nowhere"), set()),
        (Filters(session="a"), {1, 4}),
        (Filters(session="nobody"), set()),
        (Filters(without_session="a"), {2, 3}),
        (Filters(without_session="nobody"), {1, 2, 3, 4}),
        (Filters(since=200.0), {2, 3, 4}),
        (Filters(until=200.0), {1}),
        (Filters(min_score=0.5), {2, 4}),
        (Filters(wrong=False), {1, 2, 4}),
        (Filters(domain="general", since=150.0, min_score=0.0), {2}),
    ],
)
def test_filters(catalog: Catalog, filters: Filters, expected: set[int]) -> None:
    assert _passing(catalog, filters) == expected


def test_what_is_judged_passes_by_its_new_score(catalog: Catalog) -> None:
    catalog.judge(1, 0.9)
    catalog.judge(2, None)
    catalog.judge(99, 1.0)
    assert _passing(catalog, Filters(min_score=0.0)) == {1, 4}


def test_a_place_is_given_again_only_when_it_is_free(catalog: Catalog) -> None:
    assert catalog.mask(Filters()) is None
    assert catalog.remove(2)
    assert not catalog.remove(2)
    assert (2 in catalog, len(catalog), catalog.fading) == (False, 3, [(2, 1)])
    mask = catalog.mask(Filters())
    assert mask is not None
    assert set(catalog.ids[mask].tolist()) == {1, 3, 4}
    assert catalog.add(replace(LINES[0], id=5)) == 4, "the place still fades"
    catalog.free(2)
    assert catalog.add(replace(LINES[0], id=6)) == 1
    catalog.check_invariants()
    assert catalog.oldest(3) == [1, 3, 4]
    assert catalog.mask(Filters()) is None


def test_it_grows(catalog: Catalog) -> None:
    for number in range(5, 3000):
        catalog.add(replace(LINES[0], id=number, domain=f"d{number % 3}"))
    catalog.check_invariants()
    mask = catalog.mask(Filters(domain="d1"))
    assert mask is not None
    assert np.array_equal(np.sort(catalog.ids[mask]), [n for n in range(5, 3000) if n % 3 == 1])
