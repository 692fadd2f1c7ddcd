"""Browser sessions: a signed cookie that names a key, and a limit on how often a sign-in may be tried.

The cookie holds the key's id, never the key; it is signed, so it cannot be made up, and it is checked against the
key store on each request, so that revoking the key ends the session. It ends by itself after a week.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from flask import Request
from itsdangerous import BadSignature, TimestampSigner
from werkzeug.wrappers import Response

from olympus.errors import NotReady

MAX_AGE_SECONDS = 7 * 86400
_PLAIN_NAME = "olympus_session"
_SECURE_NAME = f"__Host-{_PLAIN_NAME}"  # browsers then insist on Secure, Path=/ and no Domain


class SessionCookies:
    """Writes and reads the cookie. ``secret`` is asked each time: it exists once the runtime has started."""

    def __init__(self, secret: Callable[[], bytes]):
        self._secret = secret

    def read(self, request: Request) -> str | None:
        """The principal id that a valid cookie names, or None."""
        value = request.cookies.get(_name(request))
        if value is None or not self._secret():
            return None
        try:
            return self._signer().unsign(value, max_age=MAX_AGE_SECONDS).decode()
        except BadSignature:  # expired ones, too
            return None

    def write(self, request: Request, response: Response, principal_id: str) -> None:
        """Sign the browser in. Raises ``NotReady`` before the runtime has started: there is nothing to sign with."""
        if not self._secret():
            raise NotReady("the server is starting; try again in a moment")
        response.set_cookie(
            _name(request),
            self._signer().sign(principal_id).decode(),
            max_age=MAX_AGE_SECONDS,
            path="/",
            secure=request.is_secure,
            httponly=True,
            samesite="Lax",
        )

    def clear(self, request: Request, response: Response) -> None:
        """Sign the browser out."""
        response.delete_cookie(_name(request), path="/", secure=request.is_secure, httponly=True, samesite="Lax")

    def _signer(self) -> TimestampSigner:
        return TimestampSigner(
            self._secret(), salt="olympus.session", key_derivation="hmac", digest_method=hashlib.sha256
        )


def _name(request: Request) -> str:
    return _SECURE_NAME if request.is_secure else _PLAIN_NAME


class LoginLimiter:
    """At most ``limit`` tries per address in ``window`` seconds; remembers at most ``addresses`` addresses."""

    def __init__(
        self,
        limit: int = 10,
        window: float = 60.0,
        addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limit, self._window, self._most, self._clock = limit, window, addresses, clock
        self._lock = threading.Lock()
        self._tries: OrderedDict[str, deque[float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Count a try; 0 when it may be made, else the seconds until the next one may be."""
        now = self._clock()
        with self._lock:
            tries = self._tries.setdefault(address, deque())
            self._tries.move_to_end(address)
            while len(self._tries) > self._most:
                self._tries.popitem(last=False)
            while tries and now - tries[0] >= self._window:
                tries.popleft()
            if len(tries) >= self._limit:
                return self._window - (now - tries[0])
            tries.append(now)
            return 0.0

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when more is remembered than allowed."""
        with self._lock:
            assert len(self._tries) <= self._most
            assert all(len(tries) <= self._limit for tries in self._tries.values())
