"""What the episodic memory holds ready: a catalog, words and vectors of the same experiences, and their lock.

One thread fills it (``memory.episodic_follower``). What is written, judged or deleted meanwhile arrives in the thread
that wrote it, too, and counts before that thread goes on: a new row is found by its words, a deleted one is masked, and
cleared out of words and vectors a moment later. Two threads may overtake each other here. A verdict that is here before
its row is remembered until the row was read; a row that is here early is looked at again when the filling thread reads
it, tombstone or not.

A copy of rows and no truth: it is built anew at every start. Not here: where vectors come from, ranking, texts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from memory.catalog import Catalog, Filters, Line
from memory.episodic_store import Page
from memory.vector_index import Ids, Matrix, VectorIndex
from memory.words import Words

#: So many more are asked for and left out again before the index is given a list of what is allowed.
_FEW_BLOCKED = 64


class EpisodicIndex:
    """See the module docstring. Asking is safe in all threads; the methods of the filling thread say so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._catalog = Catalog()
        self._words = Words()
        self._overtaken: dict[int, tuple[float | None, bool]] = {}  # verdicts on rows that may be on their way here
        self._read_to = 0  # the filling thread has read every new row up to here
        self._vectors: VectorIndex | None = None
        self._embedded: set[int] = set()

    # Asking.

    def best_words(self, query: str, limit: int, filters: Filters) -> list[tuple[int, float]]:
        """Ids and BM25 scores of at most ``limit`` experiences that share a word with ``query``, best first."""
        with self._lock:
            found = self._words.best(query, limit, self._catalog.mask(filters))
            pairs = [(int(self._catalog.ids[place]), score) for place, score in found]
        return sorted(pairs, key=lambda pair: (-pair[1], -pair[0]))  # of equals the newer one

    def nearest(self, vector: Matrix, limit: int, filters: Filters) -> tuple[Ids, Matrix]:
        """Ids and cosines of at most ``limit`` experiences nearest to ``vector`` [E], best first."""
        index = self._vectors
        if index is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        with self._lock:
            mask = self._catalog.mask(filters)
            if mask is None:
                allowed = blocked = None
            else:
                known = self._catalog.ids
                blocked = known[~mask] if len(mask) - np.count_nonzero(mask) <= _FEW_BLOCKED else None
                allowed = None if blocked is not None else known[mask]
        if blocked is None:
            return index.search(vector, limit, allowed)
        ids, cosines = index.search(vector, limit + len(blocked))
        kept = ~np.isin(ids, blocked)
        return ids[kept][:limit], cosines[kept][:limit]

    def __len__(self) -> int:
        return len(self._catalog)

    def __contains__(self, experience_id: int) -> bool:
        return experience_id in self._catalog

    @property
    def vectors(self) -> VectorIndex | None:
        """The index of vectors, when there is one."""
        return self._vectors

    # In the thread of whoever wrote.

    def hear(self, lines: Sequence[Line]) -> None:
        """Rows that were just written. The filling thread reads them again."""
        for line in lines:
            with self._lock:
                if line.id > self._read_to and line.id not in self._catalog:
                    self._add(line)

    def judge(self, verdicts: Sequence[tuple[int, float | None, bool]]) -> None:
        """``(id, score, deleted)``, as ``History.verdicts`` gives them: what is deleted is not found from here on."""
        with self._lock:
            for experience_id, score, deleted in verdicts:
                if deleted:
                    self._catalog.remove(experience_id)
                else:
                    self._catalog.judge(experience_id, score)
                self._overtaken[experience_id] = (score, deleted)

    # Filling; one thread.

    def about_to_read(self) -> None:
        """The rows that ``take`` gets next will be read after this: verdicts from before are in them."""
        with self._lock:
            self._overtaken.clear()

    def take(self, page: Page, read_to: int | None = None) -> list[int]:
        """A page as it was read; returns the ids of its rows that live. No row up to ``read_to`` is news any more."""
        for line in page.lines:
            with self._lock:
                self._add(line)
        with self._lock:
            for dead in page.dead:
                self._catalog.remove(dead)
            if read_to is not None:
                self._read_to = read_to
            return [line.id for line in page.lines if line.id in self._catalog]

    def _add(self, line: Line) -> None:
        """Hold a row as its latest verdict says; the lock is held."""
        score, deleted = self._overtaken.get(line.id, (line.score, False))
        if deleted:
            self._catalog.remove(line.id)
        elif line.id not in self._catalog:
            self._words.add(self._catalog.add(replace(line, score=score)), line.text)

    def drop_oldest(self, count: int) -> None:
        """Hold ``count`` rows less; they stay in the history."""
        with self._lock:
            for experience_id in self._catalog.oldest(count):
                self._catalog.remove(experience_id)

    def clear_removed(self) -> int:
        """Take what was removed out of words and vectors, for good; returns how many."""
        with self._lock:
            fading = self._catalog.fading
        if self._vectors is not None and fading:
            self._vectors.remove(np.array([known for known, _ in fading], np.int64))
        for known, place in fading:
            with self._lock:
                self._words.remove(place)
                self._catalog.free(known)
            self._embedded.discard(known)
        return len(fading)

    def add_vectors(self, ids: Ids, vectors: Matrix) -> None:
        """Vectors [N, E] of experiences; those that are not held (any more) are left out."""
        assert self._vectors is not None
        with self._lock:
            chosen = [at for at, known in enumerate(ids.tolist()) if known in self._catalog]
        fresh = [at for at in chosen if int(ids[at]) not in self._embedded]
        if fresh:
            self._vectors.add(ids[fresh], vectors[fresh])
            self._embedded.update(ids[fresh].tolist())

    def use(self, vectors: VectorIndex) -> None:
        """Fill and ask ``vectors`` from here on."""
        self._vectors, self._embedded = vectors, set()

    def without_vector(self) -> list[int]:
        """The ids that have none, ascending, so that the newest is last."""
        with self._lock:
            return [known for known in self._catalog.oldest(len(self._catalog)) if known not in self._embedded]

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the parts disagree. Called while the filling thread rests."""
        with self._lock:
            self._catalog.check_invariants()
            self._words.check_invariants()
            assert len(self._words) == len(self._catalog) + len(self._catalog.fading)
        if self._vectors is not None:
            assert len(self._vectors) == len(self._embedded)
            fading = dict(self._catalog.fading)
            assert not [known for known in self._embedded if known not in self._catalog and known not in fading]
