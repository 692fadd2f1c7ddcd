"""Runs as rows: one open run a domain, leases that run out, cancel, retry; checked against any order of events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory.distillation.runs import (
    LEASE_SECONDS,
    MOST_ATTEMPTS,
    LeaseLost,
    RunError,
    RunInProgress,
    RunNotFound,
    RunStore,
)
from storage.database import Database
from storage.models import Base


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'runs.db'}")
    Base.metadata.create_all(made.engine)
    yield made
    made.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> RunStore:
    return RunStore(database, clock)


def _create(store: RunStore, domain: str = "bank", **more: Any) -> str:
    return store.create(domain, trigger="manual", config={"name": "quick"}, cursor=7, **more).id


def test_a_run_goes_from_the_queue_to_its_end(store: RunStore) -> None:
    made = _create(store)
    claimed = store.claim("me")
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.cursor) == (made, "running", 7)
    assert store.beat(made, "me", {"stage": "training", "fraction": 0.5}) is False
    assert store.get(made).progress == {"stage": "training", "fraction": 0.5, "cursor": 7, "attempts": 1}
    ended = store.finish(made, "me", "promoted", progress={"cartridge": "bank_v0001"})
    assert ended.state == "promoted"
    assert ended.progress["cartridge"] == "bank_v0001"
    assert store.newest("bank", "promoted") == ended
    assert store.claim("me") is None
    store.check_invariants()


def test_one_open_run_a_domain(store: RunStore) -> None:
    first = _create(store)
    with pytest.raises(RunInProgress, match=first) as caught:
        _create(store)
    assert caught.value.run.id == first
    _create(store, "other")
    store.claim("me")
    with pytest.raises(RunInProgress):
        _create(store)
    store.finish(first, "me", "failed", error="no")
    assert _create(store) != first


def test_many_ask_at_once_and_one_gets_it(store: RunStore) -> None:
    got: list[str] = []
    refused: list[str] = []

    def ask() -> None:
        try:
            got.append(_create(store))
        except RunInProgress as error:
            refused.append(error.run.id)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(got) == 1
    assert refused == got * 7
    store.check_invariants()


def test_a_dead_worker_loses_its_run(store: RunStore, clock: Clock) -> None:
    made = _create(store)
    store.claim("dead")
    clock.now += LEASE_SECONDS - 1
    assert store.claim("me") is None
    clock.now += 2
    taken = store.claim("me")
    assert taken is not None
    assert taken.progress["attempts"] == 2
    with pytest.raises(LeaseLost):
        store.beat(made, "dead")
    with pytest.raises(LeaseLost):
        store.finish(made, "dead", "promoted")
    store.beat(made, "me")


def test_a_run_that_kills_the_process_is_given_up(store: RunStore, clock: Clock) -> None:
    made = _create(store)
    for _ in range(MOST_ATTEMPTS):
        assert store.claim("me") is not None
        clock.now += LEASE_SECONDS + 1
    assert store.claim("me") is None
    ended = store.get(made)
    assert ended.state == "failed"
    assert "given up" in str(ended.error)


def test_an_orderly_stop_does_not_count(store: RunStore) -> None:
    made = _create(store)
    for _ in range(MOST_ATTEMPTS + 2):
        assert store.claim("me") is not None
        store.hand_back(made, "me")
        store.check_invariants()
    assert store.get(made).state == "queued"


def test_cancel(store: RunStore, clock: Clock) -> None:
    waiting = _create(store)
    assert store.cancel(waiting).state == "cancelled"
    running = _create(store)
    store.claim("me")
    assert store.cancel(running).state == "cancelling"
    assert store.beat(running, "me") is True
    assert store.finish(running, "me", "cancelled").state == "cancelled"
    with pytest.raises(RunError, match="nothing to cancel"):
        store.cancel(running)
    with pytest.raises(RunNotFound):
        store.cancel("run-unknown")
    abandoned = _create(store)
    store.claim("dead")
    store.cancel(abandoned)
    clock.now += LEASE_SECONDS + 1
    assert store.claim("me") is None
    assert store.get(abandoned).state == "cancelled"
    store.check_invariants()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["create", "claim", "beat", "promoted", "failed", "cancel", "back", "time"]),
            st.sampled_from(["a", "b"]),
            st.sampled_from(["me", "you"]),
        ),
        max_size=25,
    )
)
def test_any_order_of_events_leaves_sound_rows(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str, str]]
) -> None:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('runs') / 'runs.db'}")
    Base.metadata.create_all(database.engine)
    clock = Clock()
    store = RunStore(database, clock)
    known: dict[str, str] = {}
    try:
        for what, domain, owner in events:
            clock.now += 1
            run = known.get(domain, "run-none")
            try:
                if what == "create":
                    known[domain] = _create(store, domain)
                elif what == "claim":
                    store.claim(owner)
                elif what == "beat":
                    store.beat(run, owner)
                elif what == "cancel":
                    store.cancel(run)
                elif what == "back":
                    store.hand_back(run, owner)
                elif what == "time":
                    clock.now += LEASE_SECONDS
                else:
                    store.finish(run, owner, what)  # type: ignore[arg-type]
            except RunError:
                pass
            store.check_invariants()
    finally:
        database.close()
