"""The event hub: what happens, told to whoever watches, without ever making the teller wait.

Events get increasing ids and stay in a bounded ring, so that a browser that reconnects with ``Last-Event-ID`` gets
exactly what it missed, or is told to start afresh (``reset``). Each subscriber has a bounded queue. Frequent
measurements are published with a ``key``: a newer one replaces an unread older one with the same key; what carries
no key (a state change) is never dropped silently: when the queue is full, the subscriber gets a ``reset``.

In memory only. What must survive the process is in the database. Idea: the server-sent events section of the HTML
standard, and gradio-app/trackio's cursor.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

RESET_TOPIC = "reset"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``key`` None means that it must not be replaced by a newer one."""

    id: int
    topic: str
    data: dict[str, Any]
    key: str | None = None


class Subscription:
    """One watcher's queue. Use as a context manager, or ``close()`` it."""

    def __init__(self, hub: EventHub, topics: frozenset[str], capacity: int, where: Mapping[str, Any]):
        self._hub = hub
        self._topics = topics
        self._where = dict(where)
        self._capacity = capacity
        self._ready = threading.Condition()
        self._pending: OrderedDict[int, Event] = OrderedDict()
        self._latest: dict[str, int] = {}
        self.closed = False

    def wants(self, event: Event) -> bool:
        """True when the event's topic was asked for (no topics means all) and its data say what was asked for."""
        if event.topic == RESET_TOPIC:
            return True
        if self._topics and event.topic not in self._topics:
            return False
        return all(event.data.get(name) == value for name, value in self._where.items())

    def offer(self, event: Event) -> None:
        """Called by the hub; never blocks."""
        with self._ready:
            if event.key is not None:
                old = self._latest.pop(event.key, None)
                if old is not None:
                    self._pending.pop(old, None)
                self._latest[event.key] = event.id
            self._pending[event.id] = event
            if len(self._pending) > self._capacity:
                self._pending.clear()
                self._latest.clear()
                self._pending[event.id] = Event(event.id, RESET_TOPIC, {"reason": "too slow"})
            self._ready.notify()

    def get(self, timeout: float) -> list[Event]:
        """Everything that is waiting, in order; after ``timeout`` seconds an empty list."""
        with self._ready:
            if not self._pending and not self.closed:
                self._ready.wait(timeout)
            events = list(self._pending.values())
            self._pending.clear()
            self._latest.clear()
            return events

    def close(self) -> None:
        """Stop receiving and wake a waiting ``get``."""
        self._hub.unsubscribe(self)
        with self._ready:
            self.closed = True
            self._ready.notify_all()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """At most ``capacity`` events wait, ids increase, and every remembered key waits."""
        with self._ready:
            assert len(self._pending) <= self._capacity
            assert list(self._pending) == sorted(self._pending)
            assert all(event_id in self._pending for event_id in self._latest.values())


class EventHub:
    """Publishes events to subscribers and remembers the last ``ring`` of them."""

    def __init__(self, ring: int = 4096):
        self._lock = threading.Lock()
        self._ring: deque[Event] = deque(maxlen=ring)
        # Ids start at the wall clock in milliseconds: those of an earlier life of the process are always older.
        self._next = int(time.time() * 1000)
        self._subscribers: set[Subscription] = set()

    def publish(self, topic: str, data: dict[str, Any], key: str | None = None) -> Event:
        """Tell ``data`` (JSON types only) to everybody who watches ``topic``."""
        with self._lock:
            event = Event(self._next, topic, data, key)
            self._next += 1
            self._ring.append(event)
            # Under the lock, so that every subscriber sees ids increase; offer() never blocks.
            for subscriber in self._subscribers:
                if subscriber.wants(event):
                    subscriber.offer(event)
        return event

    def subscribe(
        self,
        topics: Iterable[str] = (),
        *,
        last_event_id: int | None = None,
        capacity: int = 256,
        where: Mapping[str, Any] | None = None,
    ) -> Subscription:
        """Watch ``topics`` (none = all). With ``last_event_id``, first deliver what came after it.

        ``where``: only events whose data have these values; others take no room in this watcher's queue.

        When the ring no longer holds all of that, or the id is from another process's life, the first event is
        ``reset``: the watcher should fetch the current state anew.
        """
        subscription = Subscription(self, frozenset(topics), capacity, where or {})
        with self._lock:
            if last_event_id is not None and last_event_id != self._next - 1:
                self._replay(subscription, last_event_id)
            self._subscribers.add(subscription)
        return subscription

    def _replay(self, subscription: Subscription, last_event_id: int) -> None:
        oldest = self._ring[0].id if self._ring else self._next
        if last_event_id >= self._next or last_event_id < oldest - 1:
            subscription.offer(Event(self._next - 1, RESET_TOPIC, {"reason": "missed events are gone"}))
            return
        for event in self._ring:
            if event.id > last_event_id and subscription.wants(event):
                subscription.offer(event)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget a subscriber; harmless when it is not known."""
        with self._lock:
            self._subscribers.discard(subscription)

    @property
    def last_id(self) -> int:
        """Id of the newest event, or of the moment before the first one."""
        with self._lock:
            return self._next - 1

    @property
    def subscribers(self) -> int:
        """How many watch now."""
        with self._lock:
            return len(self._subscribers)
