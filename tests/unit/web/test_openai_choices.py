"""Several choices of one request (``n``), and biased tokens: shapes, counts, the record, and every early end."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from tests.unit.web.conftest import ask, events

PATH = "/v1/chat/completions"
WARM = {"temperature": 1.0, "seed": 5, "max_tokens": 12}


def _texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_choices_have_indices_their_own_seeds_and_one_count(client: FlaskClient) -> None:
    answer = client.post(PATH, json=ask(n=3, **WARM)).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    alone = [_texts(client.post(PATH, json=ask(**WARM | {"seed": 5 + place})).json)[0] for place in range(3)]
    assert _texts(answer) == alone
    assert len(set(alone)) == 3
    usage = answer["usage"]
    single = client.post(PATH, json=ask(**WARM)).json["usage"]
    assert usage["completion_tokens"] == 36
    assert usage["prompt_tokens"] == single["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 36
    assert openai.types.chat.ChatCompletion.model_validate(answer).choices[2].message.content == alone[2]


def test_without_a_seed_choices_differ(client: FlaskClient) -> None:
    assert len(set(_texts(client.post(PATH, json=ask(n=8, temperature=1.5, max_tokens=12)).json))) > 4


def test_a_stream_of_choices_says_the_same(client: FlaskClient) -> None:
    whole = client.post(PATH, json=ask(n=6, logprobs=True, **WARM)).json
    body = ask(n=6, logprobs=True, stream=True, stream_options={"include_usage": True}, **WARM)
    *chunks, usage = [entry["data"] for entry in events(client.post(PATH, json=body).text)][:-1]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    told: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        told.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    assert sorted(told) == list(range(6))
    for choice in whole["choices"]:
        first, *middle, last = told[choice["index"]]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert "".join(item["delta"]["content"] for item in middle) == choice["message"]["content"]
        numbers = [token for item in middle for token in (item["logprobs"] or {"content": []})["content"]]
        wanted = choice["logprobs"]["content"]
        assert [number["token"] for number in numbers] == [number["token"] for number in wanted]
        # Who shares a pass with whom may differ, and with it the last digit.
        assert [number["logprob"] for number in numbers] == pytest.approx([one["logprob"] for one in wanted], abs=1e-4)
        assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert [chunk["choices"][0]["index"] for chunk in chunks if "olympus" in chunk] == [0]
    assert usage["usage"] == whole["usage"]


def test_one_experience_for_the_first_choice_and_a_retry_has_all(client: FlaskClient, runtime: Runtime) -> None:
    before = runtime.history.count()
    headers = {"Idempotency-Key": "several-choices"}
    first = client.post(PATH, json=ask(n=3, **WARM), headers=headers).json
    assert runtime.history.count() == before + 1
    record = runtime.history.get(first["olympus"]["experience_id"])
    assert record is not None
    assert [record.action, *(noted["text"] for noted in record.meta["choices"])] == _texts(first)
    assert record.meta["completion_tokens"] == 12
    again = client.post(PATH, json=ask(n=3, **WARM), headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.json["choices"], again.json["usage"]) == (first["choices"], first["usage"])
    assert client.post(PATH, json=ask(n=2, **WARM), headers=headers).json["error"]["code"] == "idempotency_key_reused"


def test_a_client_that_leaves_ends_all_choices(client: FlaskClient, runtime: Runtime) -> None:
    response = client.post(PATH, json=ask(n=5, stream=True, max_tokens=3000))
    chunks = response.iter_encoded()
    while b'"index":0,"delta":{"content"' not in next(chunks):
        pass  # until there is text of the first choice, which becomes the experience
    response.close()
    stats = runtime.engine.stats()
    assert (stats.waiting, runtime.admission.counts()["chats"]) == (0, 0)
    newest = runtime.history.page(limit=1)[0]
    assert newest.meta["finish_reason"] == "cancelled"
    assert {noted["finish_reason"] for noted in newest.meta.get("choices", ())} <= {"cancelled"}


def test_an_engine_without_room_for_all_takes_none(client: FlaskClient, runtime: Runtime) -> None:
    engine = runtime.engine
    room = engine._max_active, engine._max_waiting
    engine._max_active, engine._max_waiting = 4, 1
    try:
        refused = client.post(PATH, json=ask(n=8, max_tokens=200))
    finally:
        engine._max_active, engine._max_waiting = room
    assert (refused.status_code, refused.json["error"]["code"]) == (429, "engine_busy")
    assert client.post(PATH, json=ask()).status_code == 200


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_biased_token_is_always_or_never_chosen(client: FlaskClient, runtime: Runtime, temperature: float) -> None:
    plain = client.post(PATH, json=ask(temperature=temperature, seed=1)).json
    tokenizer = runtime.engine.loaded.tokenizer
    always = tokenizer.encode("q")[0]
    forced = client.post(PATH, json=ask(logit_bias={str(always): 100}, temperature=temperature, seed=1)).json
    assert _texts(forced) == ["q" * 8]
    (spoken,) = _texts(plain)
    banned = {str(token): -100 for token in tokenizer.encode(spoken)}
    (other,) = _texts(client.post(PATH, json=ask(logit_bias=banned, temperature=temperature, seed=1)).json)
    assert not {str(token) for token in tokenizer.encode(other)} & set(banned) or other != spoken
    assert (
        client.post(PATH, json=ask(logit_bias={}, temperature=temperature, seed=1)).json["choices"] == plain["choices"]
    )


def test_log_probabilities_are_those_before_the_bias(client: FlaskClient, runtime: Runtime) -> None:
    token = runtime.engine.loaded.tokenizer.encode("q")[0]
    body = ask(logit_bias={str(token): 100}, logprobs=True, top_logprobs=3, max_tokens=1)
    (info,) = client.post(PATH, json=body).json["choices"][0]["logprobs"]["content"]
    plain = client.post(PATH, json=ask(logprobs=True, top_logprobs=3, max_tokens=1)).json["choices"][0]
    assert info["top_logprobs"] == plain["logprobs"]["content"][0]["top_logprobs"]
    assert info["token"] == "q"
