"""Event streams: what the hub publishes, as server-sent events; all topics, or the life of one kernel.

A new watcher first hears ``hello``; one that comes back with ``Last-Event-ID`` hears what it missed, or ``reset`` when
that is gone and the current state should be fetched anew. In silence a comment is sent every few seconds, with the
id up to which nothing was missed: a watcher of something quiet can come back late without a ``reset``. A stream ends
when the server stops, when its key is revoked, when its kernel is deleted, and when nobody reads it any more; its
place is given back in any case.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Blueprint, request
from flask.typing import ResponseReturnValue

from olympus.access import Principal
from olympus.admission import Slot
from olympus.errors import NotReady
from telemetry.hub import Event, Subscription
from web import sse
from web.auth import Authenticator, requires
from web.context import principal, runtime
from web.errors import ApiError, FieldError
from web.jsonio import parse_query
from web.schemas import KernelStreamQuery, StreamQuery

blueprint = Blueprint("stream", __name__)

SCOPE = "kernels:read"
KERNEL_TOPICS = ("kernel.state", "kernel.metric", "kernel.checkpoint", "kernel.drift")
TOPICS = ("model", "history", "chat", *KERNEL_TOPICS, "kernel.proposal", "cartridge", "distillation", "system")
_TICK_SECONDS = 0.5
_HEARTBEAT_SECONDS = 5.0  # proxies cut silent connections after a minute, the dashboard calls 10 s of silence stale
_RECHECK_SECONDS = 2.0
_RETRY = "retry: 2000\n\n"


@blueprint.get("/olympus/stream")
@requires(SCOPE)
def stream() -> ResponseReturnValue:
    """Watch what happens."""
    query = parse_query(StreamQuery)
    return _open(_last_event_id(query.last_event_id), _topics(query.topics))


@blueprint.get("/olympus/kernels/<kernel:kernel_id>/events")
@requires(SCOPE)
def kernel_events(kernel_id: str) -> ResponseReturnValue:
    """Watch one kernel until it is deleted."""
    query = parse_query(KernelStreamQuery)
    serving = runtime()
    since = _last_event_id(query.last_event_id)
    # Read before looking the kernel up: if it is deleted in between, that event is among those delivered.
    newest = serving.hub.last_id
    serving.zeus.rows.get(kernel_id)
    return _open(since, list(KERNEL_TOPICS), kernel_id, newest)


def _open(
    since: int | None, topics: list[str], kernel_id: str | None = None, newest: int | None = None
) -> ResponseReturnValue:
    serving = runtime()
    if serving.stop_event.is_set():
        raise NotReady("the server is stopping")
    slot = serving.admission.stream()
    try:
        watcher = _Watcher(slot, since, topics, kernel_id, newest)
    except BaseException:
        slot.release()
        raise
    response = sse.response(watcher.events())
    response.call_on_close(watcher.close)  # a stream that was never begun has no finally
    return response


class _Watcher:
    """A subscription, its slot, and what ends it. Made in the request, used after it."""

    def __init__(
        self, slot: Slot, last_event_id: int | None, topics: list[str], kernel_id: str | None, newest: int | None
    ):
        from flask import current_app

        serving = runtime()
        self._slot = slot
        self._stopping = serving.stop_event
        self._authenticator: Authenticator = current_app.extensions["olympus.authenticator"]
        self._principal: Principal = principal()
        self._watch = sse.ClientWatch(request.environ)
        self._hub = serving.hub
        # The id is read before subscribing and events after it are delivered: nothing falls in between.
        newest = serving.hub.last_id if newest is None else newest
        self._hello = newest if last_event_id is None else None
        self._subscription: Subscription = serving.hub.subscribe(
            topics,
            last_event_id=newest if last_event_id is None else last_event_id,
            where=None if kernel_id is None else {"kernel_id": kernel_id},
        )
        self._of_one_kernel = kernel_id is not None

    def events(self) -> Iterator[str]:
        """The stream's text."""
        try:
            yield _RETRY
            if self._hello is not None:
                yield sse.event({"last_event_id": self._hello}, name="hello", event_id=self._hello)
            said = checked = time.monotonic()
            while not self._stopping.is_set() and not self._watch.gone():
                seen = self._hub.last_id  # whatever is newer comes out of the queue now or later
                for event in self._subscription.get(_TICK_SECONDS):
                    yield sse.event(event.data, name=event.topic, event_id=event.id)
                    said, seen = time.monotonic(), max(seen, event.id)
                    if self._is_the_end(event):
                        return
                now = time.monotonic()
                if now - checked >= _RECHECK_SECONDS:
                    if not self._authenticator.still_allows(self._principal, SCOPE):
                        return
                    checked = now
                if now - said >= _HEARTBEAT_SECONDS:
                    yield f":\nid: {seen}\n\n"
                    said = now
        finally:
            self.close()

    def _is_the_end(self, event: Event) -> bool:
        return self._of_one_kernel and event.topic == "kernel.state" and event.data.get("state") == "deleted"

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


def _last_event_id(asked: int | None) -> int | None:
    """The header wins: a browser sets it by itself when it reconnects to an address that may name an older id."""
    header = request.headers.get("Last-Event-ID", "")
    return int(header) if header.isascii() and header.isdigit() and len(header) < 20 else asked
