"""One event stream per browser tab: what the hub publishes, as server-sent events.

A new watcher first hears ``hello``; one that comes back with ``Last-Event-ID`` hears what it missed, or ``reset`` when
that is gone and the current state should be fetched anew. The stream ends when the server stops, when its key is
revoked, and when nobody reads it any more; its place is given back in any case.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from olympus.access import Principal
from olympus.admission import Slot
from olympus.errors import NotReady
from telemetry.hub import Subscription
from web import sse
from web.auth import Authenticator, requires
from web.context import principal, runtime
from web.errors import ApiError, FieldError
from web.jsonio import parse_query
from web.schemas import StreamQuery

blueprint = Blueprint("stream", __name__)

SCOPE = "kernels:read"
TOPICS = ("model", "history", "chat", "kernel.state", "kernel.metric", "kernel.checkpoint")
_TICK_SECONDS = 0.5
_HEARTBEAT_SECONDS = 5.0  # proxies cut silent connections after a minute, the dashboard calls 10 s of silence stale
_RECHECK_SECONDS = 2.0
_RETRY = "retry: 2000\n\n"


@blueprint.get("/olympus/stream")
@requires(SCOPE)
def stream() -> ResponseReturnValue:
    """Watch what happens."""
    query = parse_query(StreamQuery)
    topics = _topics(query.topics)
    serving = runtime()
    if serving.stop_event.is_set():
        raise NotReady("the server is stopping")
    slot = serving.admission.stream()
    try:
        watcher = _Watcher(slot, _last_event_id(query), topics)
    except BaseException:
        slot.release()
        raise
    response = sse.response(watcher.events())
    response.call_on_close(watcher.close)  # a stream that was never begun has no finally
    return response


class _Watcher:
    """A subscription, its slot, and what ends it. Made in the request, used after it."""

    def __init__(self, slot: Slot, last_event_id: int | None, topics: list[str]):
        from flask import current_app

        serving = runtime()
        self._slot = slot
        self._stopping = serving.stop_event
        self._authenticator: Authenticator = current_app.extensions["olympus.authenticator"]
        self._principal: Principal = principal()
        self._watch = sse.ClientWatch(request.environ)
        # The id is read before subscribing and events after it are delivered: nothing falls in between.
        self._hello = serving.hub.last_id if last_event_id is None else None
        since = self._hello if last_event_id is None else last_event_id
        self._subscription: Subscription = serving.hub.subscribe(topics, last_event_id=since)

    def events(self) -> Iterator[str]:
        """The stream's text."""
        try:
            yield _RETRY
            if self._hello is not None:
                yield sse.event({"last_event_id": self._hello}, name="hello", event_id=self._hello)
            said = checked = time.monotonic()
            while not self._stopping.is_set() and not self._watch.gone():
                for event in self._subscription.get(_TICK_SECONDS):
                    yield sse.event(event.data, name=event.topic, event_id=event.id)
                    said = time.monotonic()
                now = time.monotonic()
                if now - checked >= _RECHECK_SECONDS:
                    if not self._authenticator.still_allows(self._principal, SCOPE):
                        return
                    checked = now
                if now - said >= _HEARTBEAT_SECONDS:
                    yield ":\n\n"
                    said = now
        finally:
            self.close()

    def close(self) -> None:
        """Stop watching and give the slot back; harmless when done before."""
        self._subscription.close()
        self._slot.release()


def _topics(text: str) -> list[str]:
    topics = [topic.strip() for topic in text.split(",") if topic.strip()]
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        detail = f"unknown topic {unknown[0]!r}; known are {', '.join(TOPICS)}"
        raise ApiError(422, "invalid_request", f"topics: {detail}", errors=[FieldError("topics", detail)])
    return topics


def _last_event_id(query: StreamQuery) -> int | None:
    """The header wins: a browser sets it by itself when it reconnects to an address that may name an older id."""
    header = request.headers.get("Last-Event-ID", "")
    return int(header) if header.isascii() and header.isdigit() and len(header) < 20 else query.last_event_id
