"""Requests that another site's page makes: the Host header, and where a request says that it comes from."""

from __future__ import annotations

import pytest
from flask import Flask
from flask.testing import FlaskClient

from settings import ServerSettings
from tests.unit.web.conftest import BOOTSTRAP, MakeRuntime
from web.app import create_app
from web.origin import HostGuard, host_name

KEY = {"Authorization": f"Bearer {BOOTSTRAP}"}


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:5000", "127.0.0.1:80", "[::1]:5000", "LOCALHOST", "localhost.", "192.168.1.7:5000"]
)
def test_known_names_and_addresses_are_served(client: FlaskClient, host: str) -> None:
    for path in ("/", "/olympus/kernels", "/login", "/v1/models"):
        assert client.get(path, headers={"Host": host}).status_code == 200, path


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil.example:5000", "", "[", "a@127.0.0.1"]
)
def test_other_names_are_not(client: FlaskClient, host: str) -> None:
    for path in ("/", "/olympus/kernels", "/login", "/v1/models", "/static/js/api.js"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == 421, path
    assert "OLYMPUS_SERVER__ALLOWED_HOSTS" in client.get("/olympus/kernels", headers={"Host": host}).text
    assert client.get("/healthz", headers={"Host": host}).status_code == 200, "load balancers use names of their own"


def test_a_dummy_key_does_not_excuse_a_wrong_name(client: FlaskClient) -> None:
    headers = {"Host": "evil.example", "Authorization": "Bearer sk-x"}
    assert client.get("/olympus/kernels", headers=headers).status_code == 421


def test_a_real_key_does(guarded: Flask) -> None:
    client = guarded.test_client()
    assert client.get("/olympus/kernels", headers=KEY | {"Host": "any.example"}).status_code == 200
    assert client.get("/olympus/kernels", headers={"Host": "any.example"}).status_code == 401


def test_names_can_be_added(make_runtime: MakeRuntime) -> None:
    app = create_app(runtime=make_runtime(server={"allowed_hosts": ["Olympus.Home"]}))
    assert app.test_client().get("/", headers={"Host": "olympus.home:5000"}).status_code == 200
    guard = HostGuard(ServerSettings(host="kernel.lan"), {"REPLIT_DOMAINS": "a.replit.app, b.replit.app"})
    assert {"kernel.lan", "a.replit.app", "b.replit.app", "localhost"} <= guard.names


@pytest.mark.parametrize(
    ("header", "name"),
    [("a:1", "a"), ("[::1]:80", "::1"), ("A.B.", "a.b"), ("::1", ""), ("", ""), ("a", "a"), ("[::1", "::1")],
)
def test_host_name(header: str, name: str) -> None:
    assert host_name(header) == name


HOST = "http://localhost"
CASES = [
    ({}, 200),  # curl
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
    ({"Sec-Fetch-Site": "cross-site", "Origin": HOST}, 403),
    ({"Origin": HOST}, 200),
    ({"Origin": "https://localhost"}, 403),
    ({"Origin": "http://localhost:8080"}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://["}, 403),
    ({"Origin": ""}, 403),
    ({"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer sk-x"}, 200),  # a page cannot send it unasked
    ({"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer sk-x", "Cookie": "a=b"}, 403),
    ({"Sec-Fetch-Site": "cross-site", "Authorization": "Basic YTpi"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), CASES)
def test_changes_from_other_sites_are_refused(served: Flask, headers: dict[str, str], status: int) -> None:
    client = served.test_client(use_cookies=False)  # whose Cookie header is the one given
    for method, path in (("DELETE", "/olympus/history?domain=nothing-here"), ("POST", "/olympus/kernels/spawn")):
        body = {"train": False, "force": True, "domain": "csrf"} if method == "POST" else None
        response = client.open(path, method=method, json=body, headers=headers)
        assert response.status_code == (201 if status == 200 and body else status), (method, response.text)
        if status == 403:
            assert response.json["code"] == "cross_site_request"
        elif body:
            client.delete(f"/olympus/kernels/{response.json['kernel']['kernel_id']}")


def test_signing_in_from_another_site_is_refused(guarded: Flask) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert guarded.test_client().post("/login", data={"key": BOOTSTRAP}, headers=headers).status_code == 403


def test_unknown_methods_are_no_way_around(client: FlaskClient) -> None:
    for method in ("PUT", "PATCH", "TRACE", "PROPFIND", "QUERY"):
        response = client.open("/olympus/history", method=method, headers={"Sec-Fetch-Site": "cross-site"})
        assert response.status_code == 403


def test_reading_from_other_sites_gets_no_permission_to_read(client: FlaskClient) -> None:
    response = client.get("/olympus/history", headers={"Origin": "http://evil.example"})
    assert not [name for name, _ in response.headers if name.lower().startswith("access-control")]
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
