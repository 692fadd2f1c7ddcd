"""What every response has in common: a request id, security headers, one log line, and server-sent events.

Also the one way to notice under WSGI that a client has gone while nothing is being written to it: peek at its socket.
"""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from typing import Any

import structlog
from flask import Flask, Response, g, request

from settings import Settings
from telemetry import logs
from telemetry.metrics import Metrics

log = structlog.get_logger("olympus.access")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
_QUIET = frozenset({"static", "ops.healthz", "ops.readyz", "ops.metrics"})


def install(app: Flask, settings: Settings, metrics: Metrics) -> None:
    """Register the hooks on ``app``. Call it before anything that may refuse a request."""

    @app.before_request
    def begin() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        g.begun = time.perf_counter()
        logs.bind_request_id(g.request_id)

    @app.after_request
    def finish(response: Response) -> Response:
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if request.is_secure:
            response.headers.setdefault("Strict-Transport-Security", "max-age=31536000")
        response.headers["X-Request-Id"] = g.get("request_id", "")
        if "Cache-Control" not in response.headers or request.endpoint != "static":
            response.headers.setdefault("Cache-Control", "no-store")
        seconds = time.perf_counter() - g.get("begun", time.perf_counter())
        route = request.url_rule.rule if request.url_rule is not None else "(none)"
        metrics.requests.labels(request.method, route, str(response.status_code)).observe(seconds)
        if request.endpoint not in _QUIET:
            principal = g.get("principal")
            log.info(
                "request",
                method=request.method,
                path=request.path,
                status=response.status_code,
                ms=round(seconds * 1000, 1),
                by=None if principal is None else principal.id,
            )
        return response

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        logs.unbind()


def event_stream(chunks: Any) -> Response:
    """A response of server-sent events; ``chunks`` yields text and is closed when the client has gone."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(chunks, mimetype="text/event-stream", headers=headers)


def sse(data: Any, *, event: str | None = None, event_id: int | None = None, retry: int | None = None) -> str:
    """One event in the wire format of the HTML standard, section 9.2."""
    head = "" if retry is None else f"retry: {retry}\n"
    head += "" if event_id is None else f"id: {event_id}\n"
    head += "" if event is None else f"event: {event}\n"
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return f"{head}data: {text}\n\n"


def client_has_gone(environ: dict[str, Any]) -> bool:
    """True when the peer has closed its connection. Under a server that hides the socket: False.

    Works without writing anything: end-of-file is readable on the socket (measured: seen within 50 ms).
    """
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return False
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"")
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True
