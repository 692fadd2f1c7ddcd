"""What has been lived through in a domain since its last distillation, counted as the history grows.

A count follows the history by id, so that a look at a domain with a million experiences costs only what is new. Scores
may be given after the fact: those of the newest experiences are read again at every look.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from memory.history import History, Record

#: Characters of a token where no tokenizer is at hand; English prose has 4 to 5.
CHARACTERS_PER_TOKEN = 4
#: Scores that are remembered of a domain.
_SCORES = 512
_PAGE = 500


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` without a tokenizer."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


@dataclass
class Count:
    """Of the experiences above ``since``. ``episodes``: named ones once, every nameless experience as its own."""

    since: int
    position: int
    tokens: int = 0
    experiences: int = 0
    nameless: int = 0
    named: set[str] = field(default_factory=set)
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=_SCORES))

    @property
    def episodes(self) -> int:
        """How many episodes."""
        return self.nameless + len(self.named)


class Tally:
    """One for all domains. Safe to use from all threads."""

    def __init__(self, history: History, count_tokens: Callable[[str], int] = estimate_tokens):
        self._history = history
        self._count_tokens = count_tokens
        self._lock = threading.Lock()
        self._counts: dict[str, Count] = {}

    def look(self, domain: str, since: int) -> Count:
        """The count of ``domain`` above id ``since``, up to date. Counts anew when ``since`` has changed."""
        with self._lock:
            count = self._counts.get(domain)
            if count is None or count.since != since:
                count = self._counts[domain] = Count(since, since)
            while records := self._history.since(count.position, domain=domain, limit=_PAGE):
                for record in records:
                    self._add(count, record)
                count.position = records[-1].id
            return count

    def scores(self, count: Count) -> list[float]:
        """The scores of the newest experiences, oldest first; those without one, and deleted ones, are left out."""
        with self._lock:
            ids = list(count.newest)
        verdicts = {number: (score, deleted) for number, score, deleted in self._history.verdicts(ids)}
        found = (verdicts.get(number, (None, True)) for number in ids)
        return [score for score, deleted in found if score is not None and not deleted]

    def _add(self, count: Count, record: Record) -> None:
        if record.deleted:
            return
        count.experiences += 1
        count.tokens += sum(self._count_tokens(entry.content) for entry in record.entries())
        count.newest.append(record.id)
        if record.episode_id is None:
            count.nameless += 1
        else:
            count.named.add(record.episode_id)
