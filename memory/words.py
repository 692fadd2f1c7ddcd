"""BM25 over texts that come and go: the scores of ``memory.recall.WordIndex``, without building anything anew.

A text is known by its place, a small number that its owner chooses. Taking a text away takes its words out of every
list, so that nothing of it stays in memory and the statistics are those of the texts that are left (a test compares
every score with bm25s'). At 100,000 texts of a dozen words a question takes about a millisecond.

Words are split and stopped as bm25s does it (Lù 2024, arXiv 2407.03618), and scored by its default, Lucene's variant
(Kamphuis et al. 2020):

    sum over words of  ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b * length / mean length))

Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from bm25s.stopwords import STOPWORDS_EN

_K1, _B = 1.5, 0.75
_WORD = re.compile(r"(?u)\b\w\w+\b")
_STOPPED = frozenset(STOPWORDS_EN)


def words_of(text: str) -> list[str]:
    """The words of ``text`` that count, in order, in lower case."""
    return [word for word in _WORD.findall(text.lower()) if word not in _STOPPED]


@dataclass(slots=True)
class _Postings:
    """Where a word stands, and how often; parallel, in no order."""

    places: array[int] = field(default_factory=lambda: array("I"))
    counts: array[int] = field(default_factory=lambda: array("I"))


class Words:
    """See the module docstring."""

    def __init__(self) -> None:
        self._postings: dict[str, _Postings] = {}
        self._held: dict[int, tuple[str, ...]] = {}  # the different words of the text at each place
        self._lengths = np.zeros(0, np.float32)  # words of the text at each place
        self._total = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, place: int, text: str) -> None:
        """``text`` stands at ``place`` from now on; the place must be free."""
        assert place not in self._held, place
        words = words_of(text)
        counted = Counter(words)
        for word, count in counted.items():
            postings = self._postings.setdefault(word, _Postings())
            postings.places.append(place)
            postings.counts.append(min(count, 0xFFFF))
        if place >= len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros(place + 1024, np.float32)])
        self._held[place] = tuple(counted)
        self._lengths[place] = len(words)
        self._total += len(words)

    def remove(self, place: int) -> None:
        """Nothing stands at ``place`` any more."""
        for word in self._held.pop(place):
            postings = self._postings[word]
            at = postings.places.index(place)
            for column in (postings.places, postings.counts):
                last = column.pop()
                if at < len(column):
                    column[at] = last
            if not postings.places:
                del self._postings[word]
        self._total -= int(self._lengths[place])
        self._lengths[place] = 0

    def best(self, query: str, limit: int, mask: np.ndarray | None = None) -> list[tuple[int, float]]:
        """Places and scores of at most ``limit`` texts that share a word with ``query``, best first.

        ``mask`` [places] says which may be found; None: all.
        """
        found = [self._postings[word] for word in words_of(query) if word in self._postings]
        if not found or limit < 1:
            return []
        scores = np.zeros(len(self._lengths), np.float32)
        mean = self._total / len(self._held)
        for postings in found:
            places = np.array(postings.places, np.int64)
            counts = np.array(postings.counts, np.float32)
            held = len(places)
            idf = math.log(1 + (len(self._held) - held + 0.5) / (held + 0.5))
            scores[places] += idf * counts / (counts + _K1 * (1 - _B + _B * self._lengths[places] / mean))
        if mask is not None:
            scores[: len(mask)][~mask] = 0
            scores[len(mask) :] = 0
        candidates = np.flatnonzero(scores)
        if len(candidates) > limit:
            candidates = candidates[np.argpartition(-scores[candidates], limit - 1)[:limit]]
        order = candidates[np.lexsort((candidates, -scores[candidates]))]  # equal scores in a fixed order
        return [(int(place), float(scores[place])) for place in order]

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the lists contradict each other."""
        assert sum(len(words) for words in self._held.values()) == sum(len(p.places) for p in self._postings.values())
        assert self._total == int(self._lengths.sum())
        for word, postings in self._postings.items():
            assert len(postings.places) == len(postings.counts) == len(set(postings.places)) > 0, word
            assert all(word in self._held[place] for place in postings.places)
