"""Kernels, history and operations through HTTP, on the real Zeus and the real history."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from olympus.metrics_store import COLUMNS
from olympus.runtime import Runtime
from settings import ROOT
from storage.models import AuditEvent
from tests.unit.web.conftest import MakeRuntime, ask
from web.app import create_app
from web.jsonio import dumps

PAIRS = [{"observation": f"question {n}", "action": f"answer {n}"} for n in range(3)]


@pytest.fixture
def kernel(client: FlaskClient) -> Iterator[str]:
    """A kernel that does not train."""
    body = {"domain": "api", "train": False, "force": True, "experiences": PAIRS}
    response = client.post("/olympus/kernels/spawn", json=body)
    assert response.status_code == 201, response.text
    kernel_id = response.json["kernel"]["kernel_id"]
    yield kernel_id
    client.delete(f"/olympus/kernels/{kernel_id}")


def test_spawn_list_status_delete(client: FlaskClient, kernel: str) -> None:
    listed = client.get("/olympus/kernels").json["kernels"]
    assert kernel in [line["kernel_id"] for line in listed]
    status = client.get(f"/olympus/kernels/{kernel}/status").json
    assert (status["kernel_id"], status["domain"], status["step"]) == (kernel, "api", 0)
    for link in status["links"].values():
        if link != status["links"]["query"] and "stream" not in link and "experiences" not in link:
            assert client.get(link).status_code == 200, link
    assert client.delete(f"/olympus/kernels/{kernel}").json["deleted"] is True
    for method, path in (("GET", "status"), ("GET", "checkpoints"), ("GET", "metrics"), ("POST", "pause")):
        response = client.open(f"/olympus/kernels/{kernel}/{path}", method=method)
        assert (response.status_code, response.json["code"]) == (404, "kernel_not_found"), path


def test_the_same_key_spawns_once_and_names_are_unique(client: FlaskClient) -> None:
    body = {"name": "unique", "train": False, "idempotency_key": "k"}
    first, again = (client.post("/olympus/kernels/spawn", json=body).json for _ in range(2))
    assert first["kernel"]["kernel_id"] == again["kernel"]["kernel_id"]
    response = client.post("/olympus/kernels/spawn", json={"name": "unique"})
    assert (response.status_code, response.json["code"]) == (409, "duplicate_kernel")
    client.delete(f"/olympus/kernels/{first['kernel']['kernel_id']}")


def test_feeding_goes_into_the_history(client: FlaskClient, kernel: str, runtime: Runtime) -> None:
    told = client.post(
        f"/olympus/kernels/{kernel}/experiences", json={"experiences": [*PAIRS, {**PAIRS[0], "action": "n"}]}
    )
    assert told.status_code == 201
    assert (told.json["accepted"], told.json["duplicates"]) == (1, 3)
    record = runtime.history.get(told.json["ids"][-1])
    assert record is not None
    assert (record.domain, record.source, record.action) == ("api", "api", "n")
    many = {"experiences": [PAIRS[0]] * 1001}
    assert client.post(f"/olympus/kernels/{kernel}/experiences", json=many).status_code == 422


def test_what_the_state_does_not_allow_is_a_conflict(client: FlaskClient, kernel: str) -> None:
    for action in ("pause", "checkpoint"):
        response = client.post(f"/olympus/kernels/{kernel}/{action}")
        assert (response.status_code, response.json["code"]) == (409, "invalid_action"), action
    response = client.post(f"/olympus/kernels/{kernel}/checkpoints/step-00000001/restore")
    assert (response.status_code, response.json["code"]) == (404, "checkpoint_not_found")


def test_a_kernel_trains_saves_and_answers(make_runtime: MakeRuntime) -> None:
    """The whole life over HTTP: spawn with data, train, save, pin, ask, pause, restore, resume, stop."""
    runtime = make_runtime(kernels={"min_experiences": 4, "step_pause_ms": 0, "evaluate_every": 5, "phi_every": 100})
    client = create_app(runtime=runtime).test_client()
    pairs = [{"observation": f"{word} {n}", "action": word} for n in range(20) for word in ("cash", "card")]
    made = client.post("/olympus/kernels/spawn", json={"name": "demo", "preset": "nano", "experiences": pairs}).json
    base = f"/olympus/kernels/{made['kernel']['kernel_id']}"
    with runtime.hub.subscribe(["kernel.metric"]) as watching:
        for _ in range(60):
            if any(event.data["step"] >= 3 for event in watching.get(1.0)):
                break
        else:
            pytest.fail("it never trained")
    saved = client.post(f"{base}/checkpoint")
    assert saved.status_code == 201, saved.text
    assert client.post(f"{base}/pause").json["state"] in ("paused", "training")
    names = [item["id"] for item in client.get(f"{base}/checkpoints").json["checkpoints"]]
    pinned = client.post(f"{base}/checkpoints/{names[-1]}/pin").json["checkpoints"]
    assert [item["pinned"] for item in pinned if item["id"] == names[-1]] == [True]
    assert client.post(f"{base}/checkpoints/{names[-1]}/unpin").status_code == 200
    answer = client.post(f"{base}/query", json={"input": "cash 3", "candidates": ["cash", "card"], "learn": True})
    assert answer.status_code == 200, answer.text
    assert answer.json["experience_id"] is not None
    columns = client.get(f"{base}/metrics?max_points=2").json
    assert len(columns["step"]) <= 2
    assert client.get(f"{base}/metrics?since={columns['next_since']}").json["step"] == []
    some = client.get(f"{base}/metrics?columns=phi,loss,phi").json
    assert [name for name in some if name in COLUMNS] == ["phi", "loss"]
    assert len(some["step"]) == len(some["phi"]) == len(some["loss"]) > 0
    for wrong in ("", "phi,", "step", "phi, loss", "Phi", "phi;loss"):
        refused = client.get(f"{base}/metrics", query_string={"columns": wrong})
        assert (refused.status_code, refused.json["errors"][0]["field"]) == (422, "columns"), wrong
        assert "must be some of loss, holdout_loss, " in refused.json["detail"]
    assert client.post(f"{base}/checkpoints/{names[-1]}/restore").status_code == 200
    assert client.post(f"{base}/resume").status_code == 200
    assert client.post(f"{base}/stop").status_code == 200
    text = client.get("/metrics").text
    assert re.search(r'olympus_kernel_steps\{domain="general",kernel="demo-[0-9a-f]{6}"\} [1-9]', text)
    assert re.search(r"olympus_checkpoint_bytes [1-9]", text)
    with runtime.database.read() as session:
        assert [row.actor for row in session.query(AuditEvent).filter_by(action="kernel.spawn")] == ["local"]


# -- history ----------------------------------------------------------------------------------------------------------


def test_history_pages_are_walked_to_the_end(client: FlaskClient) -> None:
    bodies = [ask(f"q{n}", session="walk", domain="walked", max_tokens=1) for n in range(5)]
    ids = [client.post("/v1/chat/completions", json=body).json["olympus"]["experience_id"] for body in bodies]
    found: list[int] = []
    before: Any = ""
    while True:
        page = client.get(f"/olympus/history?session=walk&limit=2{before}").json
        found += [item["id"] for item in page["experiences"]]
        if page["next_before"] is None:
            break
        before = f"&before={page['next_before']}"
    assert found == list(reversed(ids))
    item = client.get("/olympus/history?domain=walked&limit=1").json["experiences"][0]
    assert (item["observation"], item["source"], item["session_id"]) == ("q4", "chat", "walk")
    assert item["meta"]["finish_reason"] == "length"
    assert "messages" not in item
    sessions = client.get("/olympus/sessions").json["sessions"]
    assert next(item for item in sessions if item["id"] == "walk")["title"] == "q0"


def test_what_an_agent_elsewhere_lived_through(client: FlaskClient, runtime: Runtime) -> None:
    item = {"observation": "Which tag?", "action": "", "domain": "tags", "feedback": "Incorrect! X.", "score": 0}
    item |= {"episode_id": "life-000001", "request_id": "life-000001/0", "meta": {"agent": "hybrid"}}
    told = client.post("/olympus/history", json=item)
    assert told.status_code == 201, told.text
    assert {name: told.json[name] for name in item if name != "request_id"} | {"request_id": item["request_id"]} == item
    assert client.post("/olympus/history", json=item | {"action": "again"}).json == told.json, "the first write wins"
    assert runtime.history.count(domain="tags") == 1
    record = runtime.history.get(told.json["id"])
    assert record is not None
    assert (record.source, record.deleted) == ("agent", False)
    default = client.post("/olympus/history", json={"observation": "o", "action": "a"}).json
    assert default["domain"] == runtime.settings.kernels.default_domain
    for bad in (
        {"action": "a"},
        {"observation": "o"},
        {"observation": "", "action": "a"},
        {"observation": 1, "action": ""},
    ):
        assert client.post("/olympus/history", json=bad).status_code == 422
    for bad in ({"score": 2}, {"domain": "A b"}, {"action": "\x00"}, {"episode_id": "x" * 65}, {"deleted": True}):
        assert client.post("/olympus/history", json=item | bad).status_code == 422, bad


def test_judging_and_forgetting(client: FlaskClient) -> None:
    body = ask(session="forget", domain="forgotten", max_tokens=2)
    first, second = (client.post("/v1/chat/completions", json=body).json["olympus"]["experience_id"] for _ in range(2))
    judged = client.post(f"/olympus/history/{first}/feedback", json={"score": -1, "feedback": "wrong"})
    assert (judged.json["score"], judged.json["feedback"]) == (-1, "wrong")
    for bad in ({}, {"score": 2}, {"score": "1"}, {"feedback": ""}, {"stars": 5}):
        assert client.post(f"/olympus/history/{first}/feedback", json=bad).status_code == 422
    assert client.delete(f"/olympus/history/{first}").json == {"deleted": 1}
    for response in (
        client.delete(f"/olympus/history/{first}"),
        client.post(f"/olympus/history/{first}/feedback", json={"score": 1}),
        client.delete("/olympus/history/999999"),
    ):
        assert (response.status_code, response.json["code"]) == (404, "experience_not_found")
    assert client.delete("/olympus/history?session=forget&domain=other").json == {"deleted": 0}
    assert client.delete("/olympus/history?session=forget").json == {"deleted": 1}
    refused = client.delete("/olympus/history")
    assert refused.status_code == 422
    assert "say what to delete" in refused.json["detail"]
    assert client.get("/olympus/history?session=forget").json["experiences"] == []
    assert second > first


# -- operations -------------------------------------------------------------------------------------------------------


def test_health_and_readiness(client: FlaskClient, make_runtime: MakeRuntime) -> None:
    assert client.get("/healthz").json == {"status": "ok"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json["status"]) == (200, "ready")
    assert set(ready.json["checks"].values()) == {"ok"}
    waiting = create_app(runtime=make_runtime(start=False, model=True)).test_client()
    response = waiting.get("/readyz")
    assert (response.status_code, response.json["status"]) == (503, "not ready")
    assert response.json["checks"]["started"] == "not started"
    assert response.json["checks"]["model"].startswith("loading")
    assert waiting.get("/healthz").status_code == 200


def test_status_is_for_people(client: FlaskClient, kernel: str) -> None:
    status = client.get("/olympus/status").json
    listed = client.get("/olympus/kernels").json["kernels"]
    assert status["kernels"] == dict(Counter(line["state"] for line in listed))
    assert status["model"]["stage"] == "ready"
    assert status["engine"]["alive"] is True
    assert status["process"]["rss_bytes"] > 10_000_000
    assert status["admission"]["max_chats"] == 16
    newest = client.get("/olympus/history?limit=1").json["experiences"]
    assert status["history"]["newest_id"] >= (newest[0]["id"] if newest else 0)
    assert status["versions"]["flask"].startswith("3.")


def test_metrics_measure(client: FlaskClient) -> None:
    client.post("/v1/chat/completions", json=ask())
    client.get("/olympus/kernels/zeus-000000/status")
    client.open("/nothing", method="BREW")
    text = client.get("/metrics").text
    for line in (
        r'olympus_http_request_seconds_count\{method="POST",route="/v1/chat/completions",status="200"\} [1-9]',
        r'route="/olympus/kernels/<kernel:kernel_id>/status",status="404"',
        r'method="other",route="\(unmatched\)"',
        r"olympus_completion_tokens_total [1-9]",
        r"olympus_prompt_tokens_total [1-9]",
        r'olympus_generations_total\{reason="length"\} [1-9]',
        r"olympus_experiences [1-9]",
        r"olympus_model_loaded 1",
        r"olympus_chats_active 0",
        r"olympus_database_write_seconds_count [1-9]",
        r"olympus_threads [1-9]",
        r"process_resident_memory_bytes",
    ):
        assert re.search(line, text), line
    assert "zeus-000000" not in text, "paths are without number; only their templates are labels"


def test_every_metric_is_documented(client: FlaskClient) -> None:
    names = re.findall(r"^# TYPE (olympus_\w+) ", client.get("/metrics").text, re.MULTILINE)
    documented = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in names if f"`{name}`" not in documented and not name.endswith("_created")] == []


def test_json_has_no_nan() -> None:
    assert dumps({"a": [float("nan"), (float("inf"), 1.5)], "b": "é"}) == '{"a":[null,[null,1.5]],"b":"\\u00e9"}'


def test_create_app_is_pure(tmp_path: Path, make_runtime: MakeRuntime) -> None:
    import threading

    before = threading.enumerate()
    runtime = make_runtime(start=False)
    create_app(runtime=runtime)
    assert threading.enumerate() == before
    assert list(runtime.settings.data_dir.iterdir()) == []
