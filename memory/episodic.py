"""Episodic memory: what was lived through, found by its words and by its meaning.

The rows of the history are the one truth. Beside them this keeps an index (``memory.episodic_index``) that a thread
fills and follows (``memory.episodic_follower``), and asks the rows themselves before anything is shown: what has a
tombstone is never found, whatever an index still holds.

Two rankings are fused by the reciprocals of their ranks (``fuse``, after Cormack et al. 2009): BM25 over words, and
cosines of embeddings. Words find names, numbers and codes; meanings find what was said in other words. A cosine below
the embedding's ``floor`` counts as nothing in common. While there is no embedding (it is loading, it is off, it failed)
the words answer alone.

It is a ``workspace.recall.Recall``: what enters a prompt is cut to its budget of tokens by whoever builds the prompt.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memory.catalog import Filters
from memory.embedding import EngineEmbedding, open_minilm
from memory.episodic_follower import Courtesy, Follower
from memory.episodic_index import EpisodicIndex
from memory.episodic_store import EpisodicStore, Remembered, line_of
from memory.history import History, Record
from memory.vector_index import FaissIndex, Ids, Matrix, VectorIndex
from memory.words import words_of
from storage.database import Database
from workspace.recall import Recollection

if TYPE_CHECKING:
    from memory.embedding import Embedding
    from workspace.models import LoadedModel

logger = logging.getLogger(__name__)

EmbeddingChoice = Literal["auto", "minilm", "engine", "none"]
IndexChoice = Literal["auto", "faiss", "pgvector"]

_RANK_OFFSET = 60  # of the fusion, as its authors chose it
_ABOUT_AS_WELL = 0.7
_DEPTH = 50  # of each ranking that is fused
_SHOWN = 600  # characters of an observation or an action in a recollection
_SNIPPET = 240
_QUERY = 2000  # characters of a query that count
_QUERIES_KEPT = 64
_AT_ONCE = 50  # new records whose words are indexed before their writer goes on; of more, by the follower
NOTHING_ASKED = Filters()


@dataclass(frozen=True)
class EpisodicOptions:
    """What ``settings.memory.episodic`` says; see docs/settings.md."""

    embedding: EmbeddingChoice = "auto"
    index: IndexChoice = "auto"
    max_entries: int = 200_000
    approximate_from: int = 20_000
    words_weight: float = 2.0
    cache_dir: Path = Path(".cache")


@dataclass(frozen=True)
class Part:
    """What one ranking says of a result: its place, from 1 on, and its own score (BM25, or a cosine)."""

    rank: int
    score: float


@dataclass(frozen=True)
class Found:
    """A result. ``score`` is the fused one; a ranking in which it does not stand is None."""

    experience: Remembered
    score: float
    words: Part | None
    meaning: Part | None
    snippet: str


class EpisodicMemory:
    """See the module docstring. Making one starts nothing; ``start`` and ``stop`` it once. Safe in all threads."""

    def __init__(
        self,
        database: Database,
        history: History,
        options: EpisodicOptions,
        *,
        default_domain: str,
        embedding_width: int | None = None,
        courtesy: Courtesy | None = None,
        embedding: Embedding | None = None,
    ):
        """``embedding_width``: recollections carry their vectors where they have it. ``embedding``: use this one."""
        self.options = options
        self._database, self._history, self._default_domain = database, history, default_domain
        self._embedding_width = embedding_width
        self._given = embedding
        self._store = EpisodicStore(database)
        self._index = EpisodicIndex()
        self._loaded: LoadedModel | None = None
        self._asked_before: OrderedDict[tuple[str, str], Matrix] = OrderedDict()
        self._asked_lock = threading.Lock()
        self._follower = Follower(
            self._store,
            self._index,
            self._open if embedding is not None or options.embedding != "none" else None,
            self._make_index,
            max_entries=options.max_entries,
            courtesy=courtesy or Courtesy(),
            forget_others=embedding is not None or options.embedding in ("minilm", "engine"),
        )

    # Life.

    def start(self) -> None:
        """Begin to follow the history. Returns at once."""
        self._history.subscribe(self._hear_new)
        self._history.subscribe_changes(self._hear_changed)
        self._follower.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the threads. Nothing can be lost: what is not embedded yet is embedded after the next start."""
        self._follower.stop(timeout)

    def adopt_engine(self, loaded: LoadedModel) -> None:
        """The language model is there: its states can embed where nothing better is to be had."""
        self._loaded = loaded
        self._follower.wake()

    def wait_until_settled(self, timeout: float = 30.0) -> bool:
        """True when everything that can be held and embedded is; for tests and measurements."""
        return self._follower.wait_until_settled(timeout)

    # Asking.

    def __call__(self, query: str, *, session: str | None, domain: str | None, limit: int) -> Sequence[Recollection]:
        """At most ``limit`` experiences that ``query`` brings to mind, best first: ``workspace.recall.Recall``.

        Those of ``session`` are left out: its turns are in the conversation already. So is what was judged wrong.
        """
        filters = Filters(domain=domain or self._default_domain, without_session=session, wrong=False)
        found = self.search(query, filters, limit)
        vectors = self._vectors_of(found)
        return [
            Recollection(
                item.experience.shown(_SHOWN),
                item.score,
                f"experience {item.experience.id}",
                vectors.get(item.experience.id),
            )
            for item in found
        ]

    def search(self, query: str, filters: Filters = NOTHING_ASKED, limit: int = 10) -> list[Found]:
        """At most ``limit`` living experiences, best first; none where nothing fits."""
        if limit < 1:
            return []
        query = query[:_QUERY]
        depth = max(_DEPTH, limit)
        words = self._index.best_words(query, depth, filters)
        meanings = self._meanings(query, depth, filters)
        ranked = fuse(words, meanings, self.options.words_weight)
        asked = set(words_of(query))
        found: list[Found] = []
        while ranked and len(found) < limit:
            some, ranked = ranked[: limit - len(found)], ranked[limit - len(found) :]
            rows = self._store.read([known for known, *_ in some])  # only those that live
            found += [
                Found(rows[known], score, by_words, by_meaning, snippet(rows[known], asked))
                for known, score, by_words, by_meaning in some
                if known in rows
            ]
        return found

    def nearest(self, vector: Matrix, limit: int, filters: Filters = NOTHING_ASKED) -> tuple[Ids, Matrix]:
        """Ids and cosines of the experiences nearest to ``vector`` [E] of length 1: the path of vectors alone."""
        return self._index.nearest(vector, limit, filters)

    def status(self) -> dict[str, Any]:
        """Where it stands, as JSON types."""
        follower, vectors = self._follower, self._index.vectors
        embedding = follower.embedding
        return {
            "entries": len(self._index),
            "complete": follower.complete,
            "vectors": 0 if vectors is None else len(vectors),
            "pending": follower.pending,
            "refused": follower.refused,
            "index": None if vectors is None else vectors.kind,
            "embedding": {
                "wanted": self.options.embedding,
                "state": follower.state.stage,
                "detail": follower.state.detail,
                "name": None if embedding is None else embedding.name,
                "dimension": None if embedding is None else embedding.dimension,
                "floor": None if embedding is None else round(embedding.floor, 4),
            },
        }

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the index contradicts itself. While nothing is written, after it settled."""
        self._index.check_invariants()

    def _meanings(self, query: str, depth: int, filters: Filters) -> list[tuple[int, float]]:
        embedding = self._follower.embedding
        if embedding is None:
            self._follower.ask()
            return []
        if self._index.vectors is None or not query.strip():
            return []
        try:
            vector = self._embedded(embedding, query)
        except Exception:  # the words still answer
            logger.exception("a question could not be embedded")
            return []
        ids, cosines = self._index.nearest(vector, depth, filters)
        near = cosines >= embedding.floor
        return list(zip(ids[near].tolist(), cosines[near].tolist(), strict=True))

    def _embedded(self, embedding: Embedding, query: str) -> Matrix:
        """The vector [E] of ``query``; those asked last are kept."""
        key = (embedding.name, query)
        with self._asked_lock:
            if key in self._asked_before:
                self._asked_before.move_to_end(key)
                return self._asked_before[key]
        vector: Matrix = embedding.embed([query])[0]
        with self._asked_lock:
            self._asked_before[key] = vector
            while len(self._asked_before) > _QUERIES_KEPT:
                self._asked_before.popitem(last=False)
        return vector

    def _vectors_of(self, found: Sequence[Found]) -> dict[int, Any]:
        """By id, as tensors, where they fit the workspace's slots."""
        embedding = self._follower.embedding
        if not found or embedding is None or embedding.dimension != self._embedding_width:
            return {}
        import torch

        held = self._store.get(embedding.name, [item.experience.id for item in found])
        return {known: torch.from_numpy(vector.copy()) for known, vector in held.items()}

    # Following.

    def _hear_new(self, records: list[Record]) -> None:
        if len(records) <= _AT_ONCE:
            self._index.hear([line_of(record) for record in records])
        self._follower.wake()

    def _hear_changed(self, ids: Sequence[int]) -> None:
        self._index.judge(self._history.verdicts(ids))
        self._follower.wake()

    def _open(self, stop: threading.Event) -> Embedding | None:
        """The embedding that the options ask for; None: the engine is not there yet. Raises why there is none."""
        if self._given is not None:
            return self._given
        choice = self.options.embedding
        if choice in ("auto", "minilm"):
            from workspace.errors import ModelError

            try:
                return open_minilm(self.options.cache_dir, stop=stop)
            except ModelError as error:
                if choice == "minilm":
                    raise
                logger.info("MiniLM cannot be had, the served model embeds: %s", error)
                self.options = replace(self.options, embedding="engine")
        return None if self._loaded is None else EngineEmbedding(self._loaded)

    def _make_index(self, embedding: Embedding) -> VectorIndex:
        if not self._database.is_sqlite and self.options.index != "faiss":
            from memory.episodic_pg import PgVectorIndex, PgVectorUnavailable

            try:
                return PgVectorIndex(self._database, embedding.name, embedding.dimension, self.options.approximate_from)
            except PgVectorUnavailable as error:
                logger.warning("vectors are searched in this process: %s", error)
        return FaissIndex(embedding.dimension, self.options.approximate_from)


