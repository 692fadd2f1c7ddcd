"""What a kernel has said before, as drafts for what it says next: the same text in fewer steps.

Speculative decoding (Leviathan, Kalman, Matias 2023, arXiv 2211.17192) with the cheapest possible draft: a kernel that
knows eighty intents says the same eighty words. An earlier answer that begins like the current one is run as a whole;
the kernel keeps the part of it that it would have said anyway. Greedy answers stay what they are; only their cost
depends on what was said before.

Not here: the checking of drafts (``inference.speak``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence


class Phrasebook:
    """The last ``capacity`` different answers. Safe to use from all threads."""

    def __init__(self, capacity: int = 256):
        if capacity < 1:
            raise ValueError(f"a phrasebook needs room for at least one answer, got {capacity}")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, None] = OrderedDict()  # the latest last

    def learn(self, ids: Sequence[int]) -> None:
        """Note an answer, byte ids without EOS."""
        with self._lock:
            answer = bytes(ids)
            self._known[answer] = None
            self._known.move_to_end(answer)
            while len(self._known) > self.capacity:
                self._known.popitem(last=False)

    def draft(self, begun: Sequence[int]) -> list[int]:
        """How the latest answer that begins so went on; empty when there is none."""
        prefix = bytes(begun)
        with self._lock:
            found = next((known for known in reversed(self._known) if known.startswith(prefix)), prefix)
        return list(found[len(prefix) :])

    def __len__(self) -> int:
        with self._lock:
            return len(self._known)

    def check_invariants(self) -> None:
        """No more answers than there is room for."""
        with self._lock:
            assert len(self._known) <= self.capacity
