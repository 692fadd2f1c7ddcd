"""The event hub: order, resume, coalescing, back-pressure."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from telemetry.hub import RESET_TOPIC, EventHub


def test_topics_and_order() -> None:
    hub = EventHub()
    with hub.subscribe(["a"]) as watcher:
        events = [hub.publish("a", {"n": 1}), hub.publish("b", {}), hub.publish("a", {"n": 2})]
        assert watcher.get(0) == [events[0], events[2]]
        assert watcher.get(0) == []
    assert hub.subscribers == 0


def test_resume_delivers_exactly_what_was_missed() -> None:
    hub = EventHub()
    events = [hub.publish("a", {"n": n}) for n in range(5)]
    with hub.subscribe(last_event_id=events[1].id) as watcher:
        assert watcher.get(0) == events[2:]
    with hub.subscribe(last_event_id=events[4].id) as watcher:
        assert watcher.get(0) == []


def test_resume_beyond_the_ring_or_from_another_life_is_a_reset() -> None:
    hub = EventHub(ring=2)
    events = [hub.publish("a", {"n": n}) for n in range(5)]
    for lost in (events[0].id, events[4].id + 5, 3):
        with hub.subscribe(["a"], last_event_id=lost) as watcher:
            (event,) = watcher.get(0)
            assert event.topic == RESET_TOPIC
            assert event.id == events[4].id


def test_a_newer_measurement_replaces_an_unread_older_one() -> None:
    hub = EventHub()
    with hub.subscribe() as watcher:
        hub.publish("metric", {"n": 1}, key="k1")
        state = hub.publish("state", {})
        other = hub.publish("metric", {"n": 2}, key="k2")
        newest = hub.publish("metric", {"n": 3}, key="k1")
        assert watcher.get(0) == [state, other, newest]


def test_a_slow_watcher_is_told_to_start_afresh_and_the_teller_never_waits() -> None:
    hub = EventHub()
    with hub.subscribe(capacity=4) as watcher:
        for n in range(9):
            hub.publish("state", {"n": n})
            watcher.check_invariants()
        events = watcher.get(0)
        assert events[0].topic == RESET_TOPIC
        assert len(events) <= 4
        assert events[-1].id == hub.last_id  # after the reset nothing is missing
        assert [event.id for event in events] == list(range(events[0].id, hub.last_id + 1))


def test_get_wakes_on_publish_and_on_close() -> None:
    hub = EventHub()
    watcher = hub.subscribe()
    timer = threading.Timer(0.05, hub.publish, ("a", {}))
    timer.start()
    assert len(watcher.get(10)) == 1
    timer.join()
    timer = threading.Timer(0.05, watcher.close)
    timer.start()
    assert watcher.get(10) == []
    timer.join()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, "x", "y"]), st.booleans()), max_size=60))
def test_any_sequence_keeps_the_invariants(actions: list[tuple[str, str | None, bool]]) -> None:
    hub = EventHub(ring=8)
    with hub.subscribe("ab", capacity=5) as watcher:
        last = 0
        for topic, key, read in actions:
            hub.publish(topic, {}, key)
            watcher.check_invariants()
            if read:
                ids = [event.id for event in watcher.get(0)]
                assert ids == sorted(ids)
                assert all(event_id > last for event_id in ids)
                last = max(ids, default=last)
