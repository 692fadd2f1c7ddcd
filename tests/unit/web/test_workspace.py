"""The workspace over HTTP: toggles, what is told of it, both answers at once, and that sessions forget."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, ask, events
from web.app import create_app

PATH = "/v1/chat/completions"


def test_off_by_default_and_on_for_one_request(client: FlaskClient) -> None:
    plain = client.post(PATH, json=ask(temperature=0)).json
    assert "workspace" not in plain["usage"]
    off = client.post(PATH, json=ask(temperature=0, workspace=False)).json
    assert "workspace" not in off["usage"]
    steered = client.post(PATH, json=ask(temperature=0, workspace=True)).json
    told = steered["usage"]["workspace"]
    assert told["virtual_tokens"] > 0
    assert told["kv_bytes"] > 0
    assert told["broadcasts"] >= 1
    assert told["toggles"] == {"virtual_kv": True, "residual_delta": True, "controller": True, "memory": True}
    ours = client.post(PATH, json=ask(olympus={"workspace": {"enabled": True, "virtual_kv": False}})).json
    assert ours["usage"]["workspace"]["virtual_tokens"] == 0
    assert client.post(PATH, json=ask(temperature=0)).json["choices"] == plain["choices"], "nothing stays behind"


def test_everything_switched_off_answers_like_the_stock_model(client: FlaskClient) -> None:
    nothing = {"enabled": True, "virtual_kv": False, "residual_delta": False, "controller": False, "memory": False}
    plain, none = (
        client.post(PATH, json=ask("tell me", temperature=0, **more)).json["choices"]
        for more in ({}, {"workspace": nothing})
    )
    assert none == plain


def test_a_trace_has_one_entry_per_token(client: FlaskClient) -> None:
    answer = client.post(PATH, json=ask(workspace={"enabled": True, "trace": True}, seed=1)).json
    trace = answer["olympus"]["trace"]
    assert len(trace) == answer["usage"]["completion_tokens"] - 1
    assert "".join(entry["text"] for entry in trace).strip()
    slots = answer["usage"]["workspace"]["slots"]
    assert sum(slot["share"] for slot in slots) == pytest.approx(1.0, abs=0.01), "every input is shared out"
    assert {"token", "entropy", "surprise", "broadcast", "retrieve", "write", "halt", "virtual_tokens"} <= set(trace[0])


@pytest.mark.parametrize("stream", [False, True])
def test_both_answers_at_once(client: FlaskClient, runtime: Runtime, stream: bool) -> None:
    before = runtime.history.count()
    body = ask("compare", workspace={"compare": True, "memory": False}, stream=stream)
    response = client.post(PATH, json=body)
    assert response.status_code == 200
    if stream:
        chunks = [event["data"] for event in events(response.text) if isinstance(event.get("data"), dict)]
        text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", ()))
        told = next(chunk["olympus"] for chunk in chunks if "olympus" in chunk)
    else:
        text, told = response.json["choices"][0]["message"]["content"], response.json["olympus"]
    sides: dict[str, Any] = told["compare"]
    assert set(sides) == {"with", "without"}
    assert sides["with"]["text"] == text
    for side in sides.values():
        assert side["completion_tokens"] == 8
        assert side["tokens_per_second"] > 0
        assert side["ttft_s"] > 0
        assert side["mean_logprob"] < 0
    assert runtime.history.count() == before + 1, "only the answer with the workspace is remembered"


def test_the_workspaces_seed_serves_where_there_is_none(client: FlaskClient) -> None:
    wish = {"enabled": True, "virtual_kv": False, "controller": False, "memory": False, "seed": 5}
    first, again, plain = (
        client.post(PATH, json=ask("draw", temperature=1, **more)).json["choices"]
        for more in ({"workspace": wish}, {"workspace": wish}, {"seed": 5})
    )
    assert first == again == plain


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"enabled": False, "trace": True}, "workspace"),
        ({"enabled": False, "compare": True}, "workspace"),
        ({"virtuals": True}, "workspace.virtuals"),
        ({"enabled": "perhaps"}, "workspace.enabled"),
        ("on", "workspace"),
    ],
)
def test_a_wish_that_makes_no_sense(client: FlaskClient, wish: Any, param: str) -> None:
    response = client.post(PATH, json=ask(workspace=wish))
    assert response.status_code == 400
    assert response.json["error"]["param"] == param


def test_a_session_keeps_virtual_tokens_and_forgets_them_with_its_history(
    client: FlaskClient, runtime: Runtime
) -> None:
    steering, latent = runtime.workbench.steering, runtime.workbench.latent
    assert steering is not None
    assert latent is not None
    for _ in range(2):
        told = client.post(PATH, json=ask("my cat is Tibbles", session="cats", workspace=True)).json
    assert told["usage"]["workspace"]["session_segments"] == 1
    assert [stored.session for stored in latent.sessions()] == ["cats"]
    assert len(steering.store.segments("cats")) == 2
    steering.store.spill("cats")
    assert client.delete("/olympus/history?session=cats").json == {"deleted": 2}
    assert latent.sessions() == []
    assert steering.store.segments("cats") == ()


def test_what_the_history_brings_to_mind_enters_the_prompt(client: FlaskClient) -> None:
    client.post(PATH, json=ask("the lighthouse keeper is called Ambrose", domain="coast"))
    plain = client.post(PATH, json=ask("who is the lighthouse keeper?", domain="coast")).json["usage"]
    reminded = client.post(PATH, json=ask("who is the lighthouse keeper?", domain="coast", workspace=True)).json[
        "usage"
    ]
    assert reminded["prompt_tokens"] > plain["prompt_tokens"]
    assert reminded["workspace"]["recollections"]
    amnesic = {"enabled": True, "memory": False}
    forgot = client.post(PATH, json=ask("who is the lighthouse keeper?", domain="coast", workspace=amnesic)).json[
        "usage"
    ]
    assert forgot["prompt_tokens"] == plain["prompt_tokens"]


def test_the_status_says_what_there_is(client: FlaskClient) -> None:
    told = client.get("/olympus/status").json["workspace"]
    assert told["available"]
    assert told["layers"]
    assert told["trained"] is None


def test_without_a_workspace_a_wish_is_refused_and_the_rest_is_served(make_runtime: MakeRuntime) -> None:
    """A layer that the model does not have: the server runs, and says why it has no workspace."""
    client = create_app(runtime=make_runtime(model=True, workspace={"hooked_layers": (99,)})).test_client()
    assert client.post(PATH, json=ask()).status_code == 200
    told = client.get("/olympus/status").json["workspace"]
    assert not told["available"]
    assert "99" in told["reason"]
    response = client.post(PATH, json=ask(workspace=True))
    assert (response.status_code, response.json["error"]["code"]) == (400, "workspace_unavailable")
    assert "99" in response.json["error"]["message"]
    assert client.post(PATH, json=ask(workspace=False)).status_code == 200
