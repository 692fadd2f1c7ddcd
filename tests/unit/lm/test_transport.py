"""Retries, refusals, and what an address may be."""

from __future__ import annotations

import email.utils
import threading
import time

import pytest

from lm.errors import InvalidResponse, InvalidSpec, RequestRefused, Unavailable
from lm.transport import Patience, Transport, _retry_after
from tests.support.json_server import Answer, Asked, json_server
from tests.support.server import free_port

QUICK = Patience(timeout=5, tries=3, first_pause=0.01, longest_pause=0.05)


def _answers(*told: Answer) -> tuple[list[Asked], object]:
    asked: list[Asked] = []

    def answer(request: Asked) -> Answer:
        asked.append(request)
        return told[min(len(asked), len(told)) - 1]

    return asked, answer


@pytest.mark.parametrize("failure", [Answer({}, 429), Answer({}, 503), Answer("", 500), Answer("", 0)])
def test_what_may_pass_is_tried_again(failure: Answer) -> None:
    asked, answer = _answers(failure, failure, Answer({"ok": 1}))
    with json_server(answer) as url, Transport(url, patience=QUICK) as transport:
        assert transport.post("/x", {"a": 1}) == {"ok": 1}
    assert [item.body for item in asked] == [{"a": 1}] * 3


def test_tries_are_bounded_and_the_last_failure_is_told() -> None:
    asked, answer = _answers(Answer({"error": {"message": "too busy"}}, 503))
    with (
        json_server(answer) as url,
        Transport(url, patience=QUICK) as transport,
        pytest.raises(Unavailable, match="too busy") as caught,
    ):
        transport.get("/x")
    assert (len(asked), caught.value.tries) == (3, 3)


def test_nobody_there() -> None:
    with (
        Transport(f"http://127.0.0.1:{free_port()}", patience=QUICK) as transport,
        pytest.raises(Unavailable, match="ConnectError"),
    ):
        transport.get("/x")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "no such model"}}, "no such model"),
        ({"error": "bad"}, "bad"),
        ({"detail": [{"loc": ["x"]}]}, '"loc"'),
        ("plain words", "plain words"),
        ("", "no explanation"),
    ],
)
def test_a_refusal_is_final_and_in_the_servers_words(body: object, words: str) -> None:
    asked, answer = _answers(Answer(body, 422))
    with (
        json_server(answer) as url,
        Transport(url, patience=QUICK) as transport,
        pytest.raises(RequestRefused, match=words) as caught,
    ):
        transport.post("/x", {})
    assert (len(asked), caught.value.status) == (1, 422)


def test_retry_after_counts_but_not_for_longer_than_the_longest_pause() -> None:
    _, answer = _answers(Answer({}, 429, {"Retry-After": "0.2"}), Answer({"ok": 1}))
    patience = Patience(tries=2, first_pause=0.001, longest_pause=5)
    with json_server(answer) as url, Transport(url, patience=patience) as transport:
        started = time.perf_counter()
        transport.get("/x")
        assert time.perf_counter() - started > 0.19
    _, answer = _answers(Answer({}, 429, {"Retry-After": "3600"}), Answer({"ok": 1}))
    with json_server(answer) as url, Transport(url, patience=QUICK) as transport:
        assert transport.get("/x") == {"ok": 1}


def test_retry_after_may_be_a_date_and_nonsense_is_ignored() -> None:
    found = _retry_after(email.utils.formatdate(time.time() + 30))
    assert found is not None
    assert 25 < found < 31
    assert _retry_after(email.utils.formatdate(time.time() - 30)) == 0
    assert _retry_after("soon") is None
    assert _retry_after("nan") is None


def test_stop_ends_the_waiting() -> None:
    _, answer = _answers(Answer({}, 503))
    stop = threading.Event()
    stop.set()
    patience = Patience(tries=5, first_pause=60, longest_pause=60)
    with (
        json_server(answer) as url,
        Transport(url, patience=patience, stop=stop) as transport,
        pytest.raises(Unavailable, match="stopped"),
    ):
        transport.get("/x")


@pytest.mark.parametrize("body", ["<html>", "[1]", "3"])
def test_an_answer_that_is_no_object_is_not_one_of_ours(body: str) -> None:
    _, answer = _answers(Answer(body))
    with json_server(answer) as url, Transport(url, patience=QUICK) as transport, pytest.raises(InvalidResponse):
        transport.get("/x")


def test_redirects_are_not_followed_with_the_key() -> None:
    asked, answer = _answers(Answer({}, 302, {"Location": "/elsewhere"}), Answer({"stolen": 1}))
    with (
        json_server(answer) as url,
        Transport(url, api_key="secret", patience=QUICK) as transport,
        pytest.raises(RequestRefused) as caught,
    ):
        transport.get("/x")
    assert "secret" not in str(caught.value)
    assert [item.headers["Authorization"] for item in asked] == ["Bearer secret"]


@pytest.mark.parametrize("address", ["", "localhost:80", "ftp://a", "http://", "http://a/?q=1", "http://me:pw@host"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidSpec):
        Transport(address)


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"timeout": 0}, {"longest_pause": float("nan")}])
def test_patience_that_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidSpec):
        Patience(**wrong)
