"""What the parts of ``benchmarks/memory.py`` share: embedded messages, and a memory filled with them.

The embedding of a filled memory is a table of what MiniLM made of each text, so that a part measures searching and not
embedding, which is measured by itself.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from benchmarks.kernel_parts.common import ROOT, MissingData, Options, banking77
from memory.embedding import Matrix, MiniLM, open_minilm, unit_rows
from memory.episodic import EpisodicMemory, EpisodicOptions
from memory.episodic_store import EpisodicStore
from memory.history import History, content_hash
from storage import migrate
from storage.database import Database
from storage.models import Experience
from workspace.errors import ModelDownloadFailed

_PAGE = 1000


@dataclass(frozen=True)
class Messages:
    """Texts with their intents, and what MiniLM makes of them [N, E]."""

    texts: list[str]
    intents: np.ndarray
    vectors: Matrix


class Table:
    """An embedding that looks up what another one made."""

    def __init__(self, name: str, floor: float, texts: Sequence[str], vectors: Matrix):
        self.name, self.floor, self.dimension = name, floor, vectors.shape[1]
        self._rows = dict(zip(texts, vectors, strict=True))

    def embed(self, texts: Sequence[str]) -> Matrix:
        """[N, E]."""
        return np.stack([self._rows[text] for text in texts])


def minilm(options: Options) -> MiniLM:
    """MiniLM out of the cache, fetched where it is not there."""
    try:
        return open_minilm(ROOT / ".cache")
    except ModelDownloadFailed as error:
        raise MissingData(f"MiniLM is not in the cache and cannot be fetched: {error}") from None


def embedded(options: Options, model: MiniLM, split: str, limit: int) -> Messages:
    """The first ``limit`` different messages of a split of banking77, in an order drawn with the sweep seed."""
    rows = dict(banking77(options, split))
    order = np.random.default_rng(7).permutation(len(rows))[:limit]
    texts = [list(rows)[index] for index in order]
    vectors = [model.embed(texts[begin : begin + 32]) for begin in range(0, len(texts), 32)]
    return Messages(texts, np.array([rows[text] for text in texts]), np.concatenate(vectors))


def more_of(messages: Messages, count: int, seed: int) -> Messages:
    """``count`` variants of the messages, where these are too few: vectors at a cosine near 0.85, texts numbered."""
    drawer = np.random.default_rng(seed)
    which = drawer.integers(0, len(messages.texts), count)
    width = messages.vectors.shape[1]
    noise = drawer.standard_normal((count, width)).astype(np.float32) * (0.62 / width**0.5)
    vectors = unit_rows(messages.vectors[which] + noise)
    texts = [f"{messages.texts[source]} {number}" for number, source in enumerate(which)]
    return Messages(texts, messages.intents[which], vectors)


@contextlib.contextmanager
def filled(messages: Messages, floor: float, asked: Messages, **options: object) -> Iterator[EpisodicMemory]:
    """A settled memory of ``messages`` in a database of its own; ``asked`` can be asked. Ids are 1, 2, ... in order.

    Every other message is of domain "a" and "b"; sessions have ten messages each.
    """
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder, 'memory.db')}")
        migrate.upgrade(database)
        store = EpisodicStore(database)
        for begin in range(0, len(messages.texts), _PAGE):
            some = range(begin, min(begin + _PAGE, len(messages.texts)))
            with database.write() as session:
                session.execute(sa.insert(Experience), [_row(index, messages.texts[index]) for index in some])
            store.save("table", [index + 1 for index in some], messages.vectors[some.start : some.stop])
        table = Table("table", floor, asked.texts, asked.vectors)
        memory = EpisodicMemory(
            database, History(database), EpisodicOptions(**options), default_domain="a", embedding=table
        )
        memory.start()
        memory.search(asked.texts[0])  # somebody asks: vectors are worth loading
        assert memory.wait_until_settled(600), memory.status()
        try:
            yield memory
        finally:
            memory.stop()
            database.close()


def _row(index: int, text: str) -> dict[str, object]:
    return {
        "domain": "ab"[index % 2],
        "session_id": f"s{index // 10}",
        "source": "benchmark",
        "observation": text,
        "action": "",
        "meta": {},
        "content_hash": content_hash(text, ""),
        "created_at": time.time(),
    }
