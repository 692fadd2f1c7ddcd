"""The older completion route: prompts in their forms, the older log-probabilities, streams, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olympus.runtime import Runtime
from tests.unit.web.conftest import events
from web.completion_schemas import CompletionBody
from workspace.sampling import SamplingParams

PATH = "/v1/completions"
ROUTES = (PATH, "/v1/cartridge/completions", "/custom/cartridge/completions")


def body(prompt: Any = "the quick brown", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 10, "temperature": 0, **fields}


@pytest.mark.parametrize("path", ROUTES)
def test_a_text_goes_on_as_the_engine_would(client: FlaskClient, runtime: Runtime, path: str) -> None:
    answer = client.post(path, json=body(session="c1", domain="texts")).json
    ids = runtime.engine.encode("the quick brown")
    expected = runtime.engine.submit(ids, SamplingParams(max_tokens=10, temperature=0)).result(30)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny-llama")
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 10,
        "total_tokens": len(ids) + 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    record = runtime.history.get(answer["olympus"]["experience_id"])
    assert record is not None
    assert (record.observation, record.action) == ("the quick brown", expected.text)
    assert (record.domain, record.session_id, record.messages) == ("texts", "c1", None)
    assert record.meta["kind"] == "completion"
    assert openai.types.Completion.model_validate(answer).choices[0].text == expected.text


def test_all_forms_of_a_prompt_are_the_same(client: FlaskClient, runtime: Runtime) -> None:
    ids = runtime.engine.encode("the quick brown")
    answers = [client.post(PATH, json=body(form)).json for form in ("the quick brown", ids, [ids], ["the quick brown"])]
    assert all(answer["choices"] == answers[0]["choices"] for answer in answers)
    record = runtime.history.get(answers[1]["olympus"]["experience_id"])
    assert record is not None
    assert record.observation == "the quick brown"


def test_without_a_limit_there_are_sixteen_tokens(client: FlaskClient) -> None:
    assert client.post(PATH, json={"prompt": "a", "temperature": 0}).json["usage"]["completion_tokens"] == 16


def test_log_probabilities_in_their_older_shape(client: FlaskClient) -> None:
    (choice,) = client.post(PATH, json=body(logprobs=3)).json["choices"]
    numbers = choice["logprobs"]
    assert set(numbers) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in numbers.values()} == {10}
    assert "".join(numbers["tokens"]) == choice["text"]
    for token, logprob, top, offset in zip(*(numbers[name] for name in numbers), strict=True):
        assert choice["text"][offset:].startswith(token)
        assert max(top.values()) == top[token] == logprob
    (bare,) = client.post(PATH, json=body(logprobs=0)).json["choices"]
    assert bare["logprobs"]["top_logprobs"] == [{}] * 10


def test_a_stream_says_the_same(client: FlaskClient) -> None:
    options = {"n": 2, "temperature": 1.0, "seed": 4, "logprobs": 1}
    whole = client.post(PATH, json=body(**options)).json
    response = client.post(PATH, json=body(**options, stream=True, stream_options={"include_usage": True}))
    *chunks, usage, done = [entry["data"] for entry in events(response.text) if "data" in entry]
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in own) == choice["text"]
        assert own[-1]["finish_reason"] == "length"
        for name, column in choice["logprobs"].items():
            assert [value for item in own for value in (item["logprobs"] or {name: []})[name]] == column


def test_stops_and_retries(client: FlaskClient, runtime: Runtime) -> None:
    text = client.post(PATH, json=body(max_tokens=20)).json["choices"][0]["text"]
    (choice,) = client.post(PATH, json=body(max_tokens=20, stop=[text[5:8]])).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[5:8])], "stop")
    headers = {"Idempotency-Key": "completed"}
    first = client.post(PATH, json=body(temperature=1), headers=headers).json
    before = runtime.history.count()
    again = client.post(PATH, json=body(temperature=1), headers=headers)
    assert (again.json["choices"], again.headers["Idempotent-Replayed"]) == (first["choices"], "true")
    assert runtime.history.count() == before
    other = client.post(PATH, json=body("else", temperature=1), headers=headers)
    assert other.json["error"]["code"] == "idempotency_key_reused"


def test_a_character_that_no_database_keeps_is_the_same_in_every_telling(client: FlaskClient, runtime: Runtime) -> None:
    (nul,) = runtime.engine.encode("\x00")
    headers = {"Idempotency-Key": "nul"}
    first = client.post(PATH, json=body(max_tokens=3, logit_bias={str(nul): 100}), headers=headers).json
    again = client.post(PATH, json=body(max_tokens=3, logit_bias={str(nul): 100}), headers=headers)
    assert first["choices"][0]["text"] == "\ufffd" * 3
    assert (again.json["choices"], again.headers["Idempotent-Replayed"]) == (first["choices"], "true")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"echo": True}, "echo", "only False is supported"),
    ({"suffix": "end"}, "suffix", "not supported yet"),
    ({"best_of": 3}, "best_of", "only 1 is supported"),
    ({"prompt": ["a", "b"]}, "prompt", "holds 2 prompts; send one per request"),
    ({"prompt": [[1], [2]]}, "prompt", "send one per request"),
    ({"prompt": []}, "prompt", "a text, or a list of token ids"),
    ({"prompt": [1.5]}, "prompt", "a text, or a list of token ids"),
    ({"prompt": None}, "prompt", "a text, or a list of token ids"),
    ({"prompt": [5, 320]}, "prompt", "token id 320 is outside the vocabulary of 320"),
    ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
    ({"prompt": [10**30]}, "prompt", "outside the vocabulary"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": "a\x00"}, "prompt", "NUL"),
    ({"prompt": "word " * 4000}, "prompt", "context holds 4096"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"messages": []}, "messages", "unknown field"),
    ({"n": 9}, "n", "less than or equal to 8"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, runtime: Runtime, fields: dict[str, Any], param: str, message: str
) -> None:
    response = client.post(PATH, json=body() | fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert runtime.admission.counts()["chats"] == 0


def test_a_cartridge_stands_before_the_text(client: FlaskClient, runtime: Runtime) -> None:
    from memory.cartridges.cartridge import make_cartridge
    from workspace.prefix import prefix_of_tokens

    loaded = runtime.engine.loaded
    cartridge = make_cartridge(loaded, prefix_of_tokens(loaded, list(range(2, 18))), domain="completing")
    name = runtime.cartridges.register(cartridge).id
    answer = client.post(ROUTES[1], json=body(cartridges=[{"id": name}], logprobs_in_fingerprint=True, logprobs=2)).json
    assert answer["usage"]["cartridge_slots"] == 16
    assert answer["olympus"]["cartridges"] == [name]
    assert len(json.loads(answer["system_fingerprint"])["completion_ids"][0]) == 10
    assert answer["choices"][0]["text"] != client.post(PATH, json=body()).json["choices"][0]["text"]


value: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from(sorted(set(CompletionBody.model_fields) - {"stream"})), odd=value)
def test_whatever_is_sent_nothing_breaks(client: FlaskClient, name: str, odd: Any) -> None:
    text = json.dumps({"prompt": "a", "max_tokens": 1} | {name: odd})
    assert client.post(PATH, data=text, content_type="application/json").status_code < 500
