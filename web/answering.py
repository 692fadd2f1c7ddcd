"""How an answer goes out over HTTP, whatever its wire format: whole, or as a stream of events.

A view takes a slot, opens a chat, and passes on what it says; the exchange is in the history before the client is
told that the answer has ended. A client that leaves, or a server that stops, ends the generation within one token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog
from flask import Response, jsonify, request
from flask.typing import ResponseReturnValue

from olympus.admission import Slot
from olympus.chat_run import ChatRun
from olympus.chat_types import ChatFinished, ChatRequest, Delta, TokenInfo
from olympus.errors import NotReady
from web import sse
from web.context import principal, request_id, runtime
from web.errors import ApiError, openai_error, problem_of
from web.openai_wire import Tokens, by_choice

log = structlog.get_logger(__name__)

_TICK_SECONDS = 0.05  # how often a silent generation looks at the client and at the stop event
_BATCH_SECONDS = 0.02  # one event per token freezes user interfaces
_KEEP_ALIVE_SECONDS = 1.0
_STOP_SECONDS = 3.0  # after which a stream ends even if the model is still in a step
_LONGEST_KEY = 255
_CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody reads it but the log


class AnswerWire(Protocol):
    """The objects of one answer, in one dialect."""

    @property
    def closing(self) -> str:
        """What stands at the end of a stream that did not fail."""

    def completion(self, finished: ChatFinished, tokens: Tokens | None) -> dict[str, Any]:
        """The whole answer; ``tokens`` where log-probabilities were asked for."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that open a stream."""

    def told(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Chunks of what was said since the last ones."""

    def ending(self, finished: ChatFinished) -> list[dict[str, Any]]:
        """The chunks that end a stream."""

    def failure(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks that tell of an error after the first byte; ``error`` is OpenAI's error object."""

    def framed(self, chunk: dict[str, Any]) -> str:
        """A chunk as an event."""


class MakeRequest(Protocol):
    """A body as what the chat service takes."""

    def __call__(self, *, actor: str, idempotency_key: str | None) -> ChatRequest:
        """``ChatBody.to_request`` and its like."""


def answer(
    make_request: MakeRequest, make_wire: Callable[[ChatRun], AnswerWire], *, stream: bool | None
) -> ResponseReturnValue:
    """The answer to a request, streamed or not."""
    if runtime().stop_event.is_set():
        raise NotReady("the server is stopping")
    slot = runtime().admission.chat()
    try:
        wanted = make_request(actor=principal().id, idempotency_key=idempotency_key())
        wanted = replace(wanted, retry=_is_retry())
        exchange = Exchange(runtime().chat.open(wanted), slot)
    except BaseException:
        slot.release()
        raise
    wire = make_wire(exchange.run)
    headers = {"Idempotent-Replayed": "true"} if exchange.run.replayed else {}
    if not stream:
        return _whole(exchange, wire, headers)
    response = sse.response(_stream(exchange, wire), headers)
    response.call_on_close(exchange.close)  # a stream that was never begun has no finally
    return response


def idempotency_key() -> str | None:
    """The request's header, if it has one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= _LONGEST_KEY:
        raise ApiError(400, "invalid_value", f"the Idempotency-Key must have 1 to {_LONGEST_KEY} characters")
    return key


def _is_retry() -> bool:
    """What OpenAI's clients say of a request that they send again by themselves."""
    return request.headers.get("X-Stainless-Retry-Count", "0").strip() not in ("", "0")


class Exchange:
    """A chat, its slot, and what may end it early. Made in the request, used after it."""

    def __init__(self, run: ChatRun, slot: Slot):
        self.run = run
        self._slot = slot
        self._watch = sse.ClientWatch(request.environ)
        self._stopping: threading.Event = runtime().stop_event
        self._give_up: float | None = None
        self._path, self._request_id = request.path, request_id()

    def client_gone(self) -> bool:
        """True once nobody waits for the answer."""
        return self._watch.gone()

    def stopped(self) -> bool:
        """Ask for the end when the server stops; True when it did not come in time."""
        if not self._stopping.is_set():
            return False
        if self._give_up is None:
            self._give_up = time.monotonic() + _STOP_SECONDS
            self.run.cancel()
        return time.monotonic() > self._give_up

    def error_object(self, error: Exception) -> dict[str, Any]:
        """OpenAI's error object for what happened after the first byte."""
        return openai_error(problem_of(error, self._path, self._request_id), self._request_id)

    def close(self) -> None:
        """End the chat and give the slot back; harmless when done before."""
        try:
            self.run.close()
        finally:
            self._slot.release()


def _cut_off() -> NotReady:
    return NotReady("the answer was cut off because the server is stopping; what was written is in the history")


def _is_cut_off(finished: ChatFinished) -> bool:
    return any(choice.finish_reason == "cancelled" for choice in finished.choices)


def _whole(exchange: Exchange, wire: AnswerWire, headers: dict[str, str]) -> ResponseReturnValue:
    deltas: list[Delta] = []
    try:
        for event in exchange.run.events(_TICK_SECONDS):
            if isinstance(event, ChatFinished):
                if _is_cut_off(event):
                    raise _cut_off()
                if exchange.client_gone():
                    exchange.run.not_heard(event)
                    return Response(status=_CLIENT_CLOSED_REQUEST)
                wanted = exchange.run.request
                asked = wanted.logprobs and not wanted.exact and not event.replayed
                response = jsonify(wire.completion(event, _tokens(deltas) if asked else None))
                response.headers.update(headers)
                return response
            if event is not None:
                deltas.append(event)
            if exchange.client_gone():
                return Response(status=_CLIENT_CLOSED_REQUEST)
            if exchange.stopped():
                raise _cut_off()
    finally:
        exchange.close()
    raise AssertionError("a chat always ends with ChatFinished or an error")


def _tokens(deltas: list[Delta]) -> dict[int, list[TokenInfo]]:
    """The tokens of each choice."""
    return {of_one[0].index: [token for delta in of_one for token in delta.tokens] for of_one in by_choice(deltas)}


def _stream(exchange: Exchange, wire: AnswerWire) -> Iterator[str]:
    try:
        for chunk in wire.opening(exchange.run.request.n):
            yield wire.framed(chunk)
        yield from _chunks(exchange, wire)
    except Exception as error:
        # The status line is long gone: the error becomes an event, which is what OpenAI's clients look for.
        for chunk in wire.failure(exchange.error_object(error)):
            yield wire.framed(chunk)
    finally:
        exchange.close()


def _chunks(exchange: Exchange, wire: AnswerWire) -> Iterator[str]:
    pending: list[Delta] = []
    written = time.monotonic() - _BATCH_SECONDS  # the first text goes out at once
    for event in exchange.run.events(_TICK_SECONDS):
        if exchange.client_gone():
            if isinstance(event, ChatFinished):
                exchange.run.not_heard(event)
            return
        if isinstance(event, ChatFinished):
            for chunk in wire.told(pending):
                yield wire.framed(chunk)
            yield from _ending(event, wire)
            return
        if exchange.stopped():
            raise _cut_off()
        if event is not None:
            pending.append(event)
        now = time.monotonic()
        if pending and now - written >= _BATCH_SECONDS:
            for chunk in wire.told(pending):
                yield wire.framed(chunk)
            pending, written = [], now
        elif now - written >= _KEEP_ALIVE_SECONDS:
            yield sse.KEEP_ALIVE
            written = now


def _ending(finished: ChatFinished, wire: AnswerWire) -> Iterator[str]:
    if _is_cut_off(finished):
        raise _cut_off()
    for chunk in wire.ending(finished):
        yield wire.framed(chunk)
    yield wire.closing
