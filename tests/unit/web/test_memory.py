"""Search, status and corrections over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from memory.history import NewExperience
from olympus.runtime import Runtime
from storage.files import PARTIAL_PREFIX
from tests.unit.web.conftest import MakeRuntime
from web.app import create_app


@pytest.fixture(scope="module")
def told(make_runtime: MakeRuntime) -> Runtime:
    runtime = make_runtime()
    assert runtime.memory.wait_until_settled(20)
    return runtime


@pytest.fixture
def asking(told: Runtime) -> FlaskClient:
    return create_app(runtime=told).test_client()


def _tell(runtime: Runtime, observation: str, action: str = "noted", **fields: object) -> int:
    fields = {"domain": "general", "source": "chat", **fields}
    known = runtime.history.append([NewExperience(observation, action, **fields)])[0].id  # type: ignore[arg-type]
    assert runtime.memory.wait_until_settled(20)
    return known


def test_a_search_says_what_it_found_and_why(told: Runtime, asking: FlaskClient) -> None:
    known = _tell(told, "the harbour of Piraeus", session_id="ships", score=0.5)
    _tell(told, "the harbour of Marseille", domain="france")
    answer = asking.get("/olympus/memory/search?q=which+harbour&domain=general").json
    assert (answer["meaning"], answer["complete"]) == (False, True)
    (found,) = answer["results"]
    assert (found["id"], found["session_id"], found["judged"], found["score"]) == (known, "ships", 0.5, 1.0)
    assert found["parts"]["words"]["rank"] == 1
    assert found["parts"]["meaning"] is None
    assert found["snippet"] == "the harbour of Piraeus noted"
    for fits in ("session=ships", "min_score=0.5", "since=1", "limit=1&domain=general"):
        assert known in [item["id"] for item in asking.get(f"/olympus/memory/search?q=harbour&{fits}").json["results"]]
    for fits in ("session=trains", "min_score=0.6", "until=1", "domain=nowhere"):
        assert asking.get(f"/olympus/memory/search?q=harbour&{fits}").json["results"] == []
    assert asking.get("/olympus/memory/search?q=quantum").json["results"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [("", "q"), ("q=", "q"), ("q=a&limit=0", "limit"), ("q=a&since=soon", "since"), ("q=a&x=1", "x")],
)
def test_what_does_not_fit_is_named(asking: FlaskClient, query: str, field: str) -> None:
    answer = asking.get(f"/olympus/memory/search?{query}")
    assert answer.status_code == 422
    assert answer.mimetype == "application/problem+json"
    assert [item["field"] for item in answer.json["errors"]] == [field]


def test_status(told: Runtime, asking: FlaskClient) -> None:
    _tell(told, "something")
    status = asking.get("/olympus/memory/status").json
    assert status["entries"] == told.history.count()
    assert status["embedding"]["state"] == "off"


def test_a_correction_takes_its_place_in_history_and_memory(told: Runtime, asking: FlaskClient) -> None:
    wrong = _tell(told, "the capital of Peru", "Quito")
    answer = asking.post(
        f"/olympus/history/{wrong}/correct", json={"action": "Lima", "feedback": "Quito is in Ecuador"}
    )
    assert answer.status_code == 201
    right = answer.json["id"]
    assert (answer.json["action"], answer.json["score"], answer.json["meta"]) == ("Lima", 1.0, {"corrects": wrong})
    assert told.memory.wait_until_settled(20)
    assert [item["id"] for item in asking.get("/olympus/memory/search?q=capital+Peru").json["results"]] == [right]
    assert asking.post(f"/olympus/history/{wrong}/correct", json={"action": "x"}).status_code == 404
    same = asking.post(f"/olympus/history/{right}/correct", json={"action": "Lima"})
    assert (same.status_code, same.json["code"]) == (422, "invalid_request")
    assert asking.post(f"/olympus/history/{right}/correct", json={"feedback": "x"}).status_code == 422


def test_forgetting_is_at_once(told: Runtime, asking: FlaskClient) -> None:
    known = _tell(told, "a secret about zebras")
    assert asking.delete(f"/olympus/history/{known}").status_code == 200
    assert asking.get("/olympus/memory/search?q=zebras").json["results"] == []


def test_scopes(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    client = guarded.test_client()
    assert client.get("/olympus/memory/search?q=a").status_code == 401
    assert client.get("/olympus/memory/search?q=a", headers=key("chat")).status_code == 403
    assert client.get("/olympus/memory/search?q=a", headers=key("history:read")).status_code == 200
    assert client.get("/olympus/memory/status", headers=key("history:read")).status_code == 200
    body = {"action": "x"}
    assert client.post("/olympus/history/1/correct", json=body, headers=key("history:read")).status_code == 403
    assert client.post("/olympus/history/1/correct", json=body, headers=key("history:write")).status_code == 404


def test_switched_off_is_said_so(make_runtime: MakeRuntime) -> None:
    client = create_app(runtime=make_runtime(memory={"episodic": {"enabled": False}})).test_client()
    answer = client.get("/olympus/memory/search?q=a")
    assert (answer.status_code, answer.json["code"]) == (409, "memory_disabled")
    assert client.get("/olympus/memory/status").status_code == 409


def test_the_history_leaves_and_comes_back_as_a_file(
    make_runtime: MakeRuntime, told: Runtime, asking: FlaskClient
) -> None:
    _tell(told, "the exported lighthouse", "shines", domain="lights", score=1.0)
    rich = asking.get("/olympus/history/export?domain=lights")
    assert rich.mimetype == "application/x-ndjson"
    assert rich.headers["Content-Disposition"] == 'attachment; filename="memory_lights.jsonl"'
    plain = asking.get("/olympus/history/export?domain=lights&format=plain")
    assert [line["type"] for line in map(json.loads, plain.text.splitlines())] == ["Observation", "Action"]
    other = make_runtime()
    client = create_app(runtime=other).test_client()
    body = rich.data + b"nonsense\n"
    answer = client.post("/olympus/history/import", data=body, content_type="application/x-ndjson")
    assert answer.json == {
        "imported": 1,
        "known": 0,
        "deleted": 0,
        "bad_lines": 1,
        "bad": [{"line": 2, "reason": "not JSON"}],
    }
    assert other.memory.wait_until_settled(20)
    (found,) = client.get("/olympus/memory/search?q=lighthouse").json["results"]
    assert (found["domain"], found["action"], found["judged"]) == ("lights", "shines", 1.0)
    again = client.post("/olympus/history/import", data=body, content_type="text/plain")
    assert (again.json["imported"], again.json["known"]) == (0, 1)
    assert client.post("/olympus/history/import", data=body, content_type="application/zip").status_code == 415
    assert list(other.settings.data_dir.glob(f"{PARTIAL_PREFIX}*")) == []


def test_a_history_that_is_too_large_names_the_setting(make_runtime: MakeRuntime) -> None:
    client = create_app(runtime=make_runtime(memory={"import_max_bytes": 1024})).test_client()
    answer = client.post("/olympus/history/import", data=b"x" * 2000, content_type="text/plain")
    assert answer.status_code == 413
    assert "memory.import_max_bytes" in answer.json["detail"]
