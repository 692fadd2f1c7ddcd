"""Keeps an experience buffer in step with the history: new rows, late judgements, deletions.

New rows are read by cursor. Judgements and tombstones change rows *below* the cursor, so the rows of the ids that
the buffer holds or watches are looked at again, without their texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memory.history import History, Record
from olympus.experience_buffer import ExperienceBuffer
from olympus.requests import ALL_DOMAINS

_PAGE = 500


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one synchronisation changed. ``fresh``: ids of the examples that came in, in the order they came."""

    fresh: tuple[int, ...] = ()
    forgotten: int = 0

    @property
    def added(self) -> int:
        """How many examples came in."""
        return len(self.fresh)


class ExperienceSource:
    """The part of the history that one kernel learns from: a domain, or all of them."""

    def __init__(self, history: History, domain: str):
        self._history = history
        self.domain = None if domain == ALL_DOMAINS else domain

    def concerns(self, domain: str) -> bool:
        """True when a new experience of ``domain`` is for this kernel."""
        return self.domain is None or domain == self.domain

    def has_after(self, cursor: int) -> bool:
        """True when the history holds something for this kernel after ``cursor``."""
        return bool(self._history.since(cursor, domain=self.domain, limit=1))

    def read_new(self, buffer: ExperienceBuffer) -> list[int]:
        """Add everything after the buffer's cursor; returns the ids of the examples that came in."""
        added: list[int] = []
        while True:
            records = self._history.since(buffer.cursor, domain=self.domain, limit=_PAGE)
            added += _taken_in(buffer, records)
            if len(records) < _PAGE:
                return added

    def sync(self, buffer: ExperienceBuffer) -> SyncReport:
        """Read what is new, then apply deletions and judgements to what is held."""
        added = self.read_new(buffer)
        gone: list[int] = []
        reconsider: list[int] = []
        held = set(buffer.held_ids)
        watched = held - {example.id for example in buffer.training()} - {item.id for item in buffer.holdout()}
        seen: set[int] = set()
        for example_id, score, deleted in self._history.verdicts(sorted(held)):
            seen.add(example_id)
            if deleted:
                gone.append(example_id)
            elif example_id not in watched:
                buffer.judge(example_id, score)
            elif score is not None and score >= 0:
                reconsider.append(example_id)
        forgotten = buffer.forget([*gone, *(held - seen)])
        added += _taken_in(buffer, self._history.many(reconsider))
        return SyncReport(tuple(added), forgotten)

    def restore(self, buffer: ExperienceBuffer, state: dict[str, Any]) -> None:
        """Fill ``buffer`` from a checkpoint's state."""
        buffer.load_state_dict(state, self._history.many(ExperienceBuffer.ids_in(state)))


def _taken_in(buffer: ExperienceBuffer, records: Iterable[Record]) -> list[int]:
    return [record.id for record in records if buffer.add(record) in ("training", "holdout")]
