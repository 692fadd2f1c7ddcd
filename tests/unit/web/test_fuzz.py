"""Whatever is sent: no 5xx, no traceback, the right dialect, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from olympus.requests import QueryRequest, SpawnRequest
from olympus.runtime import Runtime
from web.chat_schemas import ChatBody

# The client is stateless, and the servers are made once; examples are few enough to stay fast and seeded to repeat.
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHAT, SPAWN = "/v1/chat/completions", "/olympus/kernels/spawn"

odd_text = st.one_of(st.text(max_size=30), st.sampled_from(["\x00", "\ud800", "𝔘", "<script>", "../../etc", "a" * 70]))
odd_number = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 2**64, 10**40, 1e308])
)
value: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_number, odd_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=4)),
    max_leaves=12,
)
part = st.one_of(value, st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", ""]), "text": odd_text}))
content = st.one_of(odd_text, st.lists(part, max_size=3), value)
message = st.one_of(
    value,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "x"])},
        optional={
            "content": st.one_of(odd_text, st.lists(part, max_size=3), value),
            "name": odd_text,
            "tool_calls": value,
        },
    ),
)
chat_body = st.fixed_dictionaries(
    {"messages": st.one_of(st.lists(message, max_size=3), value), "max_tokens": st.one_of(st.just(1), value)},
    optional={name: value for name in ChatBody.model_fields if name not in ("messages", "max_tokens", "stream")},
)
#: Bodies that are valid but for one field: they reach further than those where nothing fits.
nearly_valid = st.builds(
    lambda name, odd: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, name: odd},
    st.sampled_from(sorted(set(ChatBody.model_fields) - {"stream"})),
    value,
)
spawn_body = st.one_of(
    value,
    st.fixed_dictionaries(
        {"train": st.just(False)}, optional={name: value for name in SpawnRequest.model_fields if name != "train"}
    ),
    st.builds(
        lambda name, odd: {"train": False, name: odd}, st.sampled_from(sorted(set(SpawnRequest.model_fields))), value
    ),
)


def _send(client: FlaskClient, path: str, body: Any) -> TestResponse:
    text = json.dumps(body)  # writes NaN and Infinity, too
    return client.post(path, data=text, content_type="application/json")


def _check(response: TestResponse) -> None:
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text
    if response.status_code >= 400:
        assert isinstance(response.json.get("error", response.json), dict)
        wanted = "application/json" if response.request.path.startswith("/v1") else "application/problem+json"
        assert response.mimetype == wanted


@FUZZ
@given(body=st.one_of(chat_body, nearly_valid, value))
def test_any_chat_body(client: FlaskClient, runtime: Runtime, body: Any) -> None:
    _check(_send(client, CHAT, body))
    assert runtime.admission.counts()["chats"] == 0


@FUZZ
@given(body=spawn_body)
def test_any_spawn_body(client: FlaskClient, runtime: Runtime, body: Any) -> None:
    response = _send(client, SPAWN, body)
    if response.status_code == 201:
        runtime.zeus.delete(response.json["kernel"]["kernel_id"])
    _check(response)


@FUZZ
@given(raw=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "application/x+json", ""]))
def test_any_bytes(client: FlaskClient, raw: bytes, kind: str) -> None:
    for path in (CHAT, SPAWN):
        _check(client.post(path, data=raw, content_type=kind))


@FUZZ
@given(
    body=st.builds(
        lambda name, odd: {"input": "x", name: odd}, st.sampled_from(sorted(QueryRequest.model_fields)), value
    )
)
def test_any_query_of_a_kernel(client: FlaskClient, body: Any) -> None:
    _check(_send(client, "/olympus/kernels/zeus-000000/query", body))


@FUZZ
@given(path=st.text(max_size=40), query=st.dictionaries(st.sampled_from(["limit", "before", "domain", "x"]), odd_text))
def test_any_path_and_query(client: FlaskClient, path: str, query: dict[str, str]) -> None:
    clean = {name: text.encode("utf-8", "replace").decode() for name, text in query.items()}
    for address in ("/olympus/history", "/olympus/stream/" + path, "/kernels/" + path, "/v1/models/" + path):
        response = client.get(quote(address, errors="replace"), query_string=clean, buffered=True)
        assert response.status_code < 500, address


@FUZZ
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["Authorization", "Cookie", "Host", "Origin", "X-Request-Id", "Idempotency-Key", "Last-Event-ID", "Accept"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=80),
    )
)
def test_any_headers(guarded: Flask, served: Flask, headers: dict[str, str]) -> None:
    for app in (guarded, served):
        client = app.test_client(use_cookies=False)
        for method, path in (("GET", "/olympus/kernels"), ("GET", "/"), ("DELETE", "/olympus/history?domain=none")):
            response = client.open(path, method=method, headers=headers)
            assert response.status_code < 500, (path, headers)
            if app is guarded:
                assert response.status_code in (303, 401)
