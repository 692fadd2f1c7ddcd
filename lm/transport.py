"""JSON over HTTP to a model server, with bounded retries: what both HTTP clients share.

A request is tried again where trying again can help: no connection, a timeout, 408, 429, and 5xx. Pauses double up to
``longest_pause`` with some randomness, so that many clients do not return at once; a ``Retry-After`` counts instead
where the server gives one. Any other 4xx is final. Redirects are not followed: a key must not travel to another host.

It knows no API; what is asked and how an answer is read is the clients' business.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from lm.errors import InvalidResponse, InvalidSpec, RequestRefused, Unavailable

_RETRIED = frozenset({408, 429})
_LONGEST_DETAIL = 500  # characters of a server's words that an error repeats


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait and how often to try. Times in seconds; ``timeout`` is for one try without any new byte."""

    timeout: float = 120.0
    connect_timeout: float = 10.0
    tries: int = 5
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InvalidSpec(f"tries must be at least 1, got {self.tries}")
        for name in ("timeout", "connect_timeout", "first_pause", "longest_pause"):
            value = getattr(self, name)
            if not 0 < value < 86_400:
                raise InvalidSpec(f"{name} must be above 0 and below a day, got {value!r} seconds")


class Closing(ABC):
    """Whoever makes one closes it, or uses it in a ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held: connections, or a model."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Transport(Closing):
    """One server. Safe to use from any thread; ``close()`` it, or use it in a ``with``.

    A set ``stop`` ends the waiting between tries at once, with ``Unavailable``.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
    ):
        self.base_url = _checked(base_url)
        self._patience = patience or Patience()
        self._stop = stop or threading.Event()
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        timeout = httpx.Timeout(self._patience.timeout, connect=self._patience.connect_timeout)
        # A proxy from the environment is for the world outside, never for a server on this machine.
        self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=not _is_local(self.base_url))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that ``path`` answers to ``body``. Raises what ``request`` does."""
        return self.request("POST", path, body=body)

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON object at ``path``. Raises what ``request`` does."""
        return self.request("GET", path, query=query)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Ask until there is an answer. Raises ``RequestRefused``, ``Unavailable`` or ``InvalidResponse``."""
        url = self.base_url + path
        last = "never tried"
        for attempt in range(self._patience.tries):
            wanted: float | None = None
            try:
                response = self._client.request(method, url, json=body, params=query)
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if response.is_success:
                    return _json_object(url, response)
                last = f"HTTP {response.status_code}: {_detail(response)}"
                if response.status_code < 500 and response.status_code not in _RETRIED:
                    raise RequestRefused(url, response.status_code, _detail(response))
                wanted = _retry_after(response.headers.get("Retry-After"))
            if attempt + 1 < self._patience.tries and self._stop.wait(self._pause(attempt, wanted)):
                raise Unavailable(url, attempt + 1, f"{last}; stopped while waiting")
        raise Unavailable(url, self._patience.tries, last)

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()

    def _pause(self, attempt: int, wanted: float | None) -> float:
        """Seconds before the next try; never longer than ``longest_pause``, whatever the server wishes."""
        longest = self._patience.longest_pause
        if wanted is not None:
            return min(wanted, longest)
        return float(min(self._patience.first_pause * 2**attempt, longest) * random.uniform(0.75, 1.25))


class Connected(Closing):
    """A client of one server."""

    _transport: Transport

    def close(self) -> None:
        """Drop the connections."""
        self._transport.close()


def _checked(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidSpec(f"{base_url!r} is not the address of a server: give http:// or https://, host, and a path")
    if parts.username or parts.password:
        raise InvalidSpec("an address with a password in it ends up in logs; give the key as api_key")
    return base_url.rstrip("/")


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _json_object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        said = response.text[:80]
        raise InvalidResponse(f"{url} answered what is not JSON ({said!r}); is it the address of the API?") from None
    if not isinstance(found, dict):
        raise InvalidResponse(f"{url} answered a JSON {type(found).__name__}, expected an object")
    return found


def _detail(response: httpx.Response) -> str:
    """The server's own words: OpenAI's error object, FastAPI's detail, RFC 9457's detail, or the plain body."""
    try:
        found = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return response.text[:_LONGEST_DETAIL].strip() or "no explanation"
    if isinstance(found, dict):
        error = found.get("error")
        found = error.get("message", error) if isinstance(error, dict) else error or found.get("detail", found)
    return (found if isinstance(found, str) else json.dumps(found))[:_LONGEST_DETAIL]


def _retry_after(value: str | None) -> float | None:
    """Seconds from either form of the header (RFC 9110, 10.2.3); None where it is absent or senseless."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None
