"""What every response carries, how long it may be kept, and what the log says of it."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from settings import TelemetrySettings
from telemetry.logs import configure
from tests.unit.web.conftest import MakeRuntime, ask
from web.app import create_app
from web.assets import Assets
from web.headers import SECURITY_HEADERS


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/olympus/no", "/static/js/api.js", "/v1/nothing"])
def test_security_headers_are_everywhere(client: FlaskClient, path: str) -> None:
    headers = client.get(path, buffered=True).headers
    for name, value in SECURITY_HEADERS.items():
        assert headers[name] == value, name
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "Strict-Transport-Security" not in headers, "not over plain HTTP"


def test_request_ids(client: FlaskClient) -> None:
    made = {client.get("/healthz").headers["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3
    assert client.get("/healthz", headers={"X-Request-Id": "a-b.C_1"}).headers["X-Request-Id"] == "a-b.C_1"
    for bad in ("", "x" * 65, "a b", "é", "<script>"):
        told = client.get("/healthz", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{32}", told)


def test_static_texts_are_compressed_for_who_takes_it(client: FlaskClient) -> None:
    plain = client.get("/static/js/dom.js", buffered=True)
    assert "Content-Encoding" not in plain.headers
    for _ in range(2):  # compressed, then kept
        packed = client.get("/static/js/dom.js", headers={"Accept-Encoding": "gzip, br"}, buffered=True)
        assert packed.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(packed.data) == plain.data
        assert int(packed.headers["Content-Length"]) == len(packed.data) < len(plain.data) / 2
        assert "Accept-Encoding" in packed.headers["Vary"]
    tag = {"Accept-Encoding": "gzip", "If-None-Match": packed.headers["ETag"]}
    assert client.get("/static/js/dom.js", headers=tag, buffered=True).status_code == 304
    refused = client.get("/static/js/dom.js", headers={"Accept-Encoding": "gzip;q=0"}, buffered=True)
    assert refused.data == plain.data
    part = {"Accept-Encoding": "gzip", "Range": "bytes=0-9"}
    assert client.get("/static/js/dom.js", headers=part, buffered=True).data == plain.data[:10]
    for path in ("/", "/olympus/kernels"):
        assert "Content-Encoding" not in client.get(path, headers={"Accept-Encoding": "gzip"}).headers


def test_what_may_be_kept(client: FlaskClient) -> None:
    page = client.get("/")
    assert page.headers["Cache-Control"] == "no-store"
    assert client.get("/olympus/kernels").headers["Cache-Control"] == "no-store"
    addresses = re.findall(r'(?:src|href)="(/static/[^"]+\?v=[^"]+)"', page.text)
    assert len(addresses) >= 5
    for address in addresses:
        response = client.get(address, buffered=True)
        assert response.status_code == 200, address
        assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    path = addresses[0].split("?")[0]
    for other in (path, f"{path}?v=000000000000"):
        response = client.get(other, buffered=True)
        assert response.headers["Cache-Control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": response.headers["ETag"]}, buffered=True)
    assert again.status_code == 304
    assert client.get("/static/nothing.js?v=1").headers["Cache-Control"] == "no-store"


def test_static_addresses_follow_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("one")
    (tmp_path.parent / "secret").write_text("x")
    assets = Assets(tmp_path)
    first = assets.url("a.css")
    assert re.fullmatch(r"/static/a\.css\?v=[0-9a-f]{12}", first)
    assert assets.url("a.css") == first
    (tmp_path / "a.css").write_text("two!")
    assert assets.url("a.css") != first
    assert assets.version("../secret") is None
    with pytest.raises(FileNotFoundError, match=r"b\.css"):
        assets.url("b.css")


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines logged since the last call, as JSON objects."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    configure(TelemetrySettings(log_format="json", log_level="debug"))

    def read() -> list[dict[str, Any]]:
        out = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in out if line.startswith("{")]

    yield read
    root.handlers[:], level = before
    root.setLevel(level)


Lines = Callable[[], list[dict[str, Any]]]


def test_one_line_a_request(client: FlaskClient, lines: Lines) -> None:
    client.get("/olympus/kernels/zeus-000000/status?secret=x", headers={"X-Request-Id": "r1"})
    (line,) = [line for line in lines() if line["event"] == "request"]
    assert {name: line[name] for name in ("method", "route", "status", "request_id", "level")} == {
        "method": "GET",
        "route": "/olympus/kernels/<kernel:kernel_id>/status",
        "status": 404,
        "request_id": "r1",
        "level": "info",
    }
    assert line["ms"] > 0
    assert "secret" not in json.dumps(line)
    client.get("/healthz")
    assert [line["level"] for line in lines() if line["event"] == "request"] == ["debug"]


def test_a_stream_is_logged_when_it_has_ended(client: FlaskClient, lines: Lines) -> None:
    response = client.post("/v1/chat/completions", json=ask(stream=True), headers={"X-Request-Id": "r2"})
    assert not [line for line in lines() if line["event"] == "request"]
    assert response.text.endswith("data: [DONE]\n\n")
    response.close()
    (line,) = [line for line in lines() if line["event"] == "request"]
    assert (line["status"], line["request_id"]) == (200, "r2")


def test_prompts_are_logged_only_when_asked_for(client: FlaskClient, make_runtime: MakeRuntime, lines: Lines) -> None:
    client.post("/v1/chat/completions", json=ask("a very private question"))
    assert "private" not in json.dumps(lines())
    app: Flask = create_app(runtime=make_runtime(model=True, telemetry={"log_prompts": True, "log_format": "json"}))
    lines()
    app.test_client().post("/v1/chat/completions", json=ask("a very private question"))
    (line,) = [line for line in lines() if line["event"] == "chat"]
    assert line["observation"] == "a very private question"


def test_tracebacks_are_in_the_log(make_runtime: MakeRuntime, lines: Lines) -> None:
    from web.auth import ANY, requires

    app = create_app(runtime=make_runtime())
    configure(TelemetrySettings(log_format="json"))
    app.add_url_rule("/olympus/fail", "fail", requires(ANY)(lambda: 1 / 0))  # type: ignore[arg-type, return-value]
    lines()
    app.test_client().get("/olympus/fail", headers={"X-Request-Id": "r3"})
    (line,) = [line for line in lines() if line["event"] == "unexpected error"]
    assert line["request_id"] == "r3"
    assert line["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_the_standard_librarys_loggers_go_the_same_way(lines: Lines) -> None:
    logging.getLogger("gunicorn.error").warning("worker %d said %s", 3, "hello")
    (line,) = lines()
    assert (line["event"], line["level"], line["logger"]) == ("worker 3 said hello", "warning", "gunicorn.error")


def test_the_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    configure(TelemetrySettings(log_level="warning"))
    logging.getLogger("x").info("not severe enough")
    logging.getLogger("x").warning("look here")
    root.handlers[:], level = before
    root.setLevel(level)
    out = capsys.readouterr().out
    assert "look here" in out
    assert "warning" in out
    assert "not severe" not in out
