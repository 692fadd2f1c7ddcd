"""The door for questions to kernels: how many are answered at once, and that training gives way to them.

A question takes milliseconds of one core. As many are answered at once as there are cores, the others wait in front
of the door, and above ``kernels.max_queries`` nobody may wait: more at once would only make all of them slow. Training
threads look at the door all the time (``courtesy``) and hold until it is empty, but no longer than
``query_pause_ms`` per step, so that a crowd slows training down and cannot stop it.

The operating system knows, too, that training is the less urgent work (``niceness``).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from olympus.errors import OlympusError


class TooManyQueries(OlympusError):
    """As many questions are open as ``kernels.max_queries`` allows; try again shortly."""

    status = 503
    code = "too_many_queries"
    retry_after = 1.0


class QueryGate:
    """See the module docstring. Safe to use from all threads."""

    def __init__(self, limit: int, at_once: int | None = None):
        """``limit``: questions inside and waiting; ``at_once``: inside, by default as many as there are cores."""
        if limit < 1 or (at_once is not None and at_once < 1):
            raise ValueError(f"limit and at_once must be at least 1, got {limit} and {at_once}")
        self.limit = limit
        self.at_once = at_once or os.cpu_count() or 1
        self._seats = threading.BoundedSemaphore(self.at_once)
        self._lock = threading.Lock()
        self._empty = threading.Event()
        self._empty.set()
        self._open = 0
        self._refused = 0

    @contextmanager
    def question(self) -> Iterator[None]:
        """``with gate.question(): answer``. Raises ``TooManyQueries`` at once instead of waiting in a long line."""
        self._enter()
        try:
            with self._seats:
                yield
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if self._open >= self.limit:
                self._refused += 1
                raise TooManyQueries(f"{self.limit} questions are open, which is the limit; try again shortly")
            self._open += 1
            self._empty.clear()

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._empty.set()

    @property
    def is_empty(self) -> bool:
        """True when no question is open."""
        return self._empty.is_set()

    def give_way(self, at_most: float) -> None:
        """Return when no question is open, or after ``at_most`` seconds. For threads that are in no hurry."""
        if not self._empty.is_set():
            self._empty.wait(at_most)

    def counts(self) -> dict[str, int]:
        """How many are open, how many may be, and how many were refused since the start."""
        with self._lock:
            return {"open": self._open, "limit": self.limit, "refused": self._refused}

    def check_invariants(self) -> None:
        """Nobody is inside twice or for ever."""
        with self._lock:
            assert 0 <= self._open <= self.limit, (self._open, self.limit)
            assert self._empty.is_set() == (self._open == 0)


def be_nice(niceness: int) -> bool:
    """Tell the operating system that the calling thread can wait; True when it knows now.

    Linux keeps a niceness per thread, though POSIX says per process (setpriority(2), C library/kernel differences);
    elsewhere this would slow down the whole server, so nothing is done.
    """
    if sys.platform != "linux" or niceness == 0:
        return False
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
    return True
