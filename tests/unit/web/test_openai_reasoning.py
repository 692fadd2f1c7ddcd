"""A model that reasons, behind the OpenAI API: a tiny gpt-oss with the true vocabulary says what the tests want."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from flask.testing import FlaskClient

from olympus.chat_types import ChatFinished, ChatRequest, Delta
from olympus.runtime import Runtime
from tests.support.harmony import harmony_encoding, harmony_tokenizer
from tests.support.tiny_gpt_oss import build_gpt_oss, scripted
from tests.unit.web.conftest import MakeRuntime, ask, events
from web.app import create_app
from web.openai_wire import Wire
from workspace.engine import Engine
from workspace.models import adopt_model
from workspace.sampling import SamplingParams

PATH = "/v1/chat/completions"
ANSWER = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is Paris.<|return|>"
CALL = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.find json<|message|>{"q": 1}<|call|>'
)
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds."}}


@pytest.fixture(scope="module")
def served(make_runtime: MakeRuntime) -> Runtime:
    """A runtime whose engine is a tiny gpt-oss."""
    runtime = make_runtime()
    engine = Engine(
        adopt_model("tiny-gpt-oss", build_gpt_oss(), harmony_tokenizer()), max_active=2, max_waiting=2, threads=1
    )
    engine.start()
    # What an engine tries out at its first passes is not scripted.
    engine.submit([1], SamplingParams(max_tokens=4, ignore_eos=True)).result(60)
    runtime._engine = engine
    return runtime


@pytest.fixture
def client(served: Runtime) -> FlaskClient:
    return create_app(runtime=served).test_client()


def saying(runtime: Runtime, *answers: str) -> Any:
    ids = [harmony_encoding().encode(answer, allowed_special="all") for answer in answers]
    return scripted(runtime.engine.loaded.model, *ids)


def stream(client: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json=ask(stream=True, **fields))
    *chunks, done = [entry["data"] for entry in events(response.text) if "data" in entry]
    assert done == "[DONE]"
    return chunks


def test_reasoning_and_answer_are_told_apart(served: Runtime, client: FlaskClient) -> None:
    with saying(served, ANSWER):
        whole = client.post(PATH, json=ask(max_tokens=50, logprobs=True)).json
    (choice,) = whole["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is Paris.",
        "refusal": None,
        "reasoning_content": "Easy.",
        "reasoning": "Easy.",
    }
    assert choice["finish_reason"] == "stop"
    assert [item["token"] for item in choice["logprobs"]["content"]] == ["It", " is", " Paris", "."]
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert whole["usage"]["completion_tokens"] == 16
    record = served.history.get(whole["olympus"]["experience_id"])
    assert record is not None
    assert (record.action, record.meta["reasoning"]) == ("It is Paris.", "Easy.")


def test_a_stream_says_the_same(served: Runtime, client: FlaskClient) -> None:
    with saying(served, ANSWER):
        first, *chunks, last, usage = stream(client, max_tokens=50, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "It is Paris."
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "Easy."
    assert all(set(delta) <= {"content", "reasoning", "reasoning_content"} and any(delta.values()) for delta in deltas)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_a_replay_has_the_reasoning_too(served: Runtime, client: FlaskClient) -> None:
    headers = {"Idempotency-Key": "reasoned"}
    body = ask("replay", max_tokens=50, reasoning_effort="high")
    with saying(served, ANSWER):
        first = client.post(PATH, json=body, headers=headers).json
    again = client.post(PATH, json=body, headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json["choices"] == first["choices"]
    assert again.json["usage"] == first["usage"]
    streamed = client.post(PATH, json=body | {"stream": True}, headers=headers)
    deltas = [
        entry["data"]["choices"][0]["delta"] for entry in events(streamed.text) if "object" in entry.get("data", ())
    ]
    assert {"content": "It is Paris.", "reasoning": "Easy.", "reasoning_content": "Easy."} in deltas
    other = client.post(PATH, json=body | {"reasoning_effort": "low"}, headers=headers)
    assert (other.status_code, other.json["error"]["code"]) == (400, "idempotency_key_reused")


def test_the_effort_reaches_the_prompt_and_an_unknown_one_is_refused(served: Runtime, client: FlaskClient) -> None:
    counts = {}
    for effort in ("low", "medium", None):
        with saying(served, ANSWER):
            whole = client.post(PATH, json=ask(max_tokens=50, reasoning_effort=effort)).json
        counts[effort] = whole["usage"]["prompt_tokens"]
        wanted = served.engine.render(ask()["messages"], reasoning_effort=effort or "medium")
        assert counts[effort] == len(wanted)
    for effort in ("extreme", 5, {"a": 1}):
        response = client.post(PATH, json=ask(reasoning_effort=effort))
        assert response.status_code == 400
        assert response.json["error"]["param"] == "reasoning_effort"
        assert "low, medium, high" in response.json["error"]["message"]


def test_a_response_has_the_reasoning_as_an_item(served: Runtime, client: FlaskClient) -> None:
    body = {"input": "hi", "max_output_tokens": 50, "temperature": 0, "reasoning": {"effort": "low"}}
    with saying(served, ANSWER):
        whole = client.post("/v1/responses", json=body).json
    assert openai.types.responses.Response.model_validate(whole, strict=True)
    reasoning, message = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Easy."}]
    assert message["content"][0]["text"] == "It is Paris."
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert whole["reasoning"]["effort"] == "low"
    assert client.get(f"/v1/responses/{whole['id']}").json["output"] == whole["output"]
    with saying(served, ANSWER):
        told = [entry["data"] for entry in events(client.post("/v1/responses", json=body | {"stream": True}).text)]
    kinds = [(event["type"], event["item"]["type"]) for event in told if "output_item" in event["type"]]
    assert kinds == [
        ("response.output_item.added", "reasoning"),
        ("response.output_item.done", "reasoning"),
        ("response.output_item.added", "message"),
        ("response.output_item.done", "message"),
    ]
    deltas = "".join(event["delta"] for event in told if event["type"] == "response.reasoning_text.delta")
    assert deltas == "Easy."
    assert [item["content"][0]["text"] for item in told[-1]["response"]["output"]] == ["Easy.", "It is Paris."]
    again = {"input": [*whole["output"], {"role": "user", "content": "And Rome?"}], "max_output_tokens": 50}
    with saying(served, ANSWER):
        assert client.post("/v1/responses", json=again).status_code == 200


def test_a_call_of_a_tool_that_nobody_offered_is_left_out(served: Runtime, client: FlaskClient) -> None:
    with saying(served, CALL):
        (choice,) = client.post(PATH, json=ask(max_tokens=50)).json["choices"]
    assert choice["finish_reason"] == "stop"
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("", "Look.")
    assert "tool_calls" not in choice["message"]


@pytest.fixture
def called(served: Runtime) -> tuple[list[Delta], ChatFinished]:
    """What the chat service says of a request that offers a tool."""
    request = ChatRequest(messages=tuple(ask()["messages"]), tools=(TOOL,), max_tokens=50, temperature=0.0)
    with saying(served, CALL):
        run = served.chat.open(request)
        told = [event for event in run.events() if event is not None]
        run.close()
    finished = told.pop()
    assert isinstance(finished, ChatFinished)
    return [event for event in told if isinstance(event, Delta)], finished


def test_a_tool_call_in_openais_objects(served: Runtime, called: tuple[list[Delta], ChatFinished]) -> None:
    """What the service says of a call, and what the wire makes of it."""
    deltas, finished = called
    wire = Wire(served.chat.model(), created=1)
    (choice,) = wire.completion(finished, None)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": '{"q": 1}'}
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["id"].startswith("call_")
    assert len(call["id"]) <= 40
    chunks = [wire.delta([delta])["choices"][0]["delta"] for delta in deltas]
    pieces = [piece for chunk in chunks for piece in chunk.get("tool_calls", ())]
    assert pieces[0] == {"index": 0} | call | {"function": {"name": "find", "arguments": ""}}
    assert all(set(piece) == {"index", "function"} for piece in pieces[1:])
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"q": 1}'
    assert wire.delta(deltas)["choices"][0]["delta"]["tool_calls"] == [{"index": 0} | call]
    parsed = openai.types.chat.ChatCompletion.model_validate(wire.completion(finished, None))
    assert parsed.choices[0].message.tool_calls is not None
    record = served.history.get(finished.experience_id or 0)
    assert record is not None
    assert record.meta["tool_calls"] == [{"name": "find", "arguments": '{"q": 1}'}]


def test_the_digest_of_an_older_request_stays() -> None:
    """A retry across an update: fields that came later and are not used change nothing."""
    request = ChatRequest(messages=({"role": "user", "content": "hi"},))
    assert request.fingerprint() == "262c2cd1bac5900299ce6c9b56eb888172348021570e449f45416da938128b6f"
    assert request.fingerprint() != ChatRequest(messages=request.messages, reasoning_effort="low").fingerprint()
