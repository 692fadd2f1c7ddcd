"""Growing BM25: the numbers of bm25s, whatever came and went."""

from __future__ import annotations

import random

import numpy as np
import pytest

from memory.recall import WordIndex
from memory.words import Words

VOCABULARY = [f"word{number}" for number in range(40)] + ["the", "of", "Zürich", "x1"]


def _texts(seed: int, count: int) -> list[str]:
    drawer = random.Random(seed)
    return [" ".join(drawer.choices(VOCABULARY, k=drawer.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_scores_are_those_of_bm25s_also_after_removals(seed: int) -> None:
    texts, drawer = _texts(seed, 60), random.Random(seed)
    words = Words()
    for place, text in enumerate(texts):
        words.add(place, text)
    gone = set(drawer.sample(range(60), 25))
    for place in gone:
        words.remove(place)
        words.check_invariants()
    for place in list(gone)[:10]:  # a place that is free is given again
        words.add(place, texts[place])
        gone.discard(place)
    words.check_invariants()
    left = [place for place in range(60) if place not in gone]
    reference = WordIndex([texts[place] for place in left])
    for query in _texts(seed + 100, 10):
        expected = {left[at]: score for at, score in reference.best(query, 60)}
        found = dict(words.best(query, 60))
        assert found.keys() == expected.keys()
        assert [found[place] for place in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_best_first_at_most_so_many_and_only_what_may_be_found() -> None:
    words = Words()
    for place, text in enumerate(["herring herring", "herring and bread", "bread", "the of"]):
        words.add(place, text)
    assert [place for place, _ in words.best("Herring?", 5)] == [0, 1]
    assert [place for place, _ in words.best("herring", 1)] == [0]
    assert [place for place, _ in words.best("herring", 5, np.array([False, True, True, True]))] == [1]
    assert words.best("herring", 5, np.zeros(0, bool)) == []
    assert words.best("the of", 5) == words.best("quantum", 5) == words.best("", 5) == words.best("herring", 0) == []


def test_nothing_of_what_was_removed_stays() -> None:
    words = Words()
    words.add(0, "swordfish password")
    words.add(7, "password")
    words.remove(0)
    assert "swordfish" not in repr(words._postings) + repr(words._held)
    assert words.best("swordfish", 5) == []
    words.remove(7)
    assert (len(words), words.best("password", 5)) == (0, [])
    words.check_invariants()
