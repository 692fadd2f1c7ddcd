"""Chats with memory: the domain's cartridge for a long history, recent turns as they are, and honest about both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from flask.testing import FlaskClient

from memory.cartridges.cartridge import make_cartridge
from memory.cartridges.rows import CartridgeRow
from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, events
from web.app import create_app
from workspace.prefix import prefix_of_tokens

CHAT = "/v1/chat/completions"
_numbers = itertools.count(1)


@pytest.fixture
def domain() -> str:
    """One of its own for each test: the server is shared."""
    return f"remembering-{next(_numbers)}"


def _serve(runtime: Runtime, domain: str) -> CartridgeRow:
    loaded = runtime.engine.loaded
    prefix = prefix_of_tokens(loaded, list(range(20, 36)))
    return runtime.cartridges.promote(runtime.cartridges.register(make_cartridge(loaded, prefix, domain=domain)).id)


def _conversation(turns: int) -> list[dict[str, str]]:
    told = [{"role": "system", "content": "be brief"}]
    for number in range(turns):
        told += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    return [*told, {"role": "user", "content": "and now?"}]


def _ask(client: FlaskClient, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": messages, "max_tokens": 3, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json)


def test_the_cartridge_stands_in_for_the_past(client: FlaskClient, runtime: Runtime, domain: str) -> None:
    row = _serve(runtime, domain)
    whole = _ask(client, _conversation(10), domain=domain)
    short = _ask(client, _conversation(10), domain=domain, memory={"recent_turns": 2})
    assert short["olympus"]["memory"] == {
        "cartridge": row.id,
        "reason": "",
        "turns": 2,
        "turns_recalled": 0,
        "turns_left_out": 8,
    }
    assert short["olympus"]["cartridges"] == [row.id]
    assert short["usage"]["cartridge_slots"] == 16
    assert short["usage"]["prompt_tokens"] < whole["usage"]["prompt_tokens"] / 3
    # Exactly what a client gets that names the cartridge and sends the short conversation itself.
    own = [_conversation(10)[0], *_conversation(10)[-5:]]
    by_hand = _ask(client, own, domain=domain, cartridges=[{"id": row.id}])
    assert by_hand["choices"][0]["message"] == short["choices"][0]["message"]
    assert by_hand["usage"]["prompt_tokens"] == short["usage"]["prompt_tokens"]
    # What was said stays whole in the history.
    record = runtime.history.get(short["olympus"]["experience_id"])
    assert record is not None
    assert record.messages == _conversation(10)
    assert record.meta["memory"]["turns_left_out"] == 8


def test_without_a_cartridge_nothing_is_lost(client: FlaskClient, domain: str) -> None:
    plain = _ask(client, _conversation(6), domain=domain)
    told = _ask(client, _conversation(6), domain=domain, olympus={"memory": True})
    assert told["choices"][0]["message"] == plain["choices"][0]["message"]
    assert told["usage"] == plain["usage"]
    memory = told["olympus"]["memory"]
    assert (memory["cartridge"], memory["turns_left_out"]) == (None, 0)
    assert domain in memory["reason"]
    assert "memory" not in plain["olympus"]


def test_a_session_is_continued_by_its_newest_message(client: FlaskClient, runtime: Runtime, domain: str) -> None:
    _serve(runtime, domain)
    fields: dict[str, Any] = {"domain": domain, "session": domain}
    for number in range(3):
        _ask(client, [{"role": "user", "content": f"question {number}"}], **fields)
    told = _ask(client, [{"role": "user", "content": "and now?"}], memory={"recent_turns": 2}, **fields)
    assert told["olympus"]["memory"]["turns_recalled"] == 2
    newest = runtime.history.page(session_id=domain, limit=4)[1:3][::-1]
    sent = [
        message
        for record in newest
        for message in (
            {"role": "user", "content": record.observation},
            {"role": "assistant", "content": record.action},
        )
    ]
    by_hand = _ask(client, [*sent, {"role": "user", "content": "and now?"}], domain=domain, cartridges=[{"id": domain}])
    assert by_hand["choices"][0]["message"] == told["choices"][0]["message"]
    assert by_hand["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]
    none = _ask(client, [{"role": "user", "content": "and now?"}], memory={"recent_turns": 0}, **fields)
    assert none["olympus"]["memory"]["turns_recalled"] == 0


def test_named_cartridges_are_the_memory(client: FlaskClient, runtime: Runtime, domain: str) -> None:
    row, other = _serve(runtime, domain), _serve(runtime, f"{domain}-other")
    told = _ask(client, _conversation(5), domain=domain, memory={"recent_turns": 1}, cartridges=[{"id": other.id}])
    assert told["olympus"]["cartridges"] == [other.id]
    assert row.id != other.id
    assert told["olympus"]["memory"]["turns_left_out"] == 4


def test_streams_tell_too_and_replays_repeat_it(client: FlaskClient, runtime: Runtime, domain: str) -> None:
    row = _serve(runtime, domain)
    body = {"messages": _conversation(5), "max_tokens": 2, "domain": domain, "memory": True, "stream": True}
    for replayed in (False, True):
        found = events(client.post(CHAT, json=body, headers={"Idempotency-Key": domain}).text)
        told = next(item["data"]["olympus"] for item in found if "olympus" in item.get("data", ()))
        assert told["memory"]["cartridge"] == row.id
        assert told["replayed"] is replayed
    other = client.post(CHAT, json={**body, "memory": False}, headers={"Idempotency-Key": domain})
    assert other.status_code in (400, 422)
    assert other.json["error"]["code"] == "idempotency_key_reused"


def test_settings_decide_where_a_request_does_not(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(model=True, memory={"chat": {"enabled": True, "recent_turns": 1}})
    client = create_app(runtime=runtime).test_client()
    row = _serve(runtime, "general")
    told = _ask(client, _conversation(4))
    assert told["olympus"]["memory"]["cartridge"] == row.id
    assert told["olympus"]["memory"]["turns"] == 1
    assert "memory" not in _ask(client, _conversation(4), memory=False)["olympus"]


@pytest.mark.parametrize("wrong", [{"recent_turns": -1}, {"turns": 1}, "yes", 3])
def test_what_is_no_wish_is_refused(client: FlaskClient, wrong: Any) -> None:
    response = client.post(CHAT, json={"messages": _conversation(0), "memory": wrong})
    assert response.status_code == 400
    assert "memory" in response.json["error"]["message"] + str(response.json["error"]["param"])


def test_what_shall_not_be_stored_is_not(client: FlaskClient, runtime: Runtime, domain: str) -> None:
    before = runtime.history.count()
    told = _ask(client, _conversation(0), domain=domain, store=False)
    assert told["choices"][0]["message"]["content"]
    assert told["olympus"]["experience_id"] is None
    assert runtime.history.count() == before
    assert _ask(client, _conversation(0), domain=domain, store=True)["olympus"]["experience_id"] is not None
