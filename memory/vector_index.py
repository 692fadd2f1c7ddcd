"""The nearest of many vectors: what the episodic memory asks of an index, and FAISS behind it.

Vectors have length 1, so that the inner product is the cosine. Up to ``approximate_from`` of them every one is looked
at (``IndexFlatIP`` under ``IndexIDMap2``); above, they lie in inverted lists of which a question looks at ``_PROBES``.
Lists and no graph (HNSW): a graph cannot forget, takes ten times as long to build here, and answers no quicker
(benchmarks/results/memory.md). Where a filter leaves a share of the rows, as many more lists are looked at.

One thread changes the index, any thread asks it: a lock lasts as long as one search. Building lists anew goes on
beside the old index, outside the lock. FAISS: Douze et al. 2024, arXiv 2401.08281.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Matrix = NDArray[np.float32]

#: Inverted lists that an unfiltered question looks at: recall@10 above 0.99 on sentence embeddings.
_PROBES = 64
_TRAINING_PER_LIST = 40  # vectors per list that k-means sees
_TRAINING_ROUNDS = 10
#: Ids up to here are filtered by one bit each, larger ones by a set.
_MOST_BITS = 1 << 27


class VectorIndex(Protocol):
    """Vectors by experience id. ``search`` may be called by any thread, the others by one."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    def __len__(self) -> int: ...

    def add(self, ids: Ids, vectors: Matrix) -> None:
        """``ids`` [N] that are not held yet, and their ``vectors`` [N, E] of length 1."""

    def remove(self, ids: Ids) -> None:
        """Take these away; unknown ones pass by."""

    def search(self, query: Matrix, limit: int, allowed: Ids | None = None) -> tuple[Ids, Matrix]:
        """Ids and cosines of at most ``limit`` nearest to ``query`` [E], best first; None: all are ``allowed``."""

    def tidy(self) -> None:
        """Take another form where the number of vectors asks for it; may take seconds; ``search`` works meanwhile."""


class FaissIndex:
    """In memory: ``4 * E`` bytes a vector."""

    def __init__(self, dimension: int, approximate_from: int):
        import faiss  # a quarter of a second that the start of the server should not take

        self._faiss: Any = faiss
        self._dimension = dimension
        self._approximate_from = approximate_from
        self._lock = threading.Lock()
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._lists = 0  # 0: every vector is looked at
        self._listed = 0  # vectors that were there when the lists were made

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return f"faiss, {self._lists} lists of which {self._probes()} are looked at" if self._lists else "faiss, exact"

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, ids: Ids, vectors: Matrix) -> None:
        """See ``VectorIndex``."""
        with self._lock:
            self._index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(ids, np.int64))

    def remove(self, ids: Ids) -> None:
        """See ``VectorIndex``."""
        if len(ids):
            with self._lock:
                self._index.remove_ids(self._faiss.IDSelectorBatch(np.ascontiguousarray(ids, np.int64)))

    def search(self, query: Matrix, limit: int, allowed: Ids | None = None) -> tuple[Ids, Matrix]:
        """See ``VectorIndex``."""
        if limit < 1 or (allowed is not None and not len(allowed)):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        selector = None if allowed is None else self._selector(allowed)
        with self._lock:
            parameters = self._parameters(selector, 1.0 if allowed is None else len(allowed) / max(1, len(self)))
            cosines, ids = self._index.search(query.reshape(1, -1), limit, params=parameters)
        if ids[0, -1] >= 0:
            return ids[0], cosines[0]
        found = ids[0] >= 0  # FAISS fills up with -1
        return ids[0][found], cosines[0][found]

    def tidy(self) -> None:
        """See ``VectorIndex``: lists from ``approximate_from`` on, made anew at four times as many vectors."""
        count = len(self)
        if self._lists and count < self._approximate_from // 2:
            made, lists = self._faiss.IndexIDMap2(self._faiss.IndexFlatIP(self._dimension)), 0
        elif count >= self._approximate_from and (not self._lists or count >= 4 * self._listed):
            lists = max(1, int(4 * math.sqrt(count)))
            made = self._trained(lists)
        else:
            return
        for ids, vectors in self._contents():
            made.add_with_ids(vectors, ids)
        with self._lock:
            self._index, self._lists, self._listed = made, lists, count

    def _probes(self, share: float = 1.0) -> int:
        return min(self._lists, math.ceil(_PROBES / max(share, 1e-9)))

    def _parameters(self, selector: Any, share: float) -> Any:
        if self._lists:
            return self._faiss.SearchParametersIVF(nprobe=self._probes(share), sel=selector)
        return None if selector is None else self._faiss.SearchParameters(sel=selector)

    def _selector(self, allowed: Ids) -> Any:
        highest = int(allowed.max())
        if highest >= _MOST_BITS:
            return self._faiss.IDSelectorBatch(allowed)
        bits = np.zeros(highest + 1, np.bool_)
        bits[allowed] = True
        return self._faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))

    def _trained(self, lists: int) -> Any:
        made = self._faiss.IndexIVFFlat(
            self._faiss.IndexFlatIP(self._dimension), self._dimension, lists, self._faiss.METRIC_INNER_PRODUCT
        )
        made.cp.niter = _TRAINING_ROUNDS
        made.cp.min_points_per_centroid = 1  # no advice on standard error
        vectors = np.concatenate([part for _, part in self._contents()])
        wanted = min(len(vectors), lists * _TRAINING_PER_LIST)
        made.train(vectors[np.random.default_rng(0).choice(len(vectors), wanted, replace=False)])
        return made

    def _contents(self) -> list[tuple[Ids, Matrix]]:
        """Copies of everything held. Called by the thread that changes the index, so nothing moves meanwhile."""
        faiss, index = self._faiss, self._index
        if not self._lists:
            if not index.ntotal:
                return []
            return [(faiss.vector_to_array(index.id_map), index.index.reconstruct_n(0, index.ntotal))]
        parts: list[tuple[Ids, Matrix]] = []
        for number in range(index.nlist):
            size = index.invlists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy()
                codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size).copy()
                parts.append((ids, codes.view(np.float32).reshape(size, self._dimension)))
        return parts
