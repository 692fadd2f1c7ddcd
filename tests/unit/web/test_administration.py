"""Keys, audit log, settings, timetable, system, and what forgetting would reach: over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from memory.cartridges.cartridge import make_cartridge
from memory.history import NewExperience
from olympus.runtime import Runtime
from settings import setting_paths
from storage import migrate
from tests.unit.web.conftest import BOOTSTRAP, MakeRuntime
from web.app import create_app
from workspace.prefix import prefix_of_tokens

Key = Callable[..., dict[str, str]]


def _audit(client: FlaskClient, **query: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = client.get("/olympus/audit", query_string=query).json["entries"]
    return entries


def test_a_key_is_made_used_and_revoked(guarded: Flask) -> None:
    asking, root = guarded.test_client(), {"Authorization": f"Bearer {BOOTSTRAP}"}
    body = {"name": "  notebook ", "scopes": ["kernels:read", "chat"], "expires_in_days": 2}
    answer = asking.post("/olympus/keys", json=body, headers=root)
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    made = answer.json
    assert (made["name"], made["scopes"], made["state"]) == ("notebook", ["chat", "kernels:read"], "active")
    assert abs(made["expires_at"] - made["created_at"] - 2 * 86_400) < 60
    own = {"Authorization": f"Bearer {made['key']}"}
    assert asking.get("/olympus/kernels", headers=own).status_code == 200
    assert asking.get("/olympus/keys", headers=own).status_code == 403

    told = asking.get("/olympus/keys", headers=root).json
    assert made["key"] not in str(told)
    assert told["you"]["name"] == "bootstrap"
    (shown,) = [key for key in told["keys"] if key["id"] == made["id"]]
    assert shown["last_used_at"] is not None

    path = f"/olympus/keys/{made['id']}/revoke"
    assert asking.post(path, headers=root).json["state"] == "revoked"
    assert asking.get("/olympus/kernels", headers=own).status_code == 401
    again = asking.post(path, headers=root)
    assert (again.status_code, again.json["code"]) == (404, "key_not_found")
    lines = asking.get(f"/olympus/audit?target={made['id']}", headers=root).json["entries"]
    assert [line["action"] for line in lines] == ["key.revoke", "key.create"]
    assert all(line["actor_name"] == "the bootstrap key" for line in lines)
    assert made["key"] not in str(lines)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "scopes": ["everything"]}, "scopes[0]"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": " ", "scopes": ["chat"]}, "name"),
        ({"name": "x", "scopes": ["chat"], "expires_in_days": 0}, "expires_in_days"),
        ({"name": "x", "scopes": ["chat"], "expires_in_days": "7"}, "expires_in_days"),
        ({"name": "x", "scopes": ["chat"], "secret": "mine"}, "secret"),
    ],
)
def test_a_bad_key_is_refused_with_its_field(client: FlaskClient, body: dict[str, Any], field: str) -> None:
    answer = client.post("/olympus/keys", json=body)
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, field)


def test_decisions_are_in_the_audit_log(client: FlaskClient) -> None:
    made = client.post("/olympus/kernels/spawn", json={"domain": "audited", "train": False}).json
    spawned = made["kernel"]["kernel_id"]
    base = f"/olympus/kernels/{spawned}"
    assert client.post(f"{base}/checkpoints/step-00000001/pin").status_code == 404, "refused, so not noted"
    assert client.post(f"{base}/stop").status_code == 200
    assert client.delete(base).status_code == 200
    file = b'{"type": "Observation", "content": "a"}\n{"type": "Action", "content": "b"}\n'
    path = "/olympus/history/import?domain=audited"
    assert client.post(path, data=file, content_type="application/x-ndjson").status_code == 200
    assert client.delete("/olympus/history?domain=audited").json == {"deleted": 1}
    actions = [line["action"] for line in _audit(client, target=spawned)]
    assert actions == ["kernel.delete", "kernel.stop", "kernel.spawn"]
    newest = _audit(client, action="history", limit=2)
    assert [line["action"] for line in newest] == ["history.delete", "history.import"]
    assert newest[0]["detail"] == {"domain": "audited", "count": 1}
    assert newest[1]["detail"]["imported"] == 1
    assert all(line["actor"] == "local" for line in newest)


def test_pages_of_the_audit_log(client: FlaskClient, runtime: Runtime) -> None:
    for number in range(5):
        runtime.audit.note("local", "test.page", str(number))
    first = client.get("/olympus/audit?action=test&limit=3").json
    assert [line["target"] for line in first["entries"]] == ["4", "3", "2"]
    rest = client.get(f"/olympus/audit?action=test&limit=3&before={first['next_before']}").json
    assert [line["target"] for line in rest["entries"]] == ["1", "0"]
    assert rest["next_before"] is None
    assert {"action": "test.page", "entries": 5} in rest["actions"]
    assert client.get("/olympus/audit?limit=0").status_code == 422
    assert client.get("/olympus/audit?since=nan").status_code == 422


def test_signing_in_and_out_is_noted(guarded: Flask, key: Key) -> None:
    text = key("chat")["Authorization"].removeprefix("Bearer ")
    asking = guarded.test_client()
    assert asking.post("/login", data={"key": text}).status_code == 303
    assert asking.post("/logout").status_code == 303
    root = {"Authorization": f"Bearer {BOOTSTRAP}"}
    lines = guarded.test_client().get("/olympus/audit?action=session&limit=2", headers=root).json["entries"]
    assert [line["action"] for line in lines] == ["session.end", "session.begin"]
    assert lines[0]["actor_name"] == "test"


def test_settings_say_where_they_come_from_and_keep_secrets(make_runtime: MakeRuntime) -> None:
    secret = "a-bootstrap-key-that-nobody-sees"
    runtime = make_runtime(start=False, server={"api_key": secret, "port": 81})
    answer = create_app(runtime=runtime).test_client().get("/olympus/settings")
    told = {item["path"]: item for item in answer.json["settings"]}
    assert set(told) == {path for path, _, _ in setting_paths()}
    assert (told["server.port"]["value"], told["server.port"]["default"]) == (81, 5000)
    assert told["server.port"]["origin"] == "overrides"
    assert told["server.threads"]["origin"] == "default"
    assert told["server.api_key"]["value"] == "**********"
    assert secret not in str(told)


def test_jobs_are_told_and_run_at_once(client: FlaskClient) -> None:
    told = client.get("/olympus/scheduler").json
    assert {job["id"] for job in told["jobs"]} == {"distillation", "coverage"}
    ran = client.post("/olympus/scheduler/coverage/run")
    assert (ran.status_code, ran.json["outcome"]["by"]) == (200, "local")
    assert client.post("/olympus/scheduler/distillation/run").json["outcome"]["result"] in ("nothing", "done")
    jobs = {job["id"]: job for job in client.get("/olympus/scheduler").json["jobs"]}
    assert any(outcome["by"] == "local" for outcome in jobs["coverage"]["outcomes"])
    assert jobs["distillation"]["next_at"] > told["now"] - 60
    assert _audit(client, action="scheduler.run", limit=1)[0]["target"] == "distillation"
    missing = client.post("/olympus/scheduler/bake/run")
    assert (missing.status_code, missing.json["code"]) == (404, "job_not_found")


def test_running_a_job_needs_its_scope(guarded: Flask, key: Key) -> None:
    asking = guarded.test_client()
    assert asking.get("/olympus/scheduler", headers=key("kernels:read")).status_code == 200
    for job, scope, other in (
        ("distillation", "cartridges:write", "kernels:write"),
        ("coverage", "kernels:write", "cartridges:write"),
    ):
        assert asking.post(f"/olympus/scheduler/{job}/run", headers=key(other)).status_code == 403
        assert asking.post(f"/olympus/scheduler/{job}/run", headers=key(scope)).status_code == 200
    for path in ("/olympus/keys", "/olympus/audit", "/olympus/settings"):
        assert asking.get(path, headers=key("kernels:read", "history:write")).status_code == 403
        assert asking.get(path, headers=key("admin")).status_code == 200
    assert asking.get("/olympus/system", headers=key("chat")).status_code == 403


def test_without_a_model_a_look_at_the_triggers_says_why_not(guarded: Flask, key: Key) -> None:
    told = guarded.test_client().post("/olympus/scheduler/distillation/run", headers=key("cartridges:write")).json
    assert told["outcome"]["result"] == "failed"
    assert "when the language model is loaded" in told["outcome"]["told"]


def test_the_system(client: FlaskClient, runtime: Runtime) -> None:
    told = client.get("/olympus/system").json
    assert told["process"]["rss_bytes"] > 1 << 20
    assert told["model"]["stage"] == "ready"
    assert told["model"]["parameters"] > 1000
    assert told["engine"]["submitted"] >= 1, "it warmed up"
    assert told["queues"]["max_chats"] == runtime.settings.server.max_chats
    assert told["disk"]["parts"]["database"] > 0
    assert told["database"] == {"kind": "sqlite", "schema": migrate.head()}
    assert len({len(column) for column in told["series"].values()}) == 1
    assert "engine" in {group["name"] for group in told["threads"]}


def test_what_a_cartridge_was_trained_on_and_what_would_be_forgotten(client: FlaskClient, runtime: Runtime) -> None:
    items = [
        NewExperience(f"the lake {n}", "noted", domain="waters", source="chat", session_id=f"s{n % 2}")
        for n in range(6)
    ]
    ids = [record.id for record in runtime.history.append(items)]
    loaded = runtime.engine.loaded
    made = make_cartridge(loaded, prefix_of_tokens(loaded, [2, 3, 4]), domain="waters", experience_ids=ids[:4])
    row = runtime.cartridges.register(made)
    preview = client.get("/olympus/history/forgetting?domain=waters").json
    assert (preview["experiences"], preview["sessions"]) == (6, 2)
    assert preview["cartridges"] == [
        {"id": row.id, "state": "candidate", "stale": False, "learned": 4, "experiences": 4}
    ]
    assert client.get("/olympus/history/forgetting?session=s1&domain=waters").json["experiences"] == 3
    assert client.get("/olympus/history/forgetting?domain=nowhere").json["cartridges"] == []
    assert client.get("/olympus/history/forgetting").status_code == 422

    path = f"/olympus/cartridges/{row.id}/experiences"
    first = client.get(f"{path}?limit=3").json
    assert [item["id"] for item in first["experiences"]] == ids[3:0:-1]
    assert (first["total"], first["forgotten"]) == (4, 0)
    rest = client.get(f"{path}?limit=3&before={first['next_before']}").json
    assert [item["id"] for item in rest["experiences"]] == ids[:1]
    client.delete(f"/olympus/history/{ids[0]}")
    told = client.get(path).json
    assert (told["total"], told["forgotten"], len(told["experiences"])) == (4, 1, 3)
    assert client.get("/olympus/cartridges/waters_v9999/experiences").status_code == 404


def test_texts_of_a_cartridge_need_the_history(guarded: Flask, key: Key) -> None:
    path = "/olympus/cartridges/waters_v0001/experiences"
    asking = guarded.test_client()
    assert asking.get(path, headers=key("cartridges:read")).status_code == 403
    assert asking.get(path, headers=key("history:read")).status_code == 403
    assert asking.get(path, headers=key("cartridges:read", "history:read")).status_code == 404
