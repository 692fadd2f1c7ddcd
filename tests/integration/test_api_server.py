"""The API on the real server (gunicorn) with real clients: openai's Python package, httpx, and bare sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support import asynchronous
from tests.support.server import Server, running
from tests.support.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``python app.py`` with the tiny model and no kernels."""
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", context_length=65536)
    environ = {
        "OLYMPUS_MODEL__NAME": str(model),
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_ENGINE__MAX_TOKENS": "60000",
        "OLYMPUS_TELEMETRY__LOG_FORMAT": "json",
    }
    with running(tmp_path_factory.mktemp("data"), environ) as server:
        yield server
        server.terminate()
    assert server.process.returncode == 0, server.log
    assert "Traceback" not in "".join(server.lines), server.log


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="not needed", http_client=httpx.Client(trust_env=False)
    ) as it:
        yield it


HELLO: Any = [{"role": "user", "content": "hello"}]


def _eventually(check: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < end:
        if check():
            return True
        pause.wait(0.02)
    return False


def test_openais_client_whole_and_streamed(client: openai.OpenAI, server: Server) -> None:
    model, *others = client.models.list().data
    assert all("embed" in str(item.id) or "minilm" in item.id for item in others), "the chat model comes first"
    assert client.models.retrieve(model.id) == model
    whole = client.chat.completions.create(
        model=model.id, messages=HELLO, max_tokens=30, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)  # type: ignore[union-attr, arg-type]
    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(
        model=model.id,
        messages=HELLO,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"session": "openai", "domain": "clients"},
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage
    newest = server.json("GET", "/olympus/history?session=openai")["experiences"][0]
    assert (newest["action"], newest["domain"]) == (text, "clients")


def test_openais_client_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the one available is 'tiny-llama'"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny-llama", messages=HELLO, n=200)
    assert caught.value.param == "n"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="oly_wrong").models.list()


def test_the_async_client_works(server: Server) -> None:
    async def chat() -> str | None:
        plain = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", http_client=plain) as it:
            stream = await it.chat.completions.create(model="tiny-llama", messages=HELLO, max_tokens=5, stream=True)
            return [chunk.choices[0].finish_reason async for chunk in stream][-1]

    assert asynchronous.run(chat) == "length"


def _connect(server: Server, body: dict[str, Any]) -> socket.socket:
    raw = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


def _receive(connection: socket.socket, wanted: bytes) -> None:
    connection.settimeout(60)
    received = b""
    while wanted not in received:
        part = connection.recv(65536)
        assert part, received
        received += part


def _active(server: Server) -> int:
    status = server.json("GET", "/olympus/status")
    return int(status["engine"]["active"]) + int(status["admission"]["chats"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_the_engine(server: Server, stream: bool) -> None:
    session = f"hang-up-{stream}"
    body = {"messages": HELLO, "max_tokens": 60000, "stream": stream, "session": session}
    connection = _connect(server, body | {"temperature": 0})
    if stream:
        _receive(connection, b"assistant")
    assert _eventually(lambda: _active(server) == 2)
    connection.close()
    assert _eventually(lambda: _active(server) == 0), server.log
    (record,) = server.json("GET", f"/olympus/history?session={session}")["experiences"]
    assert record["meta"]["finish_reason"] == "cancelled"
    assert record["meta"]["completion_tokens"] < 60000


def test_dashboards_that_leave_give_their_threads_back(server: Server) -> None:
    connections = []
    for _ in range(10):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(b"GET /olympus/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        _receive(connection, b"retry")
        connections.append(connection)
    assert server.json("GET", "/olympus/status")["admission"]["streams"] == 10
    for connection in connections:
        connection.close()
    assert _eventually(lambda: server.json("GET", "/olympus/status")["admission"]["streams"] == 0)


def test_a_stream_over_the_wire(server: Server) -> None:
    with server.client.stream("GET", "/olympus/stream?topics=history") as response:
        lines = response.iter_lines()
        assert next(lines) == "retry: 2000"
        asked = threading.Thread(target=_say_hello, args=(server,))
        asked.start()
        seen = [line for line in _until(lines, "event: history")]
        assert "event: hello" in seen
        asked.join()


def _say_hello(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})


def _until(lines: Iterator[str], wanted: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line == wanted:
            return


@pytest.mark.parametrize("chunked", [True, False])
def test_bodies_that_are_too_large_get_an_answer(server: Server, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    content: Any = pieces() if chunked else b"x" * (2 << 20)
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        try:
            response = client.post(
                "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
        except (httpx.WriteError, httpx.ReadError):  # whichever of the two the reset reaches first
            pytest.skip("the server had answered and closed before everything was sent")
    assert response.status_code == 413, response.text
    assert "1048576" in response.json()["error"]["message"]


def test_another_name_is_not_answered_and_each_request_is_one_line(server: Server) -> None:
    response = server.client.get("/olympus/kernels", headers={"Host": "evil.example", "X-Request-Id": "find-this-one"})
    assert response.status_code == 421

    def logged() -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in list(server.lines) if line.startswith("{")]
        return [entry for entry in entries if entry.get("request_id") == "find-this-one"]

    assert _eventually(lambda: len(logged()) == 1), server.log
    assert (logged()[0]["event"], logged()[0]["status"]) == ("request", 421)


def test_a_key_is_needed_beyond_this_machine(tmp_path: Path) -> None:
    key = "a-bootstrap-key-of-some-length"
    with running(tmp_path, {"OLYMPUS_MODEL__LOAD": "false", "OLYMPUS_SERVER__API_KEY": key}) as server:
        assert server.client.get("/olympus/kernels").status_code == 200
        server.client.headers["X-Forwarded-For"] = "192.0.2.7"  # a proxy on this machine says who asks
        assert server.client.get("/olympus/kernels").status_code == 401
        assert server.client.get("/olympus/kernels", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert server.client.get("/").headers["Location"] == "/login?next=%2F"