Ranked = tuple[int, float, Part | None, Part | None]


def fuse(
    words: Sequence[tuple[int, float]], meanings: Sequence[tuple[int, float]], words_weight: float
) -> list[Ranked]:
    """``(id, score, words, meaning)`` by falling score, from two rankings ``(id, own score)``, best first.

    Reciprocal rank fusion, in which all that fits the words about as well shares their weight: a number that stands in
    one text decides, words that stand in many hardly count. (Measured in benchmarks/results/memory.md: with a fixed
    weight either numbers are not found, or common words spoil what meaning has found.) Without meanings the words'
    ranks count alone. What leads all alone in both has the score 1.
    """
    shares = [words_weight / rivals if meanings else 1.0 for rivals in _rivals([score for _, score in words])]
    whole = 1.0 + words_weight if meanings and words else 1.0
    totals: dict[int, float] = {}
    by_words: dict[int, Part] = {}
    by_meaning: dict[int, Part] = {}
    for parts, ranking, weights in ((by_words, words, shares), (by_meaning, meanings, [1.0] * len(meanings))):
        for rank, ((known, score), weight) in enumerate(zip(ranking, weights, strict=True), 1):
            parts[known] = Part(rank, score)
            totals[known] = totals.get(known, 0.0) + weight * (_RANK_OFFSET + 1) / (_RANK_OFFSET + rank) / whole
    ranked = [(known, total, by_words.get(known), by_meaning.get(known)) for known, total in totals.items()]
    return sorted(ranked, key=lambda item: (-item[1], -item[0]))  # of equals the newer one


def _rivals(scores: Sequence[float]) -> list[int]:
    """For each of the falling ``scores``, how many are at least ``_ABOUT_AS_WELL`` times as high, itself included."""
    rising = [-score for score in scores]
    return [bisect.bisect_right(rising, -_ABOUT_AS_WELL * score) for score in scores]


def snippet(experience: Remembered, asked: set[str]) -> str:
    """The part of an experience's text around the first word of the question, on one line."""
    text = " ".join(experience.shown(4 * _SNIPPET).split())
    lowered = text.lower()
    places = [at for word in asked if (at := lowered.find(word)) >= 0]
    begin = max(0, min(places, default=0) - _SNIPPET // 4)
    cut = text[begin : begin + _SNIPPET].strip()
    return ("… " if begin else "") + cut + (" …" if begin + _SNIPPET < len(text) else "")
