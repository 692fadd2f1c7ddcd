"""Answers that nobody heard, so that a client's retry does not write its question into the history twice.

OpenAI's clients ask again by themselves when a connection breaks or takes too long, and say so (the header
``x-stainless-retry-count``), but send no ``Idempotency-Key``. What the first try came to is therefore remembered for a
while: a whole answer is given again, an answer that was cut off is forgotten once the retry has one. Only what was
not delivered is remembered: equal requests that are not retries, several samples of one prompt, stay apart.

In memory only: after a restart a retry is answered anew.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from olympus.chat_types import ChatRequest

_SECONDS = 600.0
_MOST = 1024


@dataclass(frozen=True, slots=True)
class Unheard:
    """An experience whose answer did not reach its client. ``whole``: it had been written to its end."""

    experience_id: int
    whole: bool
    at: float


class UnheardAnswers:
    """The newest of them by their request. Safe to use from all threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Unheard] = OrderedDict()

    def note(self, request: ChatRequest, experience_id: int | None, *, whole: bool) -> None:
        """The client of ``request`` left; None when nothing was written down."""
        if experience_id is None:
            return
        name = _name(request)
        with self._lock:
            self._found.pop(name, None)
            self._found[name] = Unheard(experience_id, whole, self._clock())
            while len(self._found) > _MOST:
                self._found.popitem(last=False)

    def take(self, request: ChatRequest) -> Unheard | None:
        """What an earlier try of ``request`` came to, once; None for what is no retry."""
        if not request.retry and request.idempotency_key is None:
            return None
        with self._lock:
            found = self._found.pop(_name(request), None)
        return None if found is None or self._clock() - found.at > _SECONDS else found

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when more is kept than may be."""
        with self._lock:
            assert len(self._found) <= _MOST


def _name(request: ChatRequest) -> str:
    return f"{request.actor}\n{request.fingerprint()}\n{request.idempotency_key or ''}"
