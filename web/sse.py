"""Server-sent events on a WSGI thread: the wire format, and noticing that nobody reads any more.

A generator is told about a lost client only at its next write (measured: never, while it is silent), so the socket
is asked between writes whether the other side has closed it: seen within 50 ms without writing anything.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any

from flask import Response

from web.jsonio import dumps

KEEP_ALIVE = ": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Any, *, name: str | None = None, event_id: int | None = None) -> str:
    """One event. ``data`` becomes one line of JSON."""
    head = (f"id: {event_id}\n" if event_id is not None else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {dumps(data)}\n\n"


def response(events: Iterator[str], headers: Mapping[str, str] | None = None) -> Response:
    """``events`` as a streaming response that proxies do not hold back."""
    return Response(events, mimetype="text/event-stream", headers={**_HEADERS, **(headers or {})})


class ClientWatch:
    """Asks a request's socket whether the client is still there; says yes where the server does not lend the socket."""

    def __init__(self, environ: Mapping[str, Any]):
        self._socket: Any = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")

    def gone(self) -> bool:
        """True once the client has closed the connection."""
        if self._socket is None:
            return False
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"")
        except (BlockingIOError, InterruptedError):
            return False  # nothing to read: it is waiting, as it should
        except ValueError:
            return False  # a TLS socket cannot be asked
        except OSError:
            return True
