"""A client that left and asks again by itself, as OpenAI's do: one question, one experience."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from olympus.chat_retries import UnheardAnswers
from olympus.chat_types import ChatRequest
from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, ask
from web import sse
from web.app import create_app

PATH = "/v1/chat/completions"
RETRY = {"X-Stainless-Retry-Count": "1"}


@pytest.fixture
def alone(make_runtime: MakeRuntime) -> tuple[FlaskClient, Runtime]:
    """A server whose history nobody else writes."""
    runtime = make_runtime(model=True)
    return create_app(runtime=runtime).test_client(), runtime


def rows(runtime: Runtime) -> list[Any]:
    return runtime.history.page(limit=200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_that_nobody_heard_is_given_again(
    alone: tuple[FlaskClient, Runtime], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    client, runtime = alone
    body = ask("sample", temperature=1.0)
    with monkeypatch.context() as patched:  # gone at the moment when the answer is in the history
        patched.setattr(sse.ClientWatch, "gone", lambda _: bool(rows(runtime)))
        lost = client.post(PATH, json=body | {"stream": stream})
        assert '"finish_reason":"' not in lost.text
    (row,) = rows(runtime)
    again = client.post(PATH, json=body | {"stream": stream}, headers=RETRY)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.status_code == 200
    assert rows(runtime) == [row]
    if not stream:
        assert again.json["choices"][0]["message"]["content"] == row.action
    assert "Idempotent-Replayed" not in client.post(PATH, json=body, headers=RETRY).headers, "given once"
    assert len(rows(runtime)) == 2


def test_what_was_cut_off_makes_room_for_the_answer_of_the_retry(
    alone: tuple[FlaskClient, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, runtime = alone
    for headers in ({}, {"Idempotency-Key": "cut"}):
        before = len(rows(runtime))
        said = iter([False, True])
        with monkeypatch.context() as patched:
            patched.setattr(sse.ClientWatch, "gone", lambda _, said=said: next(said, True))
            assert client.post(PATH, json=ask("cut", max_tokens=200), headers=headers).status_code == 499
        assert rows(runtime)[0].meta["finish_reason"] == "cancelled"
        whole = client.post(PATH, json=ask("cut", max_tokens=200), headers=headers | RETRY)
        assert "Idempotent-Replayed" not in whole.headers
        kept = rows(runtime)
        assert len(kept) == before + 1
        assert (kept[0].id, kept[0].meta["finish_reason"]) == (whole.json["olympus"]["experience_id"], "length")


def test_equal_requests_that_are_no_retries_stay_apart(
    alone: tuple[FlaskClient, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, runtime = alone
    with monkeypatch.context() as patched:
        patched.setattr(sse.ClientWatch, "gone", lambda _: bool(rows(runtime)))
        client.post(PATH, json=ask("two samples"))
    for headers in ({}, {"X-Stainless-Retry-Count": "0"}):
        assert "Idempotent-Replayed" not in client.post(PATH, json=ask("two samples"), headers=headers).headers
    assert "Idempotent-Replayed" not in client.post(PATH, json=ask("another"), headers=RETRY).headers
    assert len(rows(runtime)) == 4


def test_a_response_keeps_its_id_when_it_is_given_again(
    alone: tuple[FlaskClient, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, runtime = alone
    body = {"input": "hi", "max_output_tokens": 4}
    with monkeypatch.context() as patched:
        patched.setattr(sse.ClientWatch, "gone", lambda _: bool(rows(runtime)))
        client.post("/v1/responses", json=body)
    again = client.post("/v1/responses", json=body, headers=RETRY)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert client.get(f"/v1/responses/{again.json['id']}").json["output"] == again.json["output"]
    assert len(rows(runtime)) == 1


def test_they_are_remembered_for_a_while_and_for_their_actor() -> None:
    now = [0.0]
    answers = UnheardAnswers(lambda: now[0])
    request = ChatRequest(messages=({"role": "user", "content": "hi"},), retry=True)
    answers.note(request, None, whole=True)
    assert answers.take(request) is None
    answers.note(request, 7, whole=True)
    assert answers.take(ChatRequest(messages=request.messages, retry=True, actor="somebody else")) is None
    assert answers.take(ChatRequest(messages=request.messages)) is None, "not a retry"
    found = answers.take(request)
    assert found is not None
    assert (found.experience_id, found.whole) == (7, True)
    answers.note(request, 8, whole=True)
    now[0] = 601
    assert answers.take(request) is None
    for number in range(1100):
        answers.note(ChatRequest(messages=({"role": "user", "content": str(number)},)), number, whole=False)
        answers.check_invariants()
