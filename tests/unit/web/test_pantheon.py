"""Zeus as a governor over HTTP: shapes, scopes, and a vote that is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from memory.history import NewExperience
from olympus.errors import VoteLost
from olympus.requests import SpawnRequest
from olympus.runtime import Runtime


@pytest.fixture
def kernel(runtime: Runtime) -> str:
    """A kernel for a domain that lives in the history."""
    found = [line for line in runtime.zeus.kernels() if line["domain"] == "weather"]
    if found:
        return str(found[0]["kernel_id"])
    texts = [f"will it rain or snow in town {number} tomorrow" for number in range(40)]
    runtime.history.append([NewExperience(text, "ask the sky", "weather", "api") for text in texts])
    return str(runtime.zeus.spawn(SpawnRequest(name="iris", domain="weather", train=False))["kernel"]["kernel_id"])


def test_route_answers_one_text_or_many(client: FlaskClient, runtime: Runtime, kernel: str) -> None:
    runtime.zeus.governor.router.forget()
    one = _post(client, "route", {"text": "will it rain or snow in town 77 tomorrow"})
    assert (one["decision"], one["kernel_id"], one["domain"]) == ("routed", kernel, "weather")
    many = _post(client, "route", {"texts": ["will it rain or snow in town 5 tomorrow", "0x7f #!@ qqq"]})
    assert [route["decision"] for route in many["routes"]] == ["routed", "unknown"]
    refused = _post(client, "route", {"text": "a", "texts": ["b"]}, 422)
    assert "give text, or texts" in refused["detail"]


def test_poll_asks_all(client: FlaskClient, kernel: str) -> None:
    body = {"input": "will it rain or snow in town 3", "candidates": ["yes", "no"], "kernels": [kernel]}
    told = _post(client, "poll", body)
    assert [answer["kernel_id"] for answer in told["answers"]] == [kernel]
    assert told["answers"][0]["output"] in ("yes", "no")
    assert client.post("/olympus/poll", json={"input": "x", "kernels": ["nobody-000000"]}).status_code == 404
    assert client.post("/olympus/poll", json={"input": "x", "learn": True}).status_code == 422


def test_proposals_lineage_and_names(client: FlaskClient, kernel: str) -> None:
    told = _post(client, "kernels/propose", {"domain": "weather"})
    assert told["vote_result"]["votes"][kernel] == "abstain"
    held = _get(client, "proposals?limit=1")["proposals"]
    assert held[0]["proposal"]["proposal_id"] == told["proposal"]["proposal_id"]
    assert client.get("/olympus/proposals?limit=0").status_code == 422
    family = _get(client, "lineage")
    assert kernel in {node["kernel_id"] for node in family["nodes"]}
    profiles = {profile["name"]: profile for profile in _get(client, "pantheon")["profiles"]}
    assert profiles["hephaestus"]["affinity"] == 1.4
    assert _post(client, "kernels/propose", {"domain": "nothing-here"}, 409)["code"] == "invalid_action"


def test_a_lost_vote_is_a_409_with_its_evidence(
    client: FlaskClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = {"success": False, "phase": "voting", "vote_result": {"passed": False}, "hint": "use force"}

    def lose(*_: Any, **__: Any) -> Any:
        raise VoteLost("athena serves it already", evidence)

    monkeypatch.setattr(runtime.zeus.governor.council, "propose", lose)
    for path, body in (("propose", {}), ("spawn", {"vote": True}), ("spawn", {"reason": "overload"})):
        refused = _post(client, f"kernels/{path}", {"domain": "weather", **body}, 409)
        assert evidence.items() <= refused.items()
        assert (refused["code"], refused["detail"]) == ("vote_lost", "athena serves it already")


def test_scopes(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    client = guarded.test_client()
    reading, writing = key("kernels:read"), key("kernels:write")
    for path in ("/olympus/proposals", "/olympus/lineage", "/olympus/pantheon"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=writing).status_code == 403
        assert client.get(path, headers=reading).status_code == 200
    for path, body in (("/olympus/route", {"text": "x"}), ("/olympus/poll", {"input": "x"})):
        assert client.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers=writing).status_code == 403
        assert client.post(path, json=body, headers=reading).status_code == 200
    proposal = {"domain": "x"}
    assert client.post("/olympus/kernels/propose", json=proposal, headers=reading).status_code == 403
    assert client.post("/olympus/kernels/propose", json=proposal, headers=writing).status_code == 409


def _post(client: FlaskClient, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = client.post(f"/olympus/{path}", json=body)
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json or {}
    return found


def _get(client: FlaskClient, path: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/olympus/{path}").json or {}
    return found
