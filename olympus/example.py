"""An experience to imitate, a batch of them, and which experiences of the history are imitated at all."""

from __future__ import annotations

from dataclasses import dataclass

from memory.history import Record

#: Source of a kernel's own answers; they need a positive judgement before they are imitated.
QUERY_SOURCE = "query"


@dataclass(frozen=True, slots=True)
class Example:
    """An experience to imitate. ``weight`` is relative to an unjudged one."""

    id: int
    observation: str
    action: str
    score: float | None
    content_hash: str
    source: str = "api"

    @classmethod
    def of(cls, record: Record) -> Example:
        """What is kept of a record."""
        return cls(record.id, record.observation, record.action, record.score, record.content_hash, record.source)

    @property
    def weight(self) -> float:
        """1 when unjudged, up to 2 when confirmed."""
        return 1.0 + min(max(self.score or 0.0, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Draw:
    """A batch: examples, and how much the row of each counts (1, or less where it was drawn for its priority)."""

    examples: list[Example]
    weights: list[float]


def is_imitable(source: str, score: float | None) -> bool:
    """Not with a negative score; a kernel's own answers only with a positive one."""
    if score is None:
        return source != QUERY_SOURCE
    return score > 0 if source == QUERY_SOURCE else score >= 0
