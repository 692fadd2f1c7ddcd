"""``tools`` and ``tool_choice`` over HTTP: calls whole and streamed, conversations that hold them, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from tests.support.tiny_gpt_oss import scripted
from tests.unit.web.conftest import ask, events

PATH = "/v1/chat/completions"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a thing.",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "maxLength": 6}},
            "required": ["q"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
OTHER = {"type": "function", "function": {"name": "now"}}
CALLS = (
    'I look.\n<tool_call>\n{"name": "find", "arguments": {"q": "fox"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(autouse=True)
def prompts_in_one_pass(runtime: Runtime) -> Iterator[None]:
    """``scripted`` gives a token per pass."""
    stepper = runtime.engine._stepper
    usual = stepper._prefill_chunk, stepper._store
    stepper._prefill_chunk, stepper._store = 4096, None
    yield
    stepper._prefill_chunk, stepper._store = usual


def saying(runtime: Runtime, text: str) -> Any:
    loaded = runtime.engine.loaded
    ids = [*loaded.tokenizer.encode(text, add_special_tokens=False), next(iter(loaded.eos_ids))]
    return scripted(loaded.model, ids)


def test_calls_are_parsed_whole_and_streamed(client: FlaskClient, runtime: Runtime) -> None:
    body = ask(tools=[TOOL, OTHER], max_tokens=300)
    with saying(runtime, CALLS):
        whole = client.post(PATH, json=body).json
    (choice,) = whole["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I look.")
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "find", "arguments": '{"q": "fox"}'},
        {"name": "now", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert openai.types.chat.ChatCompletion.model_validate(whole)
    record = runtime.history.get(whole["olympus"]["experience_id"])
    assert record is not None
    assert record.meta["tool_calls"][0] == {"name": "find", "arguments": '{"q": "fox"}'}
    with saying(runtime, CALLS):
        chunks = [entry["data"] for entry in events(client.post(PATH, json=body | {"stream": True}).text)][:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    told: dict[int, dict[str, str]] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        call = told.setdefault(piece["index"], {"arguments": ""})
        call["name"] = piece["function"].get("name", call.get("name"))
        call["arguments"] += piece["function"]["arguments"]
    assert list(told.values()) == [
        {"arguments": '{"q": "fox"}', "name": "find"},
        {"arguments": "{}", "name": "now"},
    ]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_only_one_call_where_that_is_asked_for(client: FlaskClient, runtime: Runtime) -> None:
    with saying(runtime, CALLS):
        body = ask(tools=[TOOL], max_tokens=300, parallel_tool_calls=False)
        (choice,) = client.post(PATH, json=body).json["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


def test_with_none_they_are_not_shown_and_not_looked_for(client: FlaskClient, runtime: Runtime) -> None:
    plain = client.post(PATH, json=ask()).json
    none = client.post(PATH, json=ask(tools=[TOOL], tool_choice="none")).json
    assert (none["choices"], none["usage"]) == (plain["choices"], plain["usage"])
    auto = client.post(PATH, json=ask(tools=[TOOL])).json
    assert auto["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 100
    with saying(runtime, CALLS):
        (choice,) = client.post(PATH, json=ask(tools=[TOOL], tool_choice="none", max_tokens=300)).json["choices"]
    assert choice["message"]["content"] == CALLS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_call_can_be_forced(client: FlaskClient, tool_choice: Any, stream: bool) -> None:
    for seed in range(5):
        body = ask(tools=[TOOL, OTHER], tool_choice=tool_choice, temperature=1.0, seed=seed, max_tokens=200)
        if stream:
            entries = events(client.post(PATH, json=body | {"stream": True}).text)[:-1]
            choices = [entry["data"]["choices"][0] for entry in entries]
            pieces = [piece["function"] for choice in choices for piece in choice["delta"].get("tool_calls", ())]
            name, arguments = pieces[0]["name"], "".join(piece["arguments"] for piece in pieces)
            reason = choices[-1]["finish_reason"]
        else:
            (choice,) = client.post(PATH, json=body).json["choices"]
            (call,) = choice["message"]["tool_calls"]
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            reason = choice["finish_reason"]
            assert choice["message"]["content"] is None
        assert reason == "tool_calls"
        assert name == "find" or (tool_choice == "required" and name == "now")
        assert set(json.loads(arguments)) == ({"q"} if name == "find" else set())


def test_calls_and_results_in_the_conversation(client: FlaskClient, runtime: Runtime) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"q": "fox"}'}}
    messages = [
        {"role": "user", "content": "Where is the fox?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "in the den"},
    ]
    answer = client.post(PATH, json=ask(tools=[TOOL]) | {"messages": messages})
    assert answer.status_code == 200, answer.text
    record = runtime.history.get(answer.json["olympus"]["experience_id"])
    assert record is not None
    assert record.observation == "Where is the fox?"
    assert record.messages is not None
    assert record.messages[1]["tool_calls"] == [call]
    prompt = runtime.engine.loaded.tokenizer.decode(runtime.engine.render(record.messages, [TOOL]))
    assert "<tools>" in prompt
    assert "<tool_response>\nin the den\n</tool_response>" in prompt


NAMED = {"type": "function", "function": {"name": "nowhere"}}
REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tool_choice": "required"}, None, "needs tools"),
    ({"tools": [TOOL], "tool_choice": NAMED}, None, "names nowhere, which is not among the tools"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "'required'"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "\x00"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "NUL",
    ),
    ({"tools": [TOOL, TOOL]}, None, "a name of its own"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, None, "exclude each other"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "not": {}}}}],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
        '"not"',
    ),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = client.post(PATH, json=ask() | fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
