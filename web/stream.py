"""``GET /olympus/stream``: what happens, as server-sent events, resumable with ``Last-Event-ID``.

The first event is ``hello`` with the newest id (a fresh watcher fetches the state and follows from there), the events
that were missed, or ``reset`` when those are gone. A comment goes out every 15 s, and each time the watcher's key is
checked again: a revoked key loses its stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Blueprint, Response, current_app, request

from olympus.access import Principal
from olympus.runtime import Runtime
from telemetry.hub import Subscription
from web.auth import current_principal
from web.errors import ApiError
from web.openai import _Stream as Releasing
from web.wire import client_has_gone, event_stream, sse

blueprint = Blueprint("stream", __name__, url_prefix="/olympus")

_HEARTBEAT_SECONDS = 15.0
_COMMENT_SECONDS = 5.0
_WAIT_SECONDS = 0.25


@blueprint.get("/stream")
def events() -> Response:
    """Follow the topics named in ``topics`` (comma separated; none means all)."""
    runtime: Runtime = current_app.extensions["olympus"]
    topics = [topic for topic in request.args.get("topics", "").split(",") if topic]
    last = request.headers.get("Last-Event-ID") or request.args.get("last_event_id")
    if last is not None and not (last.isdecimal() and len(last) < 19):
        raise ApiError(400, "Last-Event-ID: send the id of an event of this stream", code="invalid_value")
    slot = runtime.admission.admit("stream")
    subscription = runtime.hub.subscribe(topics, last_event_id=None if last is None else int(last))
    hello = None if last is not None else runtime.hub.last_id
    return event_stream(Releasing(_events(runtime, subscription, current_principal(), hello, request.environ), slot))


def _events(
    runtime: Runtime, subscription: Subscription, principal: Principal, hello: int | None, environ: dict[str, object]
) -> Iterator[str]:
    with subscription:
        if hello is not None:
            yield sse({"last_id": hello}, event="hello", event_id=hello, retry=2000)
        else:
            yield "retry: 2000\n\n"
        checked = commented = time.monotonic()
        while not runtime.stop_event.is_set():
            for event in subscription.get(_WAIT_SECONDS):
                yield sse(event.data, event=event.topic, event_id=event.id)
            now = time.monotonic()
            if now - checked >= _HEARTBEAT_SECONDS:
                checked = now
                if not runtime.keys.still_valid(principal):
                    return
            if now - commented >= _COMMENT_SECONDS:
                commented = now
                yield ": still here\n\n"
            if client_has_gone(environ):
                return
