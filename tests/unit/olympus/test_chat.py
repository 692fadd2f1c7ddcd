"""The chat service with a real engine and a real history: what becomes an experience, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memory.history import History
from olympus.chat import ChatService
from olympus.chat_types import (
    ChatFinished,
    ChatRequest,
    Delta,
    GenerationFailed,
    IdempotencyKeyReused,
    ModelNotFound,
    RequestInProgress,
)
from olympus.errors import ModelNotReady
from settings import Settings, load_settings
from storage import migrate
from storage.database import Database
from telemetry.hub import EventHub
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.errors import InvalidSampling, PromptTooLong
from workspace.generation import Finished, FinishReason, Timings, Usage
from workspace.models import load_model

Make = Callable[..., ChatService]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", context_length=2048)
    loaded = load_model(str(folder), cache_dir=folder.parent, dtype="float32", device="cpu")
    engine = Engine(loaded, max_active=4, max_waiting=4, threads=1)
    engine.start()
    yield engine
    assert engine.stop()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield History(database)
    database.close()


@pytest.fixture
def make(engine: Engine, history: History) -> Iterator[Make]:
    made: list[ChatService] = []

    def service(provider: Callable[[], Any] = lambda: engine, **overrides: dict[str, Any]) -> ChatService:
        settings: Settings = load_settings(environ={}, overrides=overrides)
        made.append(ChatService(settings, provider, history, EventHub()))
        return made[-1]

    yield service
    for item in made:
        item.check_invariants()
        assert item._active == 0, "every run was closed"


def request(text: str = "hello", **fields: Any) -> ChatRequest:
    values: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, **fields}
    return ChatRequest(({"role": "system", "content": "be brief"}, {"role": "user", "content": text}), **values)


def answer(service: ChatService, wanted: ChatRequest) -> tuple[list[Delta], ChatFinished]:
    run = service.open(wanted)
    try:
        *deltas, finished = [event for event in run.events(5.0) if event is not None]
    finally:
        run.close()
    assert isinstance(finished, ChatFinished)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == finished.text
    return deltas, finished  # type: ignore[return-value]


def test_an_exchange_is_committed_before_its_end_is_told(make: Make, history: History) -> None:
    run = make().open(request("what is it?", session_id="s1", domain="support"))
    for event in run.events(5.0):
        if isinstance(event, ChatFinished):
            assert event.experience_id is not None
            record = history.get(event.experience_id)
            assert record is not None, "told before it was written"
            assert (record.observation, record.action) == ("what is it?", event.text)
            assert (record.domain, record.session_id, record.source) == ("support", "s1", "chat")
            assert record.messages == [dict(message) for message in run.request.messages]
            assert record.meta["finish_reason"] == "length"
            assert record.meta["completion_tokens"] == event.completion_tokens == 6
            assert record.meta["model"] == "tiny-llama"
        else:
            assert history.count() == 0
    run.close()
    assert history.count() == 1
    assert history.sessions()[0]["title"] == "what is it?"


def test_the_default_domain_is_the_settings(make: Make) -> None:
    _, finished = answer(make(kernels={"default_domain": "home"}), request())
    assert finished.domain == "home"


def test_greedy_answers_are_the_engines(make: Make, engine: Engine) -> None:
    from workspace.sampling import SamplingParams

    wanted = request("the quick brown fox", max_tokens=20)
    _, finished = answer(make(), wanted)
    expected = engine.submit(list(wanted.messages), SamplingParams(max_tokens=20, temperature=0)).result(30)
    assert finished.text == expected.text
    assert finished.prompt_tokens == expected.usage.prompt_tokens


def test_log_probabilities_bring_tokens_as_text_and_bytes(make: Make) -> None:
    deltas, _ = answer(make(), request(logprobs=True, top_logprobs=3))
    tokens = [token for delta in deltas for token in delta.tokens]
    assert len(tokens) == 6
    for token in tokens:
        assert token.logprob <= 0
        assert [item.logprob for item in token.top] == sorted((item.logprob for item in token.top), reverse=True)
        assert token.top[0].logprob == token.logprob, "greedy: the chosen token is the most probable"
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_an_answer_that_is_cut_off_is_recorded_as_cancelled(make: Make, history: History) -> None:
    run = make().open(request(max_tokens=1500))
    said = ""
    for event in run.events(5.0):
        assert isinstance(event, Delta)
        said += event.text
        if len(said) > 10:
            break
    run.close()
    run.close()
    (record,) = history.page()
    assert record.meta["finish_reason"] == "cancelled"
    assert record.action.startswith(said)
    assert record.meta["completion_tokens"] < 1500


def test_cancelling_ends_the_events(make: Make) -> None:
    run = make().open(request(max_tokens=1500))
    for seen, event in enumerate(run.events(5.0)):
        if seen == 3:
            run.cancel()
        if isinstance(event, ChatFinished):
            assert event.finish_reason == "cancelled"
            assert event.completion_tokens < 100
    run.close()


def test_a_request_that_takes_too_long_ends_with_what_it_has(make: Make, history: History) -> None:
    service = make(engine={"request_timeout_seconds": 0.05})
    _, finished = answer(service, request(max_tokens=1500))
    assert finished.finish_reason == "timeout"
    assert finished.completion_tokens < 1500
    assert history.page()[0].meta["finish_reason"] == "timeout"


def test_a_retry_gets_the_recorded_answer(make: Make, history: History) -> None:
    service = make()
    wanted = request(idempotency_key="k1", temperature=1.0)
    _, first = answer(service, wanted)
    _, again = answer(service, wanted)
    assert again.replayed
    assert not first.replayed
    assert (again.text, again.experience_id) == (first.text, first.experience_id)
    assert (again.prompt_tokens, again.completion_tokens) == (first.prompt_tokens, first.completion_tokens)
    assert history.count() == 1
    _, other = answer(service, request(idempotency_key="k1", temperature=1.0, actor="somebody else"))
    assert not other.replayed, "keys of different principals are different keys"


def test_a_key_with_another_request_is_refused(make: Make) -> None:
    service = make()
    answer(service, request("one", idempotency_key="k1"))
    with pytest.raises(IdempotencyKeyReused, match="use a new key"):
        service.open(request("two", idempotency_key="k1"))


def test_a_key_that_is_being_answered_is_refused_until_then(make: Make) -> None:
    service = make()
    run = service.open(request(idempotency_key="k1"))
    with pytest.raises(RequestInProgress) as caught:
        service.open(request(idempotency_key="k1"))
    assert (caught.value.status, caught.value.retry_after) == (409, 1.0)
    list(run.events(5.0))
    run.close()
    _, again = answer(service, request(idempotency_key="k1"))
    assert again.replayed


def test_a_retry_of_a_cut_off_answer_is_answered_anew_and_takes_its_place(make: Make, history: History) -> None:
    service = make()
    wanted = request(max_tokens=600, idempotency_key="k1")
    run = service.open(wanted)
    assert next(run.events(5.0)) is not None
    run.close()
    (oldest,) = history.page()
    assert oldest.meta["finish_reason"] == "cancelled"
    _, whole = answer(service, wanted)
    assert not whole.replayed
    (newest,) = history.page()
    assert newest.meta["finish_reason"] in ("stop", "length")
    assert len(newest.action) > len(oldest.action)


def test_a_forgotten_answer_is_not_given_again(make: Make, history: History) -> None:
    service = make()
    _, first = answer(service, request(idempotency_key="k1"))
    history.delete(experience_id=first.experience_id)
    _, again = answer(service, request(idempotency_key="k1"))
    assert not again.replayed


def test_only_the_loaded_model_is_known_by_name_and_by_id(make: Make, engine: Engine) -> None:
    service = make()
    card = service.model()
    assert card.id == "tiny-llama", "a local path shows its last part only"
    assert card.context_length == 2048
    for name in (None, card.id, engine.loaded.name):
        answer(service, request(model=name))
    with pytest.raises(ModelNotFound, match="'gpt-4' does not exist here; the one available is 'tiny-llama'"):
        service.open(request(model="gpt-4"))


def test_limits_and_defaults_of_the_settings(make: Make) -> None:
    service = make(engine={"max_tokens": 10, "default_max_tokens": 5, "temperature": 0.0})
    _, finished = answer(service, request(max_tokens=None, temperature=None))
    assert finished.completion_tokens == 5
    with pytest.raises(InvalidSampling, match="at most 10") as caught:
        service.open(request(max_tokens=11))
    assert caught.value.param == "max_tokens"
    with pytest.raises(PromptTooLong):
        service.open(request("word " * 3000))


def test_developer_is_system_for_templates_that_do_not_know_it(make: Make) -> None:
    system = ({"role": "system", "content": "x"}, {"role": "user", "content": "hello"})
    developer = ({"role": "developer", "content": "x"}, {"role": "user", "content": "hello"})
    texts = [
        answer(make(), ChatRequest(messages, max_tokens=12, temperature=0.0))[1].text
        for messages in (system, developer)
    ]
    assert texts[0] == texts[1]


def test_while_there_is_no_model_nothing_is_opened(make: Make) -> None:
    def provider() -> Engine:
        raise ModelNotReady("still loading")

    with pytest.raises(ModelNotReady, match="still loading"):
        make(provider).open(request())


class _Wordless:
    """A generation that ends for ``reason`` before its first token."""

    def __init__(self, reason: FinishReason):
        self.reason = reason

    def stream(self, timeout: float) -> Iterator[Finished]:
        yield self.result()

    def result(self, timeout: float | None = None) -> Finished:
        timings = Timings(0.0, None, 0.0)
        return Finished(self.reason, Usage(3, 0), "", (), timings, error="RuntimeError: secret detail")

    def cancel(self) -> None:
        pass


def test_nothing_is_recorded_when_nothing_was_said(make: Make, engine: Engine, history: History) -> None:
    silent = SimpleNamespace(loaded=engine.loaded, submit=lambda *_, **__: _Wordless("cancelled"))
    run = make(lambda: silent).open(request())
    (finished,) = run.events()
    assert isinstance(finished, ChatFinished)
    assert (finished.finish_reason, finished.experience_id) == ("cancelled", None)
    run.close()
    make(lambda: silent).open(request()).close()
    assert history.count() == 0


def test_a_failed_generation_is_an_error_without_details(make: Make, engine: Engine, history: History) -> None:
    broken = SimpleNamespace(loaded=engine.loaded, submit=lambda *_, **__: _Wordless("error"))
    run = make(lambda: broken).open(request())
    with pytest.raises(GenerationFailed) as caught:
        list(run.events())
    run.close()
    assert "secret" not in str(caught.value)
    assert history.count() == 0


def test_many_at_once_become_one_experience_each(make: Make, history: History) -> None:
    service = make()
    finished: list[ChatFinished] = []
    lock = threading.Lock()

    def chat(number: int) -> None:
        for part in range(3):
            _, told = answer(service, request(f"question {number}.{part}"))
            with lock:
                finished.append(told)

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == len({told.experience_id for told in finished}) == history.count() == 18


def test_the_hub_hears_of_each_chat(engine: Engine, history: History) -> None:
    hub = EventHub()
    service = ChatService(Settings(), lambda: engine, history, hub)
    with hub.subscribe(["chat"]) as subscription:
        run = service.open(request())
        (begun,) = subscription.get(1.0)
        assert begun.data == {"active": 1, "model": "tiny-llama"}
        list(run.events(5.0))
        (ended,) = subscription.get(1.0)
        assert ended.data["completion_tokens"] == 6
        run.close()
