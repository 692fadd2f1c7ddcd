"""What the history brings to mind for a question: BM25 over the newest experiences of a domain.

The words decide, not their meaning; a memory of embeddings can take this one's place behind the same protocol
(``workspace.recall``). The index is a cache of the rows: it is built anew when the domain's newest id or its number of
live records has changed, and what was deleted is never brought back. BM25 is bm25s' (Lù 2024, arXiv 2407.03618).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bm25s

from memory.history import History, Record
from workspace.recall import Recollection

#: Experiences of a domain that can be recalled: the newest. 2,100 short ones are indexed in 0.1 s and asked in 0.5 ms.
NEWEST = 2000
#: Domains whose index is kept.
_DOMAINS = 16
_LONGEST = 600  # characters of an observation or an action that a recollection shows


@dataclass(frozen=True)
class _Index:
    state: tuple[int, int]  # live records and newest id when it was built
    records: list[Record]
    bm25: Any


class HistoryRecall:
    """See the module docstring. Safe to use from all threads."""

    def __init__(self, history: History, default_domain: str):
        self._history = history
        self._default_domain = default_domain
        self._lock = threading.Lock()
        self._indices: dict[str, _Index] = {}

    def __call__(self, query: str, *, session: str | None, domain: str | None, limit: int) -> Sequence[Recollection]:
        """At most ``limit`` experiences that share words with ``query``, best first.

        Those of ``session`` are left out: its turns are in the conversation already.
        """
        index = self._index(domain or self._default_domain)
        if index is None or limit < 1:
            return ()
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
        if not tokens.vocab:
            return ()
        most = min(len(index.records), limit + 8)  # a few more, for those that are left out
        found, scores = index.bm25.retrieve(tokens, k=most, show_progress=False)
        told: list[Recollection] = []
        for place, score in zip(found[0].tolist(), scores[0].tolist(), strict=True):
            record = index.records[place]
            if score <= 0 or len(told) == limit:
                break
            if session is None or record.session_id != session:
                told.append(Recollection(_text(record), score, f"experience {record.id}"))
        return told

    def _index(self, domain: str) -> _Index | None:
        state = self._history.domains().get(domain)
        if state is None:
            return None
        with self._lock:
            known = self._indices.pop(domain, None)
            if known is None or known.state != state:
                known = self._build(domain, state)
            if known is not None:
                self._indices[domain] = known  # the last one is the most recently used
                while len(self._indices) > _DOMAINS:
                    del self._indices[next(iter(self._indices))]
            return known

    def _build(self, domain: str, state: tuple[int, int]) -> _Index | None:
        records = self._history.page(domain=domain, limit=NEWEST)
        tokens = bm25s.tokenize(
            [f"{record.observation} {record.action}" for record in records], stopwords="en", show_progress=False
        )
        if not tokens.vocab:
            return None
        bm25 = bm25s.BM25()
        bm25.index(tokens, show_progress=False)
        return _Index(state, records, bm25)


def _text(record: Record) -> str:
    said, done = (text[:_LONGEST].strip() for text in (record.observation, record.action))
    return f"{said}\n{done}" if done else said
