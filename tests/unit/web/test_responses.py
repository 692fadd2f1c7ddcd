"""``/v1/responses``: whole and streamed, tools, formats, chains through the history, and what is stored of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from openai.types.responses import Response, ResponseItemList

from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, events
from tests.unit.web.test_openai_tools import CALLS, prompts_in_one_pass, saying
from web.app import create_app

__all__ = ["prompts_in_one_pass"]  # a fixture for all tests here, too
PATH = "/v1/responses"
FIND: dict[str, Any] = {
    "type": "function",
    "name": "find",
    "description": "Find a thing.",
    "parameters": {
        "type": "object",
        "properties": {"q": {"type": "string", "maxLength": 6}},
        "required": ["q"],
        "additionalProperties": False,
    },
    "strict": True,
}


def asking(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"input": given, "max_output_tokens": 8, "temperature": 0, **fields}


def streamed(client: FlaskClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    entries = [entry for entry in events(client.post(PATH, json=body | {"stream": True}).text) if "data" in entry]
    assert all(entry["event"] == entry["data"]["type"] for entry in entries)
    assert [entry["data"]["sequence_number"] for entry in entries] == list(range(len(entries)))
    return [entry["data"] for entry in entries]


def test_an_answer_is_that_of_a_chat_and_is_stored(client: FlaskClient, runtime: Runtime) -> None:
    body = asking("Where is the fox?", instructions="Be brief.", metadata={"topic": "animals"}, session="s-1")
    made = client.post(PATH, json=body).json
    assert Response.model_validate(made, strict=True)
    (item,) = made["output"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the fox?"}]
    chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8, "temperature": 0}).json
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (made["usage"]["input_tokens"], made["usage"]["output_tokens"]) == (chat["usage"]["prompt_tokens"], 8)
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    record = runtime.history.get(made["olympus"]["experience_id"])
    assert record is not None
    assert (record.observation, record.action) == ("Where is the fox?", item["content"][0]["text"])
    assert record.session_id == "s-1"
    stored = client.get(f"{PATH}/{made['id']}").json
    assert stored["olympus"].pop("replayed") is True
    del made["olympus"]["replayed"]
    assert stored == made
    shown = client.get("/olympus/history", query_string={"session": "s-1"}).json["experiences"][0]
    assert "response" not in shown["meta"]


def test_a_stream_tells_the_same_in_typed_events(client: FlaskClient) -> None:
    whole = client.post(PATH, json=asking()).json
    told = streamed(client, asking())
    assert [event["type"] for event in told if not event["type"].endswith("delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in told if event["type"] == "response.output_text.delta") == text
    last = told[-1]["response"]
    assert last["id"] == told[0]["response"]["id"]
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert client.get(f"{PATH}/{last['id']}").json["output"] == last["output"]


def test_calls_their_outputs_and_the_next_turn(client: FlaskClient, runtime: Runtime) -> None:
    body = asking("Where is the fox?", tools=[FIND, {"type": "function", "name": "now"}], max_output_tokens=300)
    with saying(runtime, CALLS):
        told = streamed(client, body)
    last = told[-1]["response"]
    assert told[-1]["type"] == "response.completed"
    assert Response.model_validate(last, strict=True)
    said, find, now = last["output"]
    assert said["content"][0]["text"].strip() == "I look."
    assert (find["name"], json.loads(find["arguments"]), now["name"]) == ("find", {"q": "fox"}, "now")
    assert [event["arguments"] for event in told if event["type"] == "response.function_call_arguments.done"] == [
        find["arguments"],
        now["arguments"],
    ]
    outputs = [
        {"type": "function_call_output", "call_id": find["call_id"], "output": "in the den"},
        {"type": "function_call_output", "call_id": now["call_id"], "output": [{"type": "input_text", "text": "noon"}]},
    ]
    chained = client.post(PATH, json=asking(outputs, previous_response_id=last["id"], tools=[FIND])).json
    whole = [{"role": "user", "content": "Where is the fox?"}, said, find, now, *outputs]
    again = client.post(PATH, json=asking(whole, tools=[FIND])).json
    assert chained["usage"]["input_tokens"] == again["usage"]["input_tokens"], "the same prompt either way"
    assert chained["output"][0]["content"] == again["output"][0]["content"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (said, find, now)]
    by_name = client.post(PATH, json=asking([whole[0], *references, *outputs], tools=[FIND])).json
    assert by_name["usage"]["input_tokens"] == again["usage"]["input_tokens"]
    listed = client.get(f"{PATH}/{chained['id']}/input_items", query_string={"order": "asc", "limit": 4}).json
    assert ResponseItemList.model_validate(listed)
    assert [item["type"] for item in listed["data"]] == ["message", "message", "function_call", "function_call"]
    assert listed["has_more"]
    query = {"order": "asc", "after": listed["last_id"]}
    rest = client.get(f"{PATH}/{chained['id']}/input_items", query_string=query).json
    assert [item["output"] for item in rest["data"]] == ["in the den", "noon"]
    assert not rest["has_more"]


def test_a_chain_goes_on_after_a_restart_without_the_old_instructions(make_runtime: MakeRuntime, tmp_path: Any) -> None:
    from settings import load_settings

    first = make_runtime(model=True)
    client = create_app(runtime=first).test_client()
    one = client.post(PATH, json=asking("my name is Ada", instructions="Be brief.", domain="names", session="ada")).json
    first.shutdown(5)
    later = Runtime(load_settings(environ={}, overrides=first.settings.model_dump(mode="json", exclude_unset=True)))
    later.start(wait_for_model=True)
    try:
        client = create_app(runtime=later).test_client()
        assert client.get(f"{PATH}/{one['id']}").json["output"] == one["output"]
        two = client.post(PATH, json=asking("who am I?", previous_response_id=one["id"], instructions="Sing.")).json
        assert two["previous_response_id"] == one["id"]
        record = later.history.get(two["olympus"]["experience_id"])
        assert record is not None
        assert record.messages is not None
        assert [(item["role"], item["content"]) for item in record.messages] == [
            ("system", "Sing."),
            ("user", "my name is Ada"),
            ("assistant", one["output"][0]["content"][0]["text"]),
            ("user", "who am I?"),
        ]
        assert (record.domain, record.session_id) == ("names", "ada")
        three = client.post(PATH, json=asking("and now?", previous_response_id=two["id"])).json
        roles = [item["role"] for item in later.history.get(three["olympus"]["experience_id"]).messages]  # type: ignore[union-attr]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
    finally:
        later.shutdown(5)


def test_what_is_not_stored_is_not_found(client: FlaskClient) -> None:
    unstored = client.post(PATH, json=asking(store=False)).json
    gone = client.post(PATH, json=asking("forget me")).json
    assert client.delete(f"{PATH}/{gone['id']}").json == {"id": gone["id"], "object": "response", "deleted": True}
    for made in (unstored, gone):
        for path in (f"{PATH}/{made['id']}", f"{PATH}/{made['id']}/input_items"):
            missing = client.get(path)
            assert (missing.status_code, missing.json["error"]["code"]) == (404, "response_not_found")
        refused = client.post(PATH, json=asking(previous_response_id=made["id"]))
        assert (refused.status_code, refused.json["error"]["code"]) == (400, "previous_response_not_found")
        assert refused.json["error"]["param"] == "previous_response_id"
    assert client.delete(f"{PATH}/{gone['id']}").status_code == 404
    record = client.get(f"/olympus/history/{gone['olympus']['experience_id']}")
    assert record.status_code == 404


def test_nobody_reads_the_responses_of_somebody_else(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(model=True)
    app = create_app(runtime=runtime)
    keys = [runtime.keys.create(name, ["chat"])[1] for name in ("ada", "bob")]
    ada, bob = ({"Authorization": f"Bearer {key}"} for key in keys)
    client = app.test_client()
    made = client.post(PATH, json=asking(), headers=ada).json
    assert client.get(f"{PATH}/{made['id']}", headers=ada).status_code == 200
    item = [{"type": "item_reference", "id": made["output"][0]["id"]}]
    for response in (
        client.get(f"{PATH}/{made['id']}", headers=bob),
        client.delete(f"{PATH}/{made['id']}", headers=bob),
        client.post(PATH, json=asking(previous_response_id=made["id"]), headers=bob),
        client.post(PATH, json=asking(item), headers=bob),
        client.get(f"{PATH}/{made['id']}"),
    ):
        assert response.status_code in (400, 404)
    assert client.get(f"{PATH}/{made['id']}", headers=ada).status_code == 200


def test_a_retry_with_a_key_is_the_same_response(client: FlaskClient, runtime: Runtime) -> None:
    headers = {"Idempotency-Key": "response-1"}
    first = client.post(PATH, json=asking("once"), headers=headers)
    count = runtime.history.count()
    again = client.post(PATH, json=asking("once"), headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.json["id"], again.json["output"]) == (first.json["id"], first.json["output"])
    assert again.json["created_at"] == first.json["created_at"]
    assert runtime.history.count() == count
    assert client.get(f"{PATH}/{first.json['id']}").status_code == 200
    chat = {"messages": [{"role": "user", "content": "once"}], "max_tokens": 8, "temperature": 0}
    other = client.post("/v1/chat/completions", json=chat, headers=headers)
    assert other.json["error"]["code"] == "idempotency_key_reused"


def test_formats_are_kept(client: FlaskClient) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    shape = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    made = client.post(PATH, json=asking(text={"format": shape}, max_output_tokens=60)).json
    assert json.loads(made["output"][0]["content"][0]["text"])["a"] in (1, 2)
    assert (made["status"], made["text"]["format"]) == ("completed", shape)


def test_log_probabilities(client: FlaskClient) -> None:
    body = asking(include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = client.post(PATH, json=body).json["output"][0]["content"]
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [2] * 8
    told = streamed(client, body)
    pieces = [token for event in told if event["type"] == "response.output_text.delta" for token in event["logprobs"]]
    assert pieces == part["logprobs"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, None, "at least one item"),
        ({"input": 3}, "input", "a text, or a list"),
        ({"input": [{"type": "reasoning"}]}, "input", "nothing to answer"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]", "only items of the types message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "input_image"),
        ({"input": [{"role": "user", "content": "\x00"}]}, "input[0]", "NUL"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id", "'x'"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input", "send the item itself"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "type web_search are not supported"),
        ({"tools": [FIND], "tool_choice": {"type": "function", "name": "seek"}}, None, "names seek"),
        ({"tools": [FIND], "text": {"format": {"type": "json_object"}}}, None, "text.format and tools exclude"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "schema goes with"),
        ({"background": True}, "background", "only False is supported"),
        ({"truncation": "auto"}, "truncation", "only 'disabled' is supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"max_tokens": 3}, "max_tokens", "did you mean"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "at most"),
        ({"input": "word " * 9000}, "input", "4096"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format", '"not"'),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "512"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id", "no response"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = client.post(PATH, json=asking() | fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_an_error_after_the_first_byte_is_a_failed_response(served: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Runtime = served.extensions["olympus"]

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(runtime.chat, "commit", full)
    told = streamed(served.test_client(), asking())
    assert told[-1]["type"] == "response.failed"
    failed = told[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert "disk full" not in failed["error"]["message"]
    assert "unexpected error" in failed["error"]["message"]
    assert failed["output"][0]["content"][0]["text"]
