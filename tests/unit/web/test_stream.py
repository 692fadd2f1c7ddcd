"""The event stream: what it begins with, what ends it, and that its place is given back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, events
from web import stream
from web.app import create_app

PATH = "/olympus/stream"


@pytest.fixture
def world(make_runtime: MakeRuntime) -> tuple[FlaskClient, Runtime]:
    """A server of its own with one place for a stream."""
    runtime = make_runtime(server={"max_streams": 1}, telemetry={"ring_events": 64})
    return create_app(runtime=runtime).test_client(), runtime


World = tuple[FlaskClient, Runtime]


class Reader:
    """Reads a streamed response as events."""

    def __init__(self, response: TestResponse):
        assert response.status_code == 200, response.text
        self.response = response
        self._parts: Iterator[bytes] = response.iter_encoded()

    def next(self) -> dict[str, Any]:
        while True:
            for entry in events(next(self._parts).decode()):
                return entry

    def rest(self) -> list[dict[str, Any]]:
        return [entry for part in self._parts for entry in events(part.decode())]


def test_a_new_watcher_hears_hello_and_then_what_happens(world: World) -> None:
    client, runtime = world
    before = runtime.hub.last_id
    response = client.get(PATH)
    assert response.mimetype == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    reader = Reader(response)
    assert reader.next() == {"retry": "2000"}
    runtime.hub.publish("history", {"n": 1})  # between the answer's begin and its first event: not lost
    hello = reader.next()
    assert (hello["event"], hello["id"], hello["data"]) == ("hello", str(before), {"last_event_id": before})
    runtime.hub.publish("kernel.state", {"state": "training"})
    first, second = reader.next(), reader.next()
    assert (first["event"], first["data"]) == ("history", {"n": 1})
    assert (second["event"], second["data"]) == ("kernel.state", {"state": "training"})
    assert int(second["id"]) == int(first["id"]) + 1
    response.close()


def test_only_the_topics_asked_for(world: World) -> None:
    client, runtime = world
    reader = Reader(client.get(f"{PATH}?topics=model,%20history"))
    reader.next(), reader.next()
    runtime.hub.publish("chat", {})
    runtime.hub.publish("history", {"n": 2})
    assert reader.next()["event"] == "history"
    reader.response.close()


def test_a_topic_that_does_not_exist_is_named(world: World) -> None:
    response = world[0].get(f"{PATH}?topics=history,kernels")
    assert response.status_code == 422
    assert "unknown topic 'kernels'; known are model" in response.json["detail"]
    assert world[1].admission.counts()["streams"] == 0


@pytest.mark.parametrize("way", ["header", "query"])
def test_who_comes_back_hears_what_was_missed(world: World, way: str) -> None:
    client, runtime = world
    seen = runtime.hub.publish("history", {"n": 1}).id
    for number in (2, 3):
        runtime.hub.publish("history", {"n": number})
    headers = {"Last-Event-ID": str(seen)} if way == "header" else {}
    reader = Reader(client.get(PATH if way == "header" else f"{PATH}?last_event_id={seen}", headers=headers))
    reader.next()
    assert [reader.next()["data"]["n"] for _ in range(2)] == [2, 3]
    reader.response.close()


def test_the_header_wins_over_the_query(world: World) -> None:
    client, runtime = world
    ids = [runtime.hub.publish("history", {"n": number}).id for number in range(3)]
    reader = Reader(client.get(f"{PATH}?last_event_id={ids[0]}", headers={"Last-Event-ID": str(ids[1])}))
    reader.next()
    assert reader.next()["data"] == {"n": 2}
    reader.response.close()


def test_who_missed_too_much_is_told_to_begin_anew(world: World) -> None:
    client, runtime = world
    seen = runtime.hub.publish("history", {}).id
    for _ in range(100):
        runtime.hub.publish("history", {})
    reader = Reader(client.get(PATH, headers={"Last-Event-ID": str(seen)}))
    reader.next()
    assert reader.next()["event"] == "reset"
    reader.response.close()


@pytest.mark.parametrize("bad", ["x", "-1", "1" * 40, "", "1.5", "١"])
def test_an_id_that_is_none_counts_as_new(world: World, bad: str) -> None:
    environ = {"HTTP_LAST_EVENT_ID": bad.encode().decode("latin-1")}
    reader = Reader(world[0].get(PATH, environ_overrides=environ))
    reader.next()
    assert reader.next()["event"] == "hello"
    reader.response.close()


def test_silence_is_filled_with_comments(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(stream, "_HEARTBEAT_SECONDS", 0.1)
    reader = Reader(world[0].get(PATH))
    reader.next(), reader.next()
    assert reader.next() == {"comment": "", "id": str(world[1].hub.last_id)}
    reader.response.close()
    assert 10 > 5.0 == _real_heartbeat(), "the dashboard calls ten seconds of silence stale"


def _real_heartbeat() -> float:
    import inspect

    line = next(line for line in inspect.getsource(stream).splitlines() if line.startswith("_HEARTBEAT_SECONDS"))
    return float(line.split("=")[1].split("#")[0])


def test_the_stop_of_the_server_ends_it(world: World) -> None:
    client, runtime = world
    reader = Reader(client.get(PATH))
    reader.next()
    threading.Timer(0.1, runtime.stop_event.set).start()
    begun = time.monotonic()
    reader.rest()
    assert time.monotonic() - begun < 4
    reader.response.close()
    assert client.get(PATH).status_code == 503


def test_a_client_that_leaves_ends_it(world: World) -> None:
    client, runtime = world
    ours, theirs = socket.socketpair()
    with ours:
        reader = Reader(client.get(PATH, environ_overrides={"gunicorn.socket": ours}))
        reader.next()
        theirs.close()
        reader.rest()
        reader.response.close()
    assert runtime.admission.counts()["streams"] == runtime.hub.subscribers == 0


def test_a_revoked_key_loses_its_stream(guarded: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_TICK_SECONDS", 0.02)
    monkeypatch.setattr(stream, "_RECHECK_SECONDS", 0.1)
    keys = guarded.extensions["olympus"].keys
    key_id, text = keys.create("watcher", ["kernels:read"])
    response = guarded.test_client().get(PATH, headers={"Authorization": f"Bearer {text}"})
    reader = Reader(response)
    reader.next()
    threading.Timer(0.3, keys.revoke, [key_id]).start()
    begun = time.monotonic()
    reader.rest()
    assert 0.2 < time.monotonic() - begun < 3
    response.close()


def test_there_are_only_so_many_places(world: World) -> None:
    client, runtime = world
    first = client.get(PATH)  # never begun: its generator has no finally to run
    refused = client.get(PATH)
    assert refused.status_code == 503
    assert refused.json["code"] == "too_many_streams"
    assert int(refused.headers["Retry-After"]) >= 1
    first.close()
    assert runtime.admission.counts()["streams"] == runtime.hub.subscribers == 0
    second = Reader(client.get(PATH))
    second.next(), second.next()
    second.response.close()
    runtime.admission.check_invariants()
    assert runtime.admission.counts()["streams"] == runtime.hub.subscribers == 0


def test_all_topics_that_are_published_are_known() -> None:
    import re
    from pathlib import Path

    from settings import ROOT

    sources = [path for folder in ("olympus", "web", "memory") for path in Path(ROOT / folder).glob("*.py")]
    published = {topic for path in sources for topic in re.findall(r'publish\(\s*"([^"]+)"', path.read_text())}
    assert published == set(stream.TOPICS)


def test_without_the_scope_there_is_no_stream(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    assert guarded.test_client().get(PATH, headers=key("chat")).status_code == 403
