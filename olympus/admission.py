"""Admission: how many chats and how many event streams are open at once, and who is told to come back.

Every open response holds one of the server's threads for as long as it lasts. Without a limit the threads run out
and health checks hang behind silent streams (measured: gunicorn queues invisibly, it never answers 503). The engine
has its own, shorter queue; this one protects the threads.
"""

from __future__ import annotations

import threading
from types import TracebackType

from olympus.errors import OlympusError


class TooManyChats(OlympusError):
    """As many chats are open as ``server.max_chats`` allows."""

    status = 429
    code = "too_many_chats"
    retry_after = 2.0


class TooManyStreams(OlympusError):
    """As many event streams are open as ``server.max_streams`` allows."""

    status = 503
    code = "too_many_streams"
    retry_after = 5.0


class Slot:
    """One admitted request. Release it once, or several times: only the first counts. A context manager, too."""

    def __init__(self, pool: _Pool):
        self._pool = pool
        self._lock = threading.Lock()
        self._held = True

    @property
    def held(self) -> bool:
        """True until it is released."""
        return self._held

    def release(self) -> None:
        """Let the next one in."""
        with self._lock:
            if self._held:
                self._held = False
                self._pool.leave()

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class _Pool:
    """A counter with a ceiling that refuses instead of waiting."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._taken = 0
        self._refused = 0

    def enter(self) -> Slot | None:
        with self._lock:
            if self._taken >= self.limit:
                self._refused += 1
                return None
            self._taken += 1
        return Slot(self)

    def leave(self) -> None:
        with self._lock:
            self._taken -= 1

    def counts(self) -> tuple[int, int]:
        with self._lock:
            return self._taken, self._refused

    def check_invariants(self) -> None:
        with self._lock:
            assert 0 <= self._taken <= self.limit, (self._taken, self.limit)
            assert self._refused >= 0


class Admission:
    """``with admission.chat(): ...`` or keep the slot and ``release()`` it when the response is closed."""

    def __init__(self, max_chats: int, max_streams: int):
        if max_chats < 1 or max_streams < 1:
            raise ValueError(f"max_chats and max_streams must be at least 1, got {max_chats} and {max_streams}")
        self._chats = _Pool(max_chats)
        self._streams = _Pool(max_streams)

    def chat(self) -> Slot:
        """A place for one chat request. Raises ``TooManyChats``."""
        slot = self._chats.enter()
        if slot is None:
            raise TooManyChats(f"{self._chats.limit} chats are open, which is the limit; try again shortly")
        return slot

    def stream(self) -> Slot:
        """A place for one event stream. Raises ``TooManyStreams``."""
        slot = self._streams.enter()
        if slot is None:
            raise TooManyStreams(f"{self._streams.limit} event streams are open, which is the limit; close a tab")
        return slot

    def counts(self) -> dict[str, int]:
        """How many are open, how many may be, and how many were refused since the start."""
        chats, chats_refused = self._chats.counts()
        streams, streams_refused = self._streams.counts()
        return {
            "chats": chats,
            "max_chats": self._chats.limit,
            "chats_refused": chats_refused,
            "streams": streams,
            "max_streams": self._streams.limit,
            "streams_refused": streams_refused,
        }

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when more are in than may be, or more have left than came."""
        self._chats.check_invariants()
        self._streams.check_invariants()
