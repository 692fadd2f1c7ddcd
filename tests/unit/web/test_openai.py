"""The OpenAI API: shapes, fields, streams, and every way in which an answer may end early."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from olympus.errors import ModelNotReady
from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, ask, events
from web.app import create_app
from web.chat_schemas import ChatBody
from workspace.generation import Finished, Timings, TokenChunk, Usage

PATH = "/v1/chat/completions"


def test_models(client: FlaskClient, runtime: Runtime) -> None:
    listed = client.get("/v1/models").json
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model == client.get(f"/v1/models/{model['id']}").json
    assert model["id"] == "tiny-llama"
    assert (model["object"], model["owned_by"], model["context_length"]) == ("model", "olympus", 4096)
    assert isinstance(model["created"], int)
    response = client.get("/v1/models/gpt-4")
    assert (response.status_code, response.json["error"]["code"]) == (404, "model_not_found")
    assert "'tiny-llama'" in response.json["error"]["message"]
    assert client.post(PATH, json=ask(model=runtime.settings.model.name)).status_code == 200


def test_a_whole_answer_has_openais_shape(client: FlaskClient, runtime: Runtime) -> None:
    body = ask("what?", model="tiny-llama", session="s-whole", domain="shapes")
    answer = client.post(PATH, json=body).json
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 60
    assert answer["model"] == "tiny-llama"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens"] == len(runtime.engine.render(body["messages"]))
    record = runtime.history.get(answer["olympus"]["experience_id"])
    assert record is not None
    assert (record.action, record.domain, record.session_id) == (choice["message"]["content"], "shapes", "s-whole")


def _chunks(client: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json=ask(stream=True, **fields))
    assert response.status_code == 200
    assert response.mimetype == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    *chunks, done = [entry["data"] for entry in events(response.text) if "data" in entry]
    assert done == "[DONE]"
    return chunks


def test_a_stream_says_the_same_as_the_whole_answer(client: FlaskClient, runtime: Runtime) -> None:
    whole = client.post(PATH, json=ask(max_tokens=40)).json
    first, *deltas, last = _chunks(client, max_tokens=40)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
        == whole["choices"][0]["message"]["content"]
    )
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert runtime.history.get(last["olympus"]["experience_id"]) is not None
    for chunk in (first, *deltas, last):
        assert chunk["object"] == "chat.completion.chunk"
        assert (chunk["id"], chunk["created"], chunk["model"]) == (first["id"], first["created"], "tiny-llama")
        assert "usage" not in chunk
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *deltas))


def test_a_stream_can_end_with_the_usage(client: FlaskClient) -> None:
    *chunks, usage = _chunks(client, stream_options={"include_usage": True})
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "usage" not in _chunks(client, stream_options={"include_usage": False})[-1]


def test_log_probabilities_streamed_and_not(client: FlaskClient) -> None:
    whole = client.post(PATH, json=ask(logprobs=True, top_logprobs=2)).json["choices"][0]["logprobs"]["content"]
    assert len(whole) == 8
    assert all(set(item) == {"token", "logprob", "bytes", "top_logprobs"} for item in whole)
    assert all(set(top) == {"token", "logprob", "bytes"} for item in whole for top in item["top_logprobs"])
    assert all(len(item["top_logprobs"]) == 2 for item in whole)
    chunks = _chunks(client, logprobs=True, top_logprobs=2)
    streamed = [item for chunk in chunks for item in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole
    none = client.post(PATH, json=ask(logprobs=True)).json["choices"][0]["logprobs"]["content"]
    assert all(item["top_logprobs"] == [] for item in none)


def test_contents_may_be_text_or_parts(client: FlaskClient) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    texts = [client.post(PATH, json=ask(content)).json["choices"][0]["message"] for content in (parts, "one\ntwo")]
    assert texts[0] == texts[1]


def test_all_roles_and_what_clients_copy_from_answers(client: FlaskClient) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "hello",
            "refusal": None,
            "tool_calls": None,
            "annotations": [],
            "audio": None,
        },
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]
    response = client.post(PATH, json=ask() | {"messages": messages})
    assert response.status_code == 200, response.text


def test_hints_and_nulls_change_nothing(client: FlaskClient) -> None:
    hints = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "parallel_tool_calls": True,
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    nulls = dict.fromkeys(set(ChatBody.model_fields) - {"messages", "max_tokens", "temperature", "stop"})
    plain = client.post(PATH, json=ask()).json["choices"]
    assert client.post(PATH, json=ask(**hints)).json["choices"] == plain
    assert client.post(PATH, json=ask(**nulls, stop=None)).json["choices"] == plain


def test_a_whole_number_may_be_written_with_a_point(client: Any) -> None:
    """JSON has one kind of number, and some programs write all of theirs so."""
    plain = client.post(PATH, json=ask(max_tokens=3, n=2, seed=7))
    raw = json.dumps(ask(max_tokens=3.0, n=2.0, seed=7.0))
    assert '"max_tokens": 3.0' in raw
    pointed = client.post(PATH, data=raw, content_type="application/json")
    assert pointed.status_code == 200, pointed.json
    assert pointed.json["choices"] == plain.json["choices"]
    for wrong in ("1e300", "2.5", "true", '"3"'):
        refused = client.post(PATH, data=raw.replace("3.0", wrong), content_type="application/json")
        assert (refused.status_code, refused.json["error"]["param"]) == (400, "max_tokens")


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"n": 9}, "n", "less than or equal to 8"),
    ({"n": True}, "n", "valid integer"),
    ({"n": 2, "workspace": {"compare": True}}, "n", "only 1 with the workspace"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "token id 50256 is outside the vocabulary of 320"),
    ({"logit_bias": {"5": -101}}, "logit_bias[5]", "greater than or equal to -100"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "must map token ids to numbers"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
    ({"modalities": ["audio"]}, "modalities", "supported yet"),
    ({"audio": {"voice": "x"}}, "audio", "not supported yet"),
    ({"temperatur": 1}, "temperatur", "did you mean temperature?"),
    ({"maxtokens": 1}, "maxtokens", "did you mean max_tokens?"),
    ({"xyzzy": 1}, "xyzzy", "unknown field"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "0.5"}, "temperature", "valid number"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 5000}, "max_tokens", "at most 4096 on this server"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, None, "differ"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": ["a", ""]}, "stop", "none of them empty"),
    ({"stop": 3}, "stop", "a text, or a list"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, None, "only possible when stream is true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "did you mean include_usage?"),
    ({"seed": 2**63}, "seed", "less than or equal"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", "valid array"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'system', 'developer'"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "valid string"),
    ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages[0]", "NUL"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "each part must be like"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "parts of type image_url are not supported yet",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls[0].function",
        "Field required",
    ),
    ({"domain": "Not a name"}, "domain", "match pattern"),
    ({"session": ""}, "session", "at least 1 character"),
    ({"session": "a", "olympus": {"session": "b"}}, None, "differ"),
    ({"olympus": {"sesion": "b"}}, "olympus.sesion", "did you mean session?"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, fields: dict[str, Any], param: str | None, message: str
) -> None:
    text = json.dumps(ask() | fields)  # not the application's own, which writes null for NaN
    response = client.post(PATH, data=text, content_type="application/json")
    assert response.status_code == 400, response.text
    error = response.json["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert message in error["message"], error


def test_a_model_that_is_not_here(client: FlaskClient) -> None:
    response = client.post(PATH, json=ask(model="gpt-4o"))
    assert response.status_code == 404
    assert response.json["error"]["code"] == "model_not_found"
    assert "the one available is 'tiny-llama'" in response.json["error"]["message"]


def test_a_prompt_that_is_too_long_has_the_numbers(client: FlaskClient, runtime: Runtime) -> None:
    long = "word " * 4000
    for stream in (False, True):
        response = client.post(PATH, json=ask(long, stream=stream))
        error = response.json["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert "4096" in error["message"]
        assert str(len(runtime.engine.render([{"role": "user", "content": long}]))) in error["message"]


def test_session_and_domain_may_come_in_a_field_of_ours(client: FlaskClient) -> None:
    for body in (ask(session="s9", domain="d9"), ask(olympus={"session": "s9", "domain": "d9"})):
        ours = client.post(PATH, json=body).json["olympus"]
        assert (ours["session"], ours["domain"]) == ("s9", "d9")


def test_a_retry_with_the_same_key_gets_the_same_answer(client: FlaskClient, runtime: Runtime) -> None:
    headers = {"Idempotency-Key": "retry-1"}
    body = ask(temperature=1.0)
    first = client.post(PATH, json=body, headers=headers)
    before = runtime.history.count()
    again = client.post(PATH, json=body, headers=headers)
    assert again.json["choices"] == first.json["choices"]
    assert again.json["usage"] == first.json["usage"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert runtime.history.count() == before
    streamed = client.post(PATH, json=body | {"stream": True}, headers=headers)
    chunks = [entry["data"] for entry in events(streamed.text)][:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == first.json["choices"][0]["message"]["content"]
    other = client.post(PATH, json=ask("else"), headers=headers)
    assert (other.status_code, other.json["error"]["code"]) == (400, "idempotency_key_reused")
    assert client.post(PATH, json=body, headers={"Idempotency-Key": "x" * 256}).status_code == 400


# -- ending early -----------------------------------------------------------------------------------------------------


class Scripted:
    """A generation that gives what it is told: texts, None for silence, an exception, and cancellation in between."""

    def __init__(self, script: list[Any]):
        self.script = script
        self.cancelled = threading.Event()
        self.said = ""

    def stream(self, timeout: float) -> Iterator[Any]:
        for item in self.script:
            if self.cancelled.is_set():
                break
            if isinstance(item, Exception):
                raise item
            if item is None:
                self.cancelled.wait(timeout)
                yield None
            else:
                self.said += item
                yield TokenChunk(item, 5)
        yield self.result()

    def result(self, timeout: float | None = None) -> Finished:
        reason = "cancelled" if self.cancelled.is_set() else "stop"
        return Finished(reason, Usage(3, len(self.said)), self.said, (), Timings(0.0, 0.0, 1.0))  # type: ignore[arg-type]

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.fixture
def scripted(
    make_runtime: MakeRuntime, runtime: Runtime
) -> Callable[[list[Any]], tuple[FlaskClient, Runtime, Scripted]]:
    """``scripted(script)``: a client whose every chat plays ``script``."""

    def make(script: list[Any], **server: Any) -> tuple[FlaskClient, Runtime, Scripted]:
        made = make_runtime(server=server)
        generation = Scripted(script)
        engine = SimpleNamespace(
            loaded=runtime.engine.loaded,
            submit=lambda *_, **__: generation,
            stop=lambda timeout: True,
            stats=runtime.engine.stats,
            is_busy=False,
        )
        made._engine = engine  # type: ignore[assignment]
        return create_app(runtime=made).test_client(), made, generation

    return make


Script = Callable[..., tuple[FlaskClient, Runtime, Scripted]]


def test_silence_is_filled_with_comments_and_tokens_come_in_batches(scripted: Script) -> None:
    client, _, _ = scripted([*[None] * 30, *"abcdefgh", None, "i"])
    response = client.post(PATH, json=ask(stream=True))
    entries = events(response.text)
    assert entries[1] == {"comment": "keep-alive"}
    texts = [e["data"]["choices"][0]["delta"].get("content") for e in entries if isinstance(e.get("data"), dict)]
    assert "".join(filter(None, texts)) == "abcdefghi"
    assert texts[1] == "a", "the first text is not held back"
    assert len(texts) < 8, "the rest came in batches"


def test_a_failure_after_the_first_byte_is_an_event(scripted: Script) -> None:
    client, runtime, _ = scripted(["hello ", None, RuntimeError("secret detail")])
    response = client.post(PATH, json=ask(stream=True), headers={"X-Request-Id": "r7"})
    assert response.status_code == 200
    last = events(response.text)[-1]["data"]
    assert last["error"]["type"] == "server_error"
    assert last["error"]["request_id"] == "r7"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    assert runtime.admission.counts()["chats"] == 0


def test_a_server_that_stops_ends_its_streams(scripted: Script) -> None:
    client, runtime, generation = scripted(["hello", *[None] * 1000])
    response = client.post(PATH, json=ask(stream=True))
    chunks = response.iter_encoded()
    assert b"assistant" in next(chunks)
    assert b"hello" in next(chunks)
    runtime.stop_event.set()
    begun = time.monotonic()
    rest = b"".join(chunks).decode()
    assert time.monotonic() - begun < 5
    assert events(rest)[-1]["data"]["error"]["code"] == "not_ready"
    assert "server is stopping" in rest
    assert generation.cancelled.is_set()
    (record,) = runtime.history.page()
    assert (record.action, record.meta["finish_reason"]) == ("hello", "cancelled")
    assert runtime.admission.counts()["chats"] == 0
    refused = client.post(PATH, json=ask())
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]


def test_a_server_that_stops_ends_whole_answers_too(scripted: Script) -> None:
    client, runtime, _ = scripted(["hello", *[None] * 1000])
    timer = threading.Timer(0.2, runtime.stop_event.set)
    timer.start()
    response = client.post(PATH, json=ask())
    timer.join()
    assert response.status_code == 503
    assert "server is stopping" in response.json["error"]["message"]
    assert runtime.history.page()[0].action == "hello"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_generation(scripted: Script, stream: bool) -> None:
    """The socket says so without anything being written."""
    client, runtime, generation = scripted(["hello", *[None] * 1000])
    ours, theirs = socket.socketpair()
    timer = threading.Timer(0.2, theirs.close)
    timer.start()
    begun = time.monotonic()
    with ours:
        response = client.post(PATH, json=ask(stream=stream), environ_overrides={"gunicorn.socket": ours})
        text = response.text
    timer.join()
    assert time.monotonic() - begun < 8
    assert response.status_code == (200 if stream else 499)
    assert 'finish_reason":"' not in text
    assert generation.cancelled.is_set()
    assert runtime.history.page()[0].meta["finish_reason"] == "cancelled"
    assert runtime.admission.counts()["chats"] == 0


def test_a_client_that_sends_more_has_not_left(scripted: Script) -> None:
    client, _, _ = scripted(["hello", None, None])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"GET /next HTTP/1.1\r\n")
        response = client.post(PATH, json=ask(stream=True), environ_overrides={"gunicorn.socket": ours})
        assert response.text.endswith("[DONE]\n\n")


def test_closing_a_stream_gives_everything_back(scripted: Script) -> None:
    client, runtime, generation = scripted(["hello", *[None] * 1000], max_chats=1)
    never_begun = client.post(PATH, json=ask(stream=True))
    assert runtime.admission.counts()["chats"] == 1
    refused = client.post(PATH, json=ask())
    assert (refused.status_code, refused.json["error"]["type"]) == (429, "rate_limit_error")
    assert refused.json["error"]["code"] == "too_many_chats"
    assert int(refused.headers["Retry-After"]) >= 1
    never_begun.close()
    assert runtime.admission.counts()["chats"] == 0
    assert generation.cancelled.is_set()


def test_refused_requests_give_their_slot_back(client: FlaskClient, runtime: Runtime) -> None:
    for body in (ask(model="other"), ask("word " * 4000), ask(max_tokens=5000)):
        client.post(PATH, json=body)
    assert runtime.admission.counts()["chats"] == 0


def test_a_full_engine_says_when_to_come_back(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(model=True, engine={"max_active": 1, "max_waiting": 0})
    client = create_app(runtime=runtime).test_client()
    running = client.post(PATH, json=ask(stream=True, max_tokens=3000))
    refused = client.post(PATH, json=ask())
    assert (refused.status_code, refused.json["error"]["code"]) == (429, "engine_busy")
    assert int(refused.headers["Retry-After"]) >= 1
    running.close()


def test_while_the_model_loads_clients_are_told_to_wait(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(start=False, model=True)
    client = create_app(runtime=runtime).test_client()
    for response in (client.post(PATH, json=ask()), client.get("/v1/models")):
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) == ModelNotReady.retry_after
        assert "still loading" in response.json["error"]["message"]
        assert response.json["error"]["code"] == "model_not_ready"


def test_without_a_model_there_are_none(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    client = guarded.test_client()
    assert client.get("/v1/models", headers=key("chat")).json == {"object": "list", "data": []}
    response = client.post(PATH, json=ask(), headers=key("chat"))
    assert response.status_code == 503
    assert "without a language model" in response.json["error"]["message"]


def test_chats_at_once_are_not_mixed_up(served: Flask, runtime: Runtime) -> None:
    questions = [f"question number {number}" for number in range(4)]
    alone = {text: served.test_client().post(PATH, json=ask(text, max_tokens=30)).json["choices"] for text in questions}
    together: dict[str, Any] = {}

    def chat(text: str) -> None:
        together[text] = served.test_client().post(PATH, json=ask(text, max_tokens=30)).json["choices"]

    threads = [threading.Thread(target=chat, args=(text,)) for text in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
