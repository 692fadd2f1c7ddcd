"""Errors: the right status in the right dialect, and nothing that is nobody's business."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.unit.web.conftest import MakeRuntime, ask
from web.app import create_app
from web.auth import ANY, requires

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SECRET = "the password is swordfish"


@pytest.fixture(scope="module")
def failing(make_runtime: MakeRuntime) -> Flask:
    """An application with one view in each dialect that raises what nobody expected."""
    app = create_app(runtime=make_runtime(server={"max_body_bytes": 2048}))

    @requires(ANY)
    def fail() -> str:
        raise RuntimeError(SECRET)

    for path in ("/v1/fail", "/olympus/fail", "/fail"):
        app.add_url_rule(path, path, fail)
    return app


def test_unexpected_errors_show_a_request_id_and_nothing_else(
    failing: Flask, capsys: pytest.CaptureFixture[str]
) -> None:
    client = failing.test_client()
    for path, headers in (("/v1/fail", {}), ("/olympus/fail", {}), ("/fail", BROWSER)):
        response = client.get(path, headers={"X-Request-Id": "find-me", **headers})
        assert response.status_code == 500
        assert "find-me" in response.text
        assert response.headers["X-Request-Id"] == "find-me"
        for leak in (SECRET, "swordfish", "RuntimeError", "Traceback", ".py"):
            assert leak not in response.text
    assert client.get("/v1/fail").json["error"]["type"] == "server_error"
    assert client.get("/olympus/fail").content_type == "application/problem+json"
    assert client.get("/fail", headers=BROWSER).mimetype == "text/html"


@pytest.mark.parametrize(
    ("path", "headers", "mimetype"),
    [
        ("/v1/nothing", {}, "application/json"),
        ("/v1/nothing", BROWSER, "application/json"),
        ("/v1", {}, "application/json"),
        ("/olympus/nothing", {}, "application/problem+json"),
        ("/olympus/nothing", BROWSER, "application/problem+json"),
        ("/static/nothing.js", BROWSER, "application/problem+json"),
        ("/nothing", {}, "application/problem+json"),
        ("/nothing", {"Accept": "*/*"}, "application/problem+json"),
        ("/nothing", BROWSER, "text/html"),
        ("/kernels/Not-A-Name", BROWSER, "text/html"),
    ],
)
def test_each_path_has_its_dialect(client: FlaskClient, path: str, headers: dict[str, str], mimetype: str) -> None:
    response = client.get(path, headers=headers)
    assert (response.status_code, response.mimetype) == (404, mimetype)
    assert f"here is nothing at {path}" in response.text  # pages begin it with a capital


def test_problem_json_has_all_members(client: FlaskClient) -> None:
    response = client.get("/olympus/nothing", headers={"X-Request-Id": "r1"})
    assert response.json == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is nothing at /olympus/nothing",
        "instance": "/olympus/nothing",
        "code": "not_found",
        "request_id": "r1",
    }


def test_a_method_that_is_not_possible_names_those_that_are(client: FlaskClient) -> None:
    response = client.put("/olympus/history")
    assert response.status_code == 405
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST", "DELETE"}
    assert "PUT is not possible here; possible: DELETE, GET" in response.json["detail"]
    response = client.get("/v1/chat/completions")
    assert (response.status_code, response.json["error"]["type"]) == (405, "invalid_request_error")


def test_a_body_that_is_too_large_names_the_limit(failing: Flask) -> None:
    response = failing.test_client().post("/v1/chat/completions", json=ask("x" * 3000))
    assert response.status_code == 413
    assert "larger than 2048 bytes" in response.json["error"]["message"]
    response = failing.test_client().post("/olympus/kernels/spawn", json={"role": "x" * 3000})
    assert "2048" in response.json["detail"]


MALFORMED = [
    (b'{"messages": [}', "line 1 column 15"),
    (b'{"messages":\n[{"role": "user",}]}', "line 2"),
    (b"{'a': 1}", "line 1 column 2"),
    (b"{", "EOF"),
    (b'{"a": "\xff\xfe"}', "line 1"),
    (b'{"a": "\\ud800"}', "line 1"),
    (b"[" * 5000, "recursion limit"),
    (b"{} {}", "trailing characters at line 1"),
    (b"\xef\xbb\xbf{}", "line 1"),
]


@pytest.mark.parametrize(("body", "where"), MALFORMED)
def test_text_that_is_not_json_is_told_where(client: FlaskClient, body: bytes, where: str) -> None:
    for path in ("/v1/chat/completions", "/olympus/kernels/spawn"):
        response = client.post(path, data=body, content_type="application/json")
        assert response.status_code == 400, response.text
        problem: dict[str, Any] = response.json["error"] if path.startswith("/v1") else response.json
        assert problem["code"] == "malformed_json"
        assert where in (problem.get("message") or problem["detail"])


def test_other_bodies_are_refused_with_what_to_send(client: FlaskClient) -> None:
    for path in ("/v1/chat/completions", "/olympus/kernels/spawn"):
        form = client.post(path, data={"a": "b"})
        assert form.status_code == 415
        assert "Content-Type: application/json, not application/x-www-form-urlencoded" in form.text
        assert client.post(path).status_code == 415
        empty = client.post(path, data=b" ", content_type="application/json")
        assert (empty.status_code, "the body is empty" in empty.text) == (400, True)
        for body in ("[]", "null", "3", '"x"'):
            response = client.post(path, data=body, content_type="application/json; charset=utf-8")
            assert response.status_code == (400 if path.startswith("/v1") else 422)


def test_fields_are_named_with_their_path(client: FlaskClient) -> None:
    body = {"experiences": [{"observation": "a", "action": "b"}, {"observation": 3, "acton": "b"}]}
    response = client.post("/olympus/kernels/spawn", json=body)
    assert response.status_code == 422
    assert {item["field"]: item["code"] for item in response.json["errors"]} == {
        "experiences[1].observation": "invalid_value",
        "experiences[1].action": "missing_required_parameter",
        "experiences[1].acton": "unknown_parameter",
    }
    assert "did you mean action?" in response.text
    assert response.json["detail"].endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "Zeus!"}, "name"),
        ({"seed": "7"}, "seed"),
        ({"seed": True}, "seed"),
        ({"train": "yes"}, "train"),
        ({"preset": "huge"}, "preset"),
        ({"config": {"width": [1]}}, "config.width"),
        ({"config": 1}, "config"),
        ({"nam": "zeus"}, "nam"),
    ],
)
def test_a_spawn_that_makes_no_sense_names_the_field(client: FlaskClient, body: dict[str, Any], field: str) -> None:
    response = client.post("/olympus/kernels/spawn", json=body)
    assert response.status_code == 422
    assert {item["field"] for item in response.json["errors"]} == {field}


@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=201", "limit"), ("limit=x", "limit"), ("before=-1", "before"), ("lmit=1", "lmit")],
)
def test_query_strings_are_checked_too(client: FlaskClient, query: str, field: str) -> None:
    response = client.get(f"/olympus/history?{query}")
    assert (response.status_code, response.json["errors"][0]["field"]) == (422, field)


@pytest.mark.parametrize("method", ["DELETE", "POST"])
def test_ids_beyond_64_bits_are_unknown_paths(client: FlaskClient, method: str) -> None:
    suffix = "/feedback" if method == "POST" else ""
    for number in (2**63, 10**40):
        assert client.open(f"/olympus/history/{number}{suffix}", method=method, json={"score": 1}).status_code in (
            404,
            405,
        )
    assert client.open(f"/olympus/history/{2**63 - 1}{suffix}", method=method, json={"score": 1}).status_code == 404


BAD_NAMES = ["..", "%2e%2e", "%252e%252e", "a%00b", "%2fetc%2fpasswd", "..%2f..", "A", "a" * 300, "a b", "é", "-a"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_tricks_reach_nothing(client: FlaskClient, name: str) -> None:
    for path in (
        f"/olympus/kernels/{name}/status",
        f"/olympus/kernels/{name}/checkpoints",
        f"/kernels/{name}",
        f"/static/{name}",
        f"/olympus/kernels/zeus-000000/checkpoints/{name}/pin",
        f"/v1/models/{name}",
    ):
        method = "POST" if path.endswith("/pin") else "GET"
        assert client.open(path, method=method).status_code in (404, 405, 308), path
