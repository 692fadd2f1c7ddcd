"""Automatic spawning: gaps that are found, voted on, and never filled twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from olympus.coverage import AUTOMATIC, LEAST_EXPERIENCES, find_gaps
from olympus.errors import VoteLost
from storage.models import AuditEvent
from tests.unit.olympus.kernel_world import World, write_facts

MakeWorld = Callable[..., World]


def look(world: World) -> list[dict[str, Any]]:
    return world.zeus.governor.watch.look()


def test_a_domain_without_a_kernel_gets_one_once(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, autostart=False)
    write_facts(world.history, LEAST_EXPERIENCES - 1, domain="signals")
    assert look(world) == []
    write_facts(world.history, 5, start=500, domain="signals")
    watcher = world.hub.subscribe(["kernel.proposal"])
    (told,) = look(world)
    assert (told["domain"], told["reason"]) == ("signals", "domain_gap")
    (line,) = world.zeus.kernels()
    assert (line["kernel_id"], line["domain"]) == (told["spawned"], "signals")
    assert world.zeus.rows.get(told["spawned"]).reason == "domain_gap"
    assert watcher.get(1.0)[0].data["reason"] == "domain_gap"
    with world.database.read() as session:
        row = session.scalar(sa.select(AuditEvent).where(AuditEvent.action == AUTOMATIC))
        assert row is not None
        assert (row.target, row.detail["experiences"]) == ("signals", LEAST_EXPERIENCES + 4)
    assert look(world) == []
    world.zeus.delete(told["spawned"])
    assert look(world) == [], "what a user deleted does not come back"


def test_the_cool_down_outlives_the_process_and_needs_time_and_news(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, autostart=False)
    write_facts(world.history, LEAST_EXPERIENCES, domain="signals")
    world.zeus.delete(look(world)[0]["spawned"])
    world.zeus.shutdown(5)
    again = make_world(auto_spawn=False, autostart=False)
    write_facts(again.history, LEAST_EXPERIENCES, start=900, domain="signals")
    assert look(again) == [], "news enough, too soon"
    again.zeus.shutdown(5)
    third = make_world(auto_spawn=False, autostart=False, coverage_cooldown_hours=0)
    (told,) = look(third)
    assert told["spawned"] is not None, "time and news"
    third.zeus.delete(told["spawned"])
    assert look(third) == [], "no news"


def test_a_lost_vote_is_remembered_and_nothing_is_made(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(auto_spawn=False)
    held: list[str] = []

    def lose(*_: Any, **__: Any) -> Any:
        held.append("vote")
        raise VoteLost("served already", {})

    monkeypatch.setattr(world.zeus.governor.council, "propose", lose)
    write_facts(world.history, LEAST_EXPERIENCES, domain="signals")
    (told,) = look(world)
    assert (told["spawned"], told["outcome"]) == (None, "served already")
    assert look(world) == []
    assert len(held) == 1
    assert world.zeus.kernels() == []


def test_what_only_fails_now_is_tried_again(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(auto_spawn=False, autostart=False)
    shortage: list[str | None] = ["the disk is full"]
    monkeypatch.setattr(world.zeus.checkpoint_store, "shortage", lambda: shortage[0])
    write_facts(world.history, LEAST_EXPERIENCES, domain="signals")
    assert look(world)[0]["outcome"] == "not now: the disk is full"
    shortage[0] = None
    assert look(world)[0]["spawned"] is not None


def test_one_kernel_per_round_and_never_more_than_allowed(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, autostart=False, max_kernels=2)
    for domain, count in (("a", 0), ("b", 10), ("c", 20)):
        write_facts(world.history, LEAST_EXPERIENCES + count, domain=domain)
    assert [look(world)[-1]["domain"] for _ in range(2)] == ["c", "b"], "the most experience first"
    assert look(world) == []
    assert len(world.zeus.kernels()) == 2


def test_who_serves_badly(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False)
    kernel = world.tiny("hera", "d", train=False)
    domains = {"d": 100, "small": 10}
    learned: dict[str, Any] = {"progress": {"loss_ok": True}}

    def gaps(state: str, report: dict[str, Any]) -> list[str]:
        world.zeus.rows.set_state(kernel, state)  # type: ignore[arg-type]
        return [gap.reason for gap in find_gaps(domains, world.zeus.rows.all(), lambda _: report)]

    assert gaps("settled", {}) == ["specialization"]
    assert gaps("settled", learned) == []
    assert gaps("training", {}) == gaps("paused", {}) == [], "it still has its chance"
    world.zeus.delete(kernel)
    assert [gap.reason for gap in find_gaps(domains, [], lambda _: {})] == ["domain_gap"]
    world.tiny("athena", "*", train=False)
    assert find_gaps(domains, world.zeus.rows.all(), lambda _: {}) == [], "somebody learns from everything"


def test_the_watch_acts_by_itself_on_news_and_stops_at_once(make_world: MakeWorld) -> None:
    world = make_world(coverage_seconds=0.05)
    write_facts(world.history, LEAST_EXPERIENCES, domain="signals")
    deadline = time.monotonic() + 20
    while not world.zeus.kernels() and time.monotonic() < deadline:
        time.sleep(0.02)
    (line,) = world.zeus.kernels()
    assert line["domain"] == "signals"
    begun = time.monotonic()
    world.zeus.shutdown(10)
    assert time.monotonic() - begun < 8


def test_the_watch_can_be_switched_off(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, coverage_seconds=0.05)
    write_facts(world.history, LEAST_EXPERIENCES, domain="signals")
    time.sleep(0.3)
    assert world.zeus.kernels() == []
