"""The event stream of one kernel: only its own events, resumed without gap or repetition, ended with the kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime
from tests.unit.web.test_stream import Reader
from web import stream
from web.app import create_app


@pytest.fixture
def world(make_runtime: MakeRuntime) -> tuple[FlaskClient, Runtime, str, str]:
    """A server with two kernels that do not train."""
    runtime = make_runtime(server={"max_streams": 4}, telemetry={"ring_events": 64})
    client = create_app(runtime=runtime).test_client()
    names = [
        client.post("/olympus/kernels/spawn", json={"domain": domain, "train": False}).json["kernel"]["kernel_id"]
        for domain in ("one", "two")
    ]
    return client, runtime, names[0], names[1]


World = tuple[FlaskClient, Runtime, str, str]


def path(kernel_id: str) -> str:
    return f"/olympus/kernels/{kernel_id}/events"


def tell(runtime: Runtime, kernel_id: str, step: int, topic: str = "kernel.checkpoint") -> int:
    return runtime.hub.publish(topic, {"kernel_id": kernel_id, "step": step}).id


def test_only_the_events_of_this_kernel(world: World) -> None:
    client, runtime, mine, other = world
    reader = Reader(client.get(path(mine)))
    assert reader.next() == {"retry": "2000"}
    assert reader.next()["event"] == "hello"
    tell(runtime, other, 1)
    runtime.hub.publish("history", {"kernel_id": mine})
    runtime.hub.publish("chat", {})
    expected = [tell(runtime, mine, step, topic) for step, topic in enumerate(stream.KERNEL_TOPICS, start=1)]
    found = [reader.next() for _ in expected]
    assert [int(entry["id"]) for entry in found] == expected
    assert [entry["event"] for entry in found] == list(stream.KERNEL_TOPICS)
    assert all(entry["data"]["kernel_id"] == mine for entry in found)
    reader.response.close()
    assert runtime.admission.counts()["streams"] == runtime.hub.subscribers == 0


def test_coming_back_again_and_again_hears_everything_once(world: World) -> None:
    client, runtime, mine, other = world
    last = str(runtime.hub.last_id)
    heard: list[int] = []
    for turn in range(5):
        for step in range(3):
            tell(runtime, mine, 10 * turn + step)
            tell(runtime, other, step)
        reader = Reader(client.get(path(mine), headers={"Last-Event-ID": last}))
        assert reader.next() == {"retry": "2000"}
        for _ in range(turn % 3 + 1):  # leaves before it has heard all of it
            entry = reader.next()
            heard.append(entry["data"]["step"])
            last = entry["id"]
        reader.response.close()
    reader = Reader(client.get(path(mine), headers={"Last-Event-ID": last}))
    reader.next()
    while heard[-1] != 42:
        heard.append(reader.next()["data"]["step"])
    reader.response.close()
    assert heard == [10 * turn + step for turn in range(5) for step in range(3)]


def test_a_quiet_kernel_is_not_reset_because_others_are_loud(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_HEARTBEAT_SECONDS", 0.02)
    client, runtime, mine, other = world
    reader = Reader(client.get(path(mine)))
    reader.next(), reader.next()
    for step in range(200):  # three times what the ring holds
        tell(runtime, other, step)
    beat = reader.next()
    while int(beat["id"]) < runtime.hub.last_id:
        beat = reader.next()
    assert beat == {"comment": "", "id": str(runtime.hub.last_id)}
    reader.response.close()
    tell(runtime, mine, 7)
    reader = Reader(client.get(path(mine), headers={"Last-Event-ID": beat["id"]}))
    reader.next()
    assert reader.next()["data"]["step"] == 7
    reader.response.close()


def test_what_is_gone_from_the_ring_is_a_reset(world: World) -> None:
    client, runtime, mine, _ = world
    seen = tell(runtime, mine, 1)
    for step in range(100):
        tell(runtime, mine, step)
    reader = Reader(client.get(path(mine), headers={"Last-Event-ID": str(seen)}))
    reader.next()
    assert reader.next()["event"] == "reset"
    reader.response.close()


def test_the_end_of_the_kernel_is_the_end_of_its_stream(world: World) -> None:
    client, runtime, mine, other = world
    reader = Reader(client.get(path(mine)))
    reader.next(), reader.next()
    threading.Timer(0.1, runtime.zeus.delete, [other]).start()
    threading.Timer(0.3, runtime.zeus.delete, [mine]).start()
    rest = reader.rest()
    assert (rest[-1]["event"], rest[-1]["data"]["state"]) == ("kernel.state", "deleted")
    assert {entry["data"]["kernel_id"] for entry in rest} == {mine}
    assert runtime.admission.counts()["streams"] == runtime.hub.subscribers == 0
    gone = client.get(path(mine))
    assert (gone.status_code, gone.json["code"]) == (404, "kernel_not_found")


def test_an_unknown_kernel_and_a_bad_query(world: World) -> None:
    client, runtime, mine, _ = world
    assert client.get(path("nobody-000000")).status_code == 404
    assert client.get(f"{path(mine)}?last_event_id=x").status_code == 422
    assert client.get(f"{path(mine)}?topics=chat").status_code == 422
    assert runtime.admission.counts()["streams"] == 0


def test_the_status_says_where_the_events_are(world: World) -> None:
    client, _, mine, _ = world
    assert client.get(f"/olympus/kernels/{mine}/status").json["links"]["events"] == path(mine)


def test_it_needs_the_right_to_read(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    assert guarded.test_client().get(path("athena-000000"), headers=key("chat")).status_code == 403
