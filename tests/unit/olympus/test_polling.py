"""Polls: all answers with their evidence, one recommended, nothing silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from olympus.errors import CheckpointInvalid, KernelNotFound
from olympus.requests import PollRequest, QueryRequest
from tests.unit.olympus.kernel_world import World, write_facts

MakeWorld = Callable[..., World]


def world_of_two(make_world: MakeWorld) -> tuple[World, str, str]:
    world = make_world(auto_spawn=False)
    write_facts(world.history, 40, domain="d")
    return world, world.tiny("athena", "d", train=False), world.tiny("hermes", "elsewhere", train=False)


def test_everybody_answers_and_the_routed_one_is_recommended(make_world: MakeWorld) -> None:
    world, near, far = world_of_two(make_world)
    request = PollRequest(input="red light 5", candidates=("stop", "go"))
    told = world.zeus.governor.poll(request)
    assert [answer["kernel_id"] for answer in told["answers"]] == [near, far]
    assert told["asked"] == 2
    for answer in told["answers"]:
        assert {"output", "confidence", "domain", "distance", "ready", "holdout_loss", "candidates"} <= answer.keys()
    assert told["recommended"]["kernel_id"] == near
    assert told["recommended"]["output"] == told["answers"][0]["output"]
    assert told["routing"]["decision"] == "routed"
    named = world.zeus.governor.poll(PollRequest(input="red light 5", kernels=(far,), max_tokens=4))
    assert [answer["kernel_id"] for answer in named["answers"]] == [far]
    assert named["recommended"]["kernel_id"] is None
    assert "not among those asked" in named["recommended"]["reason"]
    with pytest.raises(KernelNotFound, match="nobody-000000"):
        world.zeus.governor.poll(PollRequest(input="x", kernels=("nobody-000000",)))


def test_an_unknown_text_gets_answers_and_no_recommendation(make_world: MakeWorld) -> None:
    world, _, _ = world_of_two(make_world)
    told = world.zeus.governor.poll(PollRequest(input="zzqx 0#@! vwjk", candidates=("a", "b")))
    assert all("output" in answer for answer in told["answers"])
    assert told["recommended"]["kernel_id"] is None
    assert "too far" in told["recommended"]["reason"]


def test_one_bad_kernel_spoils_nothing(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world, near, far = world_of_two(make_world)
    original = world.zeus.query

    def query(kernel_id: str, request: QueryRequest) -> dict[str, Any]:
        if kernel_id == near:
            raise CheckpointInvalid("its weights are damaged")
        return original(kernel_id, request)

    realm = world.zeus.governor._realm
    monkeypatch.setattr(world.zeus.governor, "_realm", type(realm)(**{**vars(realm), "query": query}))
    told = world.zeus.governor.poll(PollRequest(input="red light 5", candidates=("stop", "go")))
    bad, good = told["answers"]
    assert (bad["kernel_id"], bad["error"], bad["detail"]) == (near, "checkpoint_invalid", "its weights are damaged")
    assert (good["kernel_id"], "output" in good) == (far, True)
    assert "did not answer (checkpoint_invalid)" in told["recommended"]["reason"]


def test_time_is_bounded_and_who_was_not_asked_says_so(make_world: MakeWorld) -> None:
    world, near, _ = world_of_two(make_world)
    world.zeus.query(near, QueryRequest(input="warm up", candidates=("a",)))
    slow = PollRequest.model_construct(
        **{**PollRequest(input="red light 5", candidates=("stop", "go")).model_dump(), "seconds": 0.0}
    )
    told = world.zeus.governor.poll(slow)
    assert (told["asked"], [answer.get("error") for answer in told["answers"]]) == (0, ["not_asked", "not_asked"])


def test_a_poll_teaches_nothing(make_world: MakeWorld) -> None:
    with pytest.raises(ValidationError):
        PollRequest.model_validate({"input": "x", "learn": True})
    with pytest.raises(ValidationError):
        PollRequest.model_validate({"input": "x", "seconds": 61})
