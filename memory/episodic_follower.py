"""The thread that keeps the episodic memory's index as the rows are, and embeds what has no vector yet.

It reads the history by id: the newest page first, so that the first questions find something, then what is older, and
whatever is new whenever a listener wakes it. Vectors are loaded from their table when an embedding is there, and made,
newest first, for those that have none. Embedding is slow work: it happens in small batches, at low priority, and waits
while requests are served, but no longer than ``_PATIENCE`` seconds a batch, so that a busy server gets on with it, too.

The embedding is opened on a thread of its own, and only when there is something to embed: it may have to be fetched.
Nothing here is needed for a start: until the index is filled, less is found.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from memory.embedding import Embedding
from memory.episodic_index import EpisodicIndex
from memory.episodic_store import EpisodicStore
from memory.vector_index import VectorIndex

logger = logging.getLogger(__name__)

Stage = Literal["off", "waiting", "opening", "ready", "failed"]
#: Opens an embedding; None: it can be had later, call again when ``wake`` was called.
Open = Callable[[threading.Event], Embedding | None]
MakeIndex = Callable[[Embedding], VectorIndex]

_BATCH = 8
_PATIENCE = 2.0
_LOOK_SECONDS = 0.05
_IDLE_SECONDS = 60.0
_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class EmbeddingState:
    """Where the embedding stands. ``detail`` says why it is not ready."""

    stage: Stage
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Courtesy:
    """How the thread shows consideration. ``on_thread`` is called at its beginning, ``is_busy`` while it works."""

    on_thread: Callable[[], object] = lambda: None
    is_busy: Callable[[], bool] = lambda: False


class Follower:
    """See the module docstring. ``start`` it once; ``stop`` it once."""

    def __init__(
        self,
        store: EpisodicStore,
        index: EpisodicIndex,
        open_embedding: Open | None,
        make_index: MakeIndex,
        *,
        max_entries: int,
        courtesy: Courtesy,
        forget_others: bool = False,
    ):
        self._store, self._index = store, index
        self._open, self._make_index = open_embedding, make_index
        self._max_entries, self._courtesy = max_entries, courtesy
        self._forget_others = forget_others
        self._wake, self._stop, self._settled = threading.Event(), threading.Event(), threading.Event()
        self._asked = threading.Event()  # a question could use an embedding
        self._thread: threading.Thread | None = None
        self._opener: threading.Thread | None = None
        self._cursor = self._back = 0  # every row above the one and below the other is still to be read
        self.complete = False  #: whether all rows are held that were there at the start
        self._pending: list[int] = []  # without a vector, newest last
        self._refused: set[int] = set()  # texts that the embedding cannot take
        self._loaded = False
        self.embedding: Embedding | None = None
        self.state = EmbeddingState("waiting" if open_embedding else "off")

    # From any thread.

    def start(self) -> None:
        """Begin to follow."""
        self._thread = threading.Thread(target=self._run, name="episodic-memory", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread, after its batch at the latest."""
        self._stop.set()
        self._wake.set()
        for thread in (self._thread, self._opener):
            if thread is not None:
                thread.join(timeout)

    def wake(self) -> None:
        """There is something new. Returns at once."""
        self._settled.clear()
        self._wake.set()

    def ask(self) -> None:
        """A question came: an embedding is worth opening even though nothing waits to be embedded."""
        if not self._asked.is_set() and self.embedding is None:
            self._asked.set()
            self.wake()

    def wait_until_settled(self, timeout: float) -> bool:
        """True when all rows are held and all that can be embedded is, within ``timeout`` seconds."""
        return self._settled.wait(timeout)

    @property
    def pending(self) -> int:
        """How many rows wait for a vector, as far as is known."""
        return len(self._pending)

    @property
    def refused(self) -> int:
        """How many texts the embedding could not take."""
        return len(self._refused)

    # The thread.

    def _run(self) -> None:
        self._courtesy.on_thread()
        begun = False
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if not begun:
                    self._cursor = self._store.newest_id()
                    self._back = self._cursor + 1
                    begun = True
                moved = any([self._clear(), self._follow(), self._page_back(), self._embed()])
            except SQLAlchemyError as error:
                logger.warning("the episodic memory cannot read or write: %s", error.__class__.__name__)
                self._stop.wait(_RETRY_SECONDS)
                continue
            except Exception:  # a defect here must not end remembering for the rest of the process's life
                logger.exception("the episodic memory failed; it goes on")
                self._stop.wait(_RETRY_SECONDS)
                continue
            if moved:
                continue
            if not self._wake.is_set() and self._is_settled():
                self._settled.set()
            self._wake.wait(_IDLE_SECONDS)

    def _is_settled(self) -> bool:
        opening = self._opener is not None and self._opener.is_alive()
        return not opening and (not self._pending or self.embedding is None)

    def _clear(self) -> bool:
        excess = len(self._index) - self._max_entries
        if excess > self._max_entries // 100:
            self._index.drop_oldest(excess)
        return self._index.clear_removed() > 0

    def _follow(self) -> bool:
        self._index.about_to_read()
        page = self._store.after(self._cursor)
        self._pending += self._index.take(page, page.cursor)
        moved, self._cursor = page.cursor > self._cursor, page.cursor
        return moved

    def _page_back(self) -> bool:
        if self.complete:
            return False
        self._index.about_to_read()
        page = self._store.before(self._back)
        full = len(self._index) >= self._max_entries
        self._index.take(page)
        if page.cursor == self._back or full:
            self._pending = self._index.without_vector()
            self.complete = True
        self._back = page.cursor
        return True

    def _embed(self) -> bool:
        if not self.complete or not (self._pending or self._asked.is_set()):
            return False
        if self.embedding is None:
            self._open_beside()
            return False
        if not self._loaded:
            self._load(self.embedding)
            return True
        if not self._pending:
            return False
        self._wait_while_busy()
        batch = self._pending[-_BATCH:]
        texts = self._store.texts([known for known in batch if known not in self._refused])
        vectors = self._vectors_of(self.embedding, texts)
        if vectors:
            kept = self._store.save(self.embedding.name, list(vectors), np.stack(list(vectors.values())))
            self._index.add_vectors(np.array(kept, np.int64), np.array([vectors[known] for known in kept]))
        del self._pending[-len(batch) :]
        if not self._pending:
            self._all_embedded(self.embedding)
        return True

    def _vectors_of(self, embedding: Embedding, texts: Sequence[tuple[int, str]]) -> dict[int, np.ndarray]:
        """By id. A text that cannot be embedded is left out until the next start."""
        if not texts:
            return {}
        try:
            rows = embedding.embed([text for _, text in texts])
        except Exception:  # whatever a model makes of a text: the others need not suffer for it
            if len(texts) > 1:
                return {known: row for one in texts for known, row in self._vectors_of(embedding, [one]).items()}
            logger.exception("experience %d cannot be embedded; it is found by its words only", texts[0][0])
            self._refused.add(texts[0][0])
            return {}
        sound = {known: row for (known, _), row in zip(texts, rows, strict=True) if np.isfinite(row).all()}
        self._refused.update(known for known, _ in texts if known not in sound)
        return sound

    def _load(self, embedding: Embedding) -> None:
        """Fill an index with the vectors that are kept."""
        self._index.use(self._make_index(embedding))
        for ids, vectors in self._store.vectors(embedding.name, embedding.dimension, self._max_entries):
            if self._stop.is_set():
                return
            self._index.add_vectors(ids, vectors)
        self._pending = self._index.without_vector()
        self._loaded = True
        if not self._pending:
            self._all_embedded(embedding)

    def _all_embedded(self, embedding: Embedding) -> None:
        index = self._index.vectors
        assert index is not None
        index.tidy()
        if self._forget_others:
            self._forget_others = False
            removed = self._store.forget_others(embedding.name)
            if removed:
                logger.info("removed %d vectors of embeddings that are not used any more", removed)

    def _wait_while_busy(self) -> None:
        give_up = time.monotonic() + _PATIENCE
        while self._courtesy.is_busy() and time.monotonic() < give_up and not self._stop.is_set():
            self._stop.wait(_LOOK_SECONDS)

    # The opener.

    def _open_beside(self) -> None:
        if self._open is None or self.state.stage == "failed" or (self._opener and self._opener.is_alive()):
            return
        self.state = EmbeddingState("opening", "loading the embedding")
        self._opener = threading.Thread(target=self._open_now, args=(self._open,), name="embedding-loader", daemon=True)
        self._opener.start()

    def _open_now(self, open_embedding: Open) -> None:
        self._courtesy.on_thread()
        try:
            embedding = open_embedding(self._stop)
        except Exception as error:  # the last line of defence of this thread: the state says it to people
            from workspace.errors import WorkspaceError

            known = isinstance(error, WorkspaceError)
            logger.warning("there is no embedding: %s", error, exc_info=not known)
            self.state = EmbeddingState("failed", str(error) if known else "an unexpected error; see the server's log")
        else:
            if embedding is None:
                self.state = EmbeddingState("waiting", "the language model is not loaded")
                return  # whoever loads it calls wake()
            self.embedding, self.state = embedding, EmbeddingState("ready")
        self._wake.set()
