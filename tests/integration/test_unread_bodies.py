"""Answers that come before the body was read: the client's next request on the same connection is answered, too."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.server import Server, running

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environ = {
        "OLYMPUS_MODEL__LOAD": "false",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_MEMORY__EPISODIC__ENABLED": "false",
        "OLYMPUS_SERVER__MAX_BODY_BYTES": str(LIMIT),
    }
    with running(tmp_path_factory.mktemp("data"), environ, ready=False) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """One connection, which is kept."""
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
        yield client


def pieces(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b"a" * 1000


#: A chunked body's length is not known before it is read; after one that is too long the connection may just close.
SIZES = [(size, chunked) for size in (1000, 70_000, LIMIT - 1000) for chunked in (False, True)] + [(3 * LIMIT, False)]


@pytest.mark.parametrize(("size", "chunked"), SIZES)
@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/olympus/kernels", 405), ("/v1/completions", 415)])
def test_the_next_request_is_answered(client: httpx.Client, path: str, status: int, size: int, chunked: bool) -> None:
    for _ in range(3):
        body = pieces(size) if chunked else b"a" * size
        answer = client.post(path, content=body, headers={"Content-Type": "text/plain"})
        assert answer.status_code == status
        assert answer.headers["Connection"] == ("close" if size > LIMIT else "keep-alive")
        assert client.get("/healthz").status_code == 200


def test_what_is_too_long_is_said_and_not_read(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/completions", content=b"{" + b" " * (2 * LIMIT), headers=headers)
    assert answer.status_code == 413
    assert answer.headers["Connection"] == "close"
    assert client.get("/healthz").status_code == 200
