"""Parents, generations and inherited weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from olympus.errors import InvalidRequest
from olympus.lineage import parent_ids
from olympus.requests import QueryRequest, SpawnRequest
from tests.unit.olympus.kernel_world import TINY, World, facts

MakeWorld = Callable[..., World]


def trained_parent(world: World) -> str:
    parent = world.tiny("rhea", "d", experiences=tuple(facts(80)))
    world.wait_for(parent, "training", step=12)
    world.zeus.pause(parent)
    return parent


def test_a_child_answers_like_its_parent_before_it_trains(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, patience_evaluations=10_000)
    parent = trained_parent(world)
    request = SpawnRequest(name="hera", domain="e", parent_gods=("rhea",), inherit=True, train=False, seed=9)
    told = world.zeus.spawn(request)
    child = told["kernel"]["kernel_id"]
    assert told["kernel"]["parents"] == [parent]
    asked = QueryRequest(input="red light 1", candidates=("stop", "go", "wait"))
    mine, theirs = world.zeus.query(child, asked), world.zeus.query(parent, asked)
    assert mine["candidates"] == theirs["candidates"]
    status = world.zeus.status(child)
    assert status["step"] == 0
    assert (status["config"]["generation"], status["config"]["inherited_from"]) == (2, parent)
    assert status["config"]["network"] == world.zeus.status(parent)["config"]["network"]
    world.zeus.feed(child, facts(30, start=200))
    world.zeus.resume(child)
    assert f"{parent} best@" in world.wait_for(child, "training", step=2)["restored_from"]


def test_what_cannot_be_inherited_is_refused_and_leaves_nothing(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, patience_evaluations=10_000)
    untrained = world.tiny("rhea", train=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inherit": True}, "name the parent"),
        ({"inherit": True, "parent_gods": ("nobody",)}, "there is no kernel nobody"),
        ({"inherit": True, "parent_gods": (untrained,)}, "nothing to inherit"),
        ({"inherit": True, "parent_gods": (untrained,), "config": {**TINY, "width": 24}}, "width 24 and 16"),
    ]
    for fields, message in cases:
        with pytest.raises(InvalidRequest, match=message):
            world.zeus.spawn(SpawnRequest(name="hera", **fields))
    assert [line["kernel_id"] for line in world.zeus.kernels()] == [untrained]
    world.zeus.checkpoint_store.check_invariants()


def test_names_are_resolved_and_must_be_unambiguous(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False)
    first = world.tiny("rhea", train=False)
    assert parent_ids(["rhea", first], world.zeus.rows.all()) == [first]
    second = world.tiny("rhea", train=False, force=True)
    with pytest.raises(InvalidRequest, match=f"{first}, {second}|{second}, {first}"):
        parent_ids(["rhea"], world.zeus.rows.all())
    assert parent_ids([second], world.zeus.rows.all()) == [second]


def test_the_family_shows_distances_only_where_they_mean_something(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False, patience_evaluations=10_000)
    parent = trained_parent(world)
    child = world.zeus.spawn(SpawnRequest(name="hera", domain="d", parent_gods=(parent,), inherit=True, train=False))[
        "kernel"
    ]["kernel_id"]
    stranger = world.tiny("ares", "e", train=False, parent_gods=(child, parent))
    world.zeus.resume(child)
    world.wait_for(child, "training", step=11)
    world.zeus.pause(child)
    told = world.zeus.governor.lineage()
    generations = {node["kernel_id"]: node["generation"] for node in told["nodes"]}
    assert generations == {parent: 1, child: 2, stranger: 3}
    edges = {(edge["parent"], edge["child"]): edge for edge in told["edges"]}
    inherited = edges[parent, child]
    assert (inherited["inherited"], inherited["domain_distance"]) == (True, 0.0)
    assert 0 < inherited["basin_distance"] < 3.15
    plain = edges[child, stranger]
    assert (plain["inherited"], plain["basin_distance"], plain["domain_distance"]) == (False, None, None)
    world.zeus.delete(parent)
    kept = [edge for edge in world.zeus.governor.lineage()["edges"] if edge["parent"] == parent]
    assert [edge["parent_exists"] for edge in kept] == [False, False]
