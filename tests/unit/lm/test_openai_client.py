"""The OpenAI client: what it sends, and which token strings it believes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lm.errors import AmbiguousTokens, InvalidCall, InvalidResponse
from lm.openai_client import WRITTEN_IDS, OpenAIClient
from lm.token_strings import ABSENT
from lm.types import CartridgeRef, LanguageModel
from tests.support.json_server import Answer, Asked, json_server

MESSAGES = [{"role": "user", "content": "Which tag?"}]
PIECES = ["a", "b", " b", "\ufffd", "a", "", "c"]  # by id: two ids look like "a", one is part of a character


class PiecesTokenizer:
    """Decodes ids to ``PIECES``: all that the client needs of a tokenizer."""

    def __len__(self) -> int:
        return len(PIECES)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(PIECES[number] for number in ids)


def _entry(text: str, *top: tuple[str, float]) -> dict[str, Any]:
    candidates = [{"token": item, "logprob": value, "bytes": []} for item, value in top]
    return {"token": text, "logprob": -0.1, "bytes": [], "top_logprobs": candidates}


def _completion(content: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    logprobs = None if content is None else {"content": content}
    message = {"role": "assistant", "content": "b c"}
    return {
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    } | changes


@contextmanager
def _client(body: dict[str, Any], **options: Any) -> Iterator[tuple[OpenAIClient, list[Asked]]]:
    asked: list[Asked] = []

    def answer(request: Asked) -> Answer:
        asked.append(request)
        return Answer(body)

    with json_server(answer) as url, OpenAIClient(f"{url}/v1/", "tiny", **options) as client:
        yield client, asked


def test_call_sends_what_every_server_knows() -> None:
    with _client(_completion(), api_key="sk-1", extra={"domain": "bank"}) as (client, asked):
        assert isinstance(client, LanguageModel)
        reply = client.call(MESSAGES, max_tokens=7, temperature=0.5, seed=3, stop=["\n"])
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == ("b c", 4, 2, "stop")
    assert (reply.cartridge_slots, reply.ttft_seconds) == (0, None)
    assert reply.seconds > 0
    assert (asked[0].path, asked[0].headers["Authorization"]) == ("/v1/chat/completions", "Bearer sk-1")
    assert asked[0].body == {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["\n"],
        "domain": "bank",
    }


def test_cartridges_go_only_to_a_server_that_is_said_to_take_them() -> None:
    told = _completion(usage={"prompt_tokens": 4, "completion_tokens": 2, "cartridge_slots": 64})
    with _client(told) as (client, asked), pytest.raises(InvalidCall, match="toka:"):
        client.call(MESSAGES, cartridges=[CartridgeRef("a_v0001")])
    assert not asked
    with _client(told, accepts_cartridges=True) as (client, asked):
        assert client.call(MESSAGES, cartridges=[CartridgeRef("a_v0001")]).cartridge_slots == 64
    assert asked[0].body["cartridges"] == [{"id": "a_v0001", "source": "local", "force_redownload": False}]


def test_trace_takes_what_is_certain_and_drops_candidates_that_are_not() -> None:
    content = [
        _entry("b", ("b", -0.1), ("a", -2.0), (" b", -3.0)),  # "a" could be 0 or 4
        _entry("c", ("\ufffd", -0.4), ("c", -0.5), ("zz", -4.0)),
    ]
    with _client(_completion(content), tokenizer=PiecesTokenizer()) as (client, asked):
        reply, trace = client.call_with_trace(MESSAGES, top_logprobs=3)
    assert (asked[0].body["logprobs"], asked[0].body["top_logprobs"], asked[0].body["temperature"]) == (True, 3, 0.0)
    assert reply.text == "b c"
    assert trace.token_ids == (1, 6)
    assert trace.topk_token_ids.tolist() == [[1, 2, 2], [6, 6, 6]]
    expected = [-0.1, -3.0, ABSENT, -0.5, ABSENT, ABSENT]
    assert trace.topk_logprobs.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chosen", ["a", "\ufffd", "zz", ""])
def test_a_chosen_token_that_is_not_certain_is_refused(chosen: str) -> None:
    with (
        _client(_completion([_entry(chosen, ("b", -0.1))]), tokenizer=PiecesTokenizer()) as (client, _),
        pytest.raises(AmbiguousTokens, match="which id"),
    ):
        client.call_with_trace(MESSAGES)


def test_ids_that_the_server_writes_out_need_no_tokenizer() -> None:
    content = [_entry("token_id:4", ("token_id:4", -0.1), ("token_id:0", -2.0), ("token_id:x", -2.5))]
    with _client(_completion(content), extra={WRITTEN_IDS: True}) as (client, asked):
        _, trace = client.call_with_trace(MESSAGES, top_logprobs=2)
    assert asked[0].body[WRITTEN_IDS] is True
    assert trace.topk_token_ids.tolist() == [[4, 0]]


def test_trace_without_a_tokenizer_says_what_is_missing() -> None:
    with _client(_completion([])) as (client, asked), pytest.raises(InvalidCall, match="tokenizer"):
        client.call_with_trace(MESSAGES)
    assert not asked


@pytest.mark.parametrize(
    "wrong",
    [
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": 3}}]},
        {"usage": None},
        {"usage": {"prompt_tokens": 4}},
        {"usage": {"prompt_tokens": -4, "completion_tokens": True}},
    ],
)
def test_an_answer_of_another_shape_is_said_to_be_one(wrong: dict[str, Any]) -> None:
    with _client(_completion(**wrong)) as (client, _), pytest.raises(InvalidResponse):
        client.call(MESSAGES)


@pytest.mark.parametrize(
    "content",
    [None, [], [3], [{"token": "b"}], [_entry("b") | {"top_logprobs": None}], [{"token": "b", "logprob": "x"}]],
)
def test_log_probabilities_of_another_shape(content: Any) -> None:
    with _client(_completion(content), tokenizer=PiecesTokenizer()) as (client, _), pytest.raises(InvalidResponse):
        client.call_with_trace(MESSAGES)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": 3.0}])
def test_limits(wrong: dict[str, Any]) -> None:
    with _client(_completion()) as (client, asked), pytest.raises(InvalidCall):
        client.call(MESSAGES, **wrong)
    assert not asked
