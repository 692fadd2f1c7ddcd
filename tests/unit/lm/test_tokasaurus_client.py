"""The Tokasaurus client against a strict server: routes, fields, the fingerprint."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from lm.errors import InvalidCall, InvalidResponse, InvalidTrace, RequestRefused
from lm.fingerprint import pack, unpack
from lm.tokasaurus_client import CARTRIDGE, TokasaurusClient
from lm.types import CartridgeRef, LanguageModel, Trace
from tests.support.fake_tokasaurus import FakeTokasaurus
from tests.support.json_server import json_server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which tag?"}]
RULES = CartridgeRef("rules_v0001")


def test_call_sends_nothing_that_a_strict_server_refuses() -> None:
    fake = FakeTokasaurus()
    with json_server(fake) as url, TokasaurusClient(url) as client:
        assert isinstance(client, LanguageModel)
        assert client.ping()
        reply = client.call(MESSAGES, seed=3, stop=["\n"], cartridges=[RULES])
        assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("an answer", 11, 3)
        assert client.call(MESSAGES).text == "an answer"
    sent = fake.asked[-2]
    assert sent.path == CARTRIDGE[0]
    assert sent.body["cartridges"] == [{"id": "rules_v0001", "source": "local", "force_redownload": False}]
    assert sent.body["model"] == "tiny"
    assert fake.asked[-1].path == "/v1/chat/completions"
    assert "cartridges" not in fake.asked[-1].body


def test_falls_back_to_the_custom_route_once_and_remembers_it() -> None:
    fake = FakeTokasaurus(routes=["custom"])
    with json_server(fake) as url, TokasaurusClient(url, "tiny") as client:
        for _ in range(2):
            client.call(MESSAGES, cartridges=[RULES])
    assert [item.path for item in fake.asked] == [CARTRIDGE[0], CARTRIDGE[1], CARTRIDGE[1]]


def test_a_server_without_cartridge_routes_is_a_clear_refusal() -> None:
    with (
        json_server(FakeTokasaurus(routes=[])) as url,
        TokasaurusClient(url, "tiny") as client,
        pytest.raises(RequestRefused, match="Not Found") as caught,
    ):
        client.call(MESSAGES, cartridges=[RULES])
    assert caught.value.status == 404


def test_an_unknown_cartridge_is_refused_in_the_servers_words() -> None:
    fake = FakeTokasaurus()
    with (
        json_server(fake) as url,
        TokasaurusClient(url, "tiny") as client,
        pytest.raises(RequestRefused, match="nothing_here does not exist") as caught,
    ):
        client.call(MESSAGES, cartridges=[CartridgeRef("nothing_here")])
    assert caught.value.status == 400
    assert len(fake.asked) == 1, "a refusal is final, and the route is there"


def test_trace_is_the_fingerprint_row_for_row() -> None:
    fake = FakeTokasaurus(ids=[40, 41, 2])
    with json_server(fake) as url, TokasaurusClient(url, "tiny") as client:
        reply, trace = client.call_with_trace(MESSAGES, top_logprobs=4, cartridges=[RULES])
    body = fake.asked[-1].body
    assert (body["temperature"], body["logprobs"], body["logprobs_in_fingerprint"]) == (0.0, True, True)
    assert reply.completion_tokens == len(trace.token_ids) == 3
    assert trace.token_ids == (40, 41, 2)
    assert trace.topk_token_ids.tolist() == [[40, 41, 42, 43], [41, 42, 43, 44], [2, 3, 4, 5]]
    assert trace.topk_logprobs.tolist() == [[-0.5, -1.5, -2.5, -3.5]] * 3


def test_a_server_without_topk_says_so() -> None:
    with (
        json_server(FakeTokasaurus(max_topk_logprobs=None)) as url,
        TokasaurusClient(url, "tiny") as client,
        pytest.raises(RequestRefused, match="max_topk_logprobs"),
    ):
        client.call_with_trace(MESSAGES)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "user"},
        {"role": "robot", "content": "a"},
        {"role": "user", "content": "a", "name": "x"},
    ],
)
def test_messages_that_the_server_would_refuse_are_not_sent(message: dict[str, Any]) -> None:
    fake = FakeTokasaurus()
    with json_server(fake) as url, TokasaurusClient(url, "tiny") as client, pytest.raises(InvalidCall):
        client.call([message])
    assert not fake.asked


# The fingerprint.


def _trace() -> Trace:
    ids = np.array([[3, 1], [7, 0], [2, 9]], np.int32)
    return Trace((3, 7, 2), ids, np.array([[-0.1, -2.5], [-0.7, -0.9], [0.0, -30.0]], np.float32))


def _packed(**changes: Any) -> str:
    found = json.loads(pack([_trace()], [[-0.1, -0.7, 0.0]]))
    return json.dumps(found | changes)


def test_pack_and_unpack_are_inverse() -> None:
    found = unpack(_packed(), 2)
    assert found.token_ids == _trace().token_ids
    assert np.array_equal(found.topk_token_ids, _trace().topk_token_ids)
    assert np.array_equal(found.topk_logprobs, _trace().topk_logprobs)
    assert unpack(_packed(packed_chosen_logprobs=None), 2).token_ids == (3, 7, 2)


def _floats(*values: float) -> list[str]:
    return [base64.b64encode(np.array(values, "<f4").tobytes()).decode()]


@pytest.mark.parametrize(
    "fingerprint",
    [
        None,
        "fp_abc",
        "[]",
        _packed(more=1),
        _packed(completion_ids=[[3, 7, 2], [3]]),
        _packed(completion_ids=[[3, 7]]),
        _packed(completion_ids=[[3, -7, 2]]),
        _packed(completion_ids=[[3, True, 2]]),
        _packed(packed_topk_indices=None),
        _packed(packed_topk_indices=["%%%"]),
        _packed(packed_topk_logprobs=_floats(-1.0)),
        _packed(packed_chosen_logprobs=_floats(-1.0)),
    ],
)
def test_a_fingerprint_that_is_almost_right_is_refused(fingerprint: object) -> None:
    with pytest.raises(InvalidResponse):
        unpack(fingerprint, 2)


@pytest.mark.parametrize("value", [float("nan"), 1.5])
def test_log_probabilities_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(InvalidTrace):
        unpack(_packed(packed_topk_logprobs=_floats(value, -1, -1, -1, -1, -1)), 2)
