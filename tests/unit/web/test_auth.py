"""Who gets in: every route without a key, keys, this machine, sessions, scopes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from olympus.runtime import Runtime
from tests.unit.web.conftest import BOOTSTRAP, MakeRuntime
from web.app import create_app
from web.auth import OPEN, check_every_view_is_guarded

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
VALUES = {
    "run_id": "run-000000000000",
    "cartridge_id": "memory_v0001",
    "kernel_id": "zeus-000000",
    "name": "step-00000001",
    "experience_id": 1,
    "model_id": "m",
    "filename": "x.js",
    "key_id": "0a1b2c3d",
    "job_id": "distillation",
    "response_id": "resp_0",
}
Key = Callable[..., dict[str, str]]


def _paths(app: Flask) -> list[tuple[str, str, set[str]]]:
    adapter = app.url_map.bind("localhost")
    return [
        (
            rule.endpoint,
            adapter.build(rule.endpoint, {name: VALUES[name] for name in rule.arguments}),
            set(rule.methods or ()),
        )
        for rule in app.url_map.iter_rules()
    ]


def test_without_a_key_nothing_answers_but_the_short_list(guarded: Flask) -> None:
    """Every route with every method: what is not on the list sends people to the form and programs away."""
    client = guarded.test_client()
    opened = {(path, method) for endpoint, path, methods in _paths(guarded) if endpoint in OPEN for method in methods}
    assert {path for path, _ in opened} == {"/healthz", "/readyz", "/ping", "/static/x.js", "/login"}
    for (endpoint, path, methods), method in itertools.product(_paths(guarded), METHODS):
        status = (response := client.open(path, method=method)).status_code
        if (path, method) in opened:
            assert status in (200, 401 if (path, method) == ("/login", "POST") else 200, 404, 503), (
                method,
                path,
                status,
            )
        elif endpoint.startswith("pages.") and method in methods:
            assert status == 303, (method, path, status)
            assert response.headers["Location"].startswith("/login")
        else:
            assert status == 401, (method, path, status)
            assert response.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/nothing", "/olympus/nothing", "//", "/v1/../x", "/olympus/kernels/%2e%2e"]
)
def test_unknown_paths_tell_strangers_nothing(guarded: Flask, path: str) -> None:
    assert guarded.test_client().get(path).status_code in (401, 308)


def test_a_view_without_a_scope_cannot_be_registered(guarded: Flask) -> None:
    app = Flask("other")
    app.add_url_rule("/x", "forgotten", lambda: "hello")
    with pytest.raises(AssertionError, match="forgotten declares no scope"):
        check_every_view_is_guarded(app)


def test_keys_open_what_their_scopes_name(guarded: Flask, key: Key) -> None:
    client = guarded.test_client()
    cases: list[tuple[str, str, str, Any]] = [
        ("chat", "GET", "/v1/models", None),
        ("chat", "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("kernels:read", "GET", "/olympus/kernels", None),
        ("kernels:read", "GET", "/olympus/status", None),
        ("kernels:read", "GET", "/metrics", None),
        ("kernels:read", "GET", "/olympus/kernels/zeus-000000/status", None),
        ("kernels:write", "POST", "/olympus/kernels/zeus-000000/pause", {}),
        ("kernels:write", "DELETE", "/olympus/kernels/zeus-000000", None),
        ("history:read", "GET", "/olympus/history", None),
        ("history:read", "GET", "/olympus/sessions", None),
        ("history:write", "DELETE", "/olympus/history/1", None),
        ("history:write", "POST", "/olympus/history", {}),
        ("cartridges:read", "GET", "/olympus/distillation/runs", None),
        ("cartridges:write", "POST", "/olympus/distillation/runs", {}),
    ]
    for (scope, method, path, body), held in itertools.product(cases, sorted({case[0] for case in cases})):
        response = client.open(path, method=method, json=body, headers=key(held))
        if held == scope:
            assert response.status_code not in (401, 403), f"{held} on {method} {path}"
        else:
            assert response.status_code == 403, f"{held} on {method} {path}"
            assert scope in response.text
    assert client.get("/olympus/kernels", headers=key("admin")).status_code == 200


def test_learning_from_a_query_needs_the_right_to_write(guarded: Flask, key: Key) -> None:
    client = guarded.test_client()
    path = "/olympus/kernels/zeus-000000/query"
    reading, both = key("kernels:read"), key("kernels:read", "kernels:write")
    assert client.post(path, json={"input": "x"}, headers=reading).status_code == 404
    assert client.post(path, json={"input": "x", "learn": True}, headers=reading).status_code == 403
    assert client.post(path, json={"input": "x", "learn": True}, headers=both).status_code == 404


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer nonsense",
        "Basic YTpi",
        "bearer\tx",
        f"Token {BOOTSTRAP}",
        f"Bearer {BOOTSTRAP}x",
    ],
)
def test_other_credentials_are_none(guarded: Flask, header: str) -> None:
    assert guarded.test_client().get("/olympus/kernels", headers={"Authorization": header}).status_code == 401


def test_the_scheme_is_case_insensitive_and_the_bootstrap_key_works(guarded: Flask) -> None:
    headers = {"Authorization": f"bEARER {BOOTSTRAP}"}
    assert guarded.test_client().get("/olympus/kernels", headers=headers).status_code == 200


def test_a_revoked_key_is_refused_at_once(guarded: Flask) -> None:
    keys = guarded.extensions["olympus"].keys
    key_id, text = keys.create("short-lived", ["admin"])
    headers = {"Authorization": f"Bearer {text}"}
    assert guarded.test_client().get("/olympus/kernels", headers=headers).status_code == 200
    keys.revoke(key_id)
    response = guarded.test_client().get("/olympus/kernels", headers=headers)
    assert response.status_code == 401
    assert response.json["code"] == "invalid_api_key"


# -- this machine -----------------------------------------------------------------------------------------------------


def _from(app: Flask, address: str, **headers: str) -> TestResponse:
    return app.test_client().get("/olympus/kernels", environ_base={"REMOTE_ADDR": address}, headers=headers)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_needs_no_key(served: Flask, address: str) -> None:
    assert _from(served, address).status_code == 200


@pytest.mark.parametrize("address", ["10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1", "", "localhost", "unix:"])
def test_other_machines_do(served: Flask, address: str) -> None:
    assert _from(served, address).status_code == 401


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
@pytest.mark.parametrize("value", ["127.0.0.1", "203.0.113.9", ""])
def test_a_proxy_nobody_configured_makes_the_request_remote(served: Flask, name: str, value: str) -> None:
    assert _from(served, "127.0.0.1", **{name: value}).status_code == 401


def test_listening_everywhere_means_keys_for_this_machine_too(guarded: Flask) -> None:
    assert _from(guarded, "127.0.0.1").status_code == 401


def test_behind_a_trusted_proxy_the_reported_address_counts(make_runtime: MakeRuntime) -> None:
    app = create_app(runtime=make_runtime(server={"trusted_proxies": 1}))
    assert _from(app, "127.0.0.1", **{"X-Forwarded-For": "203.0.113.9"}).status_code == 401
    assert _from(app, "127.0.0.1", **{"X-Forwarded-For": "127.0.0.1, 203.0.113.9"}).status_code == 401
    assert _from(app, "127.0.0.1", **{"X-Forwarded-For": "203.0.113.9, 127.0.0.1"}).status_code == 200
    assert _from(app, "127.0.0.1").status_code == 401, "a proxy that reports nobody hides who asks"


def test_the_dummy_keys_of_openai_clients_are_ignored_here(served: Flask) -> None:
    for dummy in ("sk-123", "DUMMY_KEY", "fake-api-key", "olympus"):
        assert _from(served, "127.0.0.1", Authorization=f"Bearer {dummy}").status_code == 200


def test_a_key_of_ours_that_is_wrong_is_refused_even_here(served: Flask, runtime: Runtime) -> None:
    key_id, text = runtime.keys.create("x", ["chat"])
    assert _from(served, "127.0.0.1", Authorization=f"Bearer {text}").status_code == 403, "its scopes count"
    runtime.keys.revoke(key_id)
    for wrong in (text, "oly_", "oly_00000000_" + "a" * 43):
        assert _from(served, "127.0.0.1", Authorization=f"Bearer {wrong}").status_code == 401


# -- sessions ---------------------------------------------------------------------------------------------------------


def _login(client: FlaskClient, key: str, **form: str) -> TestResponse:
    return client.post("/login", data={"key": key, **form}, headers={"Sec-Fetch-Site": "same-origin"})


@pytest.fixture
def fresh(make_runtime: MakeRuntime) -> Flask:
    """Like ``guarded``, with no sign-in tried yet."""
    return create_app(runtime=make_runtime(server={"host": "0.0.0.0", "api_key": BOOTSTRAP}))


def test_signing_in_and_out(fresh: Flask) -> None:
    client = fresh.test_client()
    response = client.get("/kernels?x=1")
    assert response.headers["Location"] == "/login?next=%2Fkernels%3Fx%3D1"
    assert 'name="next" value="/kernels?x=1"' in client.get(response.headers["Location"]).text
    response = _login(client, BOOTSTRAP, next="/kernels?x=1")
    assert (response.status_code, response.headers["Location"]) == (303, "/kernels?x=1")
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert BOOTSTRAP not in cookie
    assert client.get("/kernels").status_code == 200
    assert client.get("/olympus/kernels").status_code == 200
    assert client.post("/logout", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303
    assert client.get("/olympus/kernels").status_code == 401


def test_a_wrong_key_gets_the_form_again(fresh: Flask) -> None:
    response = _login(fresh.test_client(), "oly_wrong")
    assert response.status_code == 401
    assert "wrong, expired or revoked" in response.text
    assert "Set-Cookie" not in response.headers


def test_over_tls_the_cookie_is_bound_to_this_host(fresh: Flask) -> None:
    client = fresh.test_client()
    secure = {"wsgi.url_scheme": "https"}
    response = client.post("/login", data={"key": BOOTSTRAP}, environ_overrides=secure)
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith("__Host-olympus_session=")
    assert "Secure" in cookie
    assert "Strict-Transport-Security" in response.headers


def test_revoking_a_key_ends_its_sessions(fresh: Flask) -> None:
    keys = fresh.extensions["olympus"].keys
    key_id, text = keys.create("x", ["admin"])
    client = fresh.test_client()
    _login(client, text)
    assert client.get("/olympus/kernels").status_code == 200
    keys.revoke(key_id)
    assert client.get("/olympus/kernels").status_code == 401
    assert client.get("/").status_code == 303


def test_a_session_has_the_scopes_of_its_key(fresh: Flask) -> None:
    _, text = fresh.extensions["olympus"].keys.create("x", ["kernels:read"])
    client = fresh.test_client()
    _login(client, text)
    assert client.get("/olympus/kernels").status_code == 200
    assert client.get("/olympus/history").status_code == 403


def test_cookies_cannot_be_made_up(fresh: Flask) -> None:
    client = fresh.test_client()
    good = _login(client, BOOTSTRAP).headers["Set-Cookie"].split("=", 1)[1].split(";")[0]
    bad = [good[:-2] + "xx", "local", good.split(".")[0], "", "local." + good.split(".", 1)[1], "\x7f.\x00"]
    for value in bad:
        other = fresh.test_client()
        other.set_cookie("olympus_session", value)
        assert other.get("/olympus/kernels").status_code == 401, value


def test_a_session_ends_by_itself(fresh: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    import itsdangerous.timed

    client = fresh.test_client()
    _login(client, BOOTSTRAP)
    now = itsdangerous.timed.time.time()
    monkeypatch.setattr(itsdangerous.timed.time, "time", lambda: now + 7 * 86400 + 2)
    assert client.get("/olympus/kernels").status_code == 401


def test_before_the_start_there_are_no_sessions(make_runtime: MakeRuntime) -> None:
    """An empty secret would sign anything."""
    runtime = make_runtime(start=False, server={"host": "0.0.0.0", "api_key": BOOTSTRAP})
    assert runtime.cookie_secret == b""
    response = _login(create_app(runtime=runtime).test_client(), BOOTSTRAP)
    assert response.status_code == 503
    assert "Set-Cookie" not in response.headers


def test_sign_ins_are_limited_by_address(fresh: Flask) -> None:
    client = fresh.test_client()
    for _ in range(10):
        assert _login(client, "wrong").status_code == 401
    response = _login(client, BOOTSTRAP)
    assert response.status_code == 429
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    other = client.post("/login", data={"key": BOOTSTRAP}, environ_base={"REMOTE_ADDR": "10.1.1.1"})
    assert other.status_code == 303


@pytest.mark.parametrize(
    "bad", ["//evil.example", "https://evil.example/", "/\\evil.example", "evil", "/a\nb", "/\tx", "/" + "x" * 2001]
)
def test_signing_in_never_leads_elsewhere(fresh: Flask, bad: str) -> None:
    assert _login(fresh.test_client(), BOOTSTRAP, next=bad).headers["Location"] == "/"
