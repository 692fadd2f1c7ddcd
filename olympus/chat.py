"""The chat service: from a conversation to an answer that has become an experience.

``open`` checks the request against the loaded model and queues it; ``ChatRun.events`` hands out the text as it is
written and, last, ``ChatFinished``: by then the exchange is committed to the history, so what a client saw end is
never lost. An answer that was cut off is recorded too, marked as cancelled, and nothing learns from it.

An ``Idempotency-Key`` makes a retry harmless: the recorded answer is given again instead of a second one.
Knows the engine and the history; HTTP and its wire formats are in ``web``. Routing by kernels comes later.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from memory.history import History, NewExperience, Record
from olympus.chat_types import (
    ChatFinished,
    ChatRequest,
    Delta,
    FinishReason,
    GenerationFailed,
    IdempotencyKeyReused,
    ModelCard,
    ModelNotFound,
    RequestInProgress,
    TokenInfo,
)
from settings import Settings
from telemetry.hub import EventHub
from workspace.channels import ToolCall, ToolCallDelta
from workspace.errors import InvalidSampling

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.engine import Engine
    from workspace.generation import Finished, Generation, TokenChunk
    from workspace.sampling import SamplingParams

log = structlog.get_logger(__name__)

_CANCEL_WAIT_SECONDS = 5.0  # a step of the model, or a chunk of a prompt


class ChatService:
    """Opens chats. One per process; safe to use from all threads."""

    def __init__(
        self, settings: Settings, engine_provider: Callable[[], Engine], history: History, hub: EventHub
    ) -> None:
        self._engine_settings = settings.engine
        self._default_domain = settings.kernels.default_domain
        self._log_prompts = settings.telemetry.log_prompts
        self._engine_provider = engine_provider
        self._history = history
        self._hub = hub
        self._lock = threading.Lock()
        self._active = 0
        self._keys_in_use: set[str] = set()

    def model(self) -> ModelCard:
        """The loaded model. Raises ``ModelNotReady``."""
        return _card(self._engine_provider())

    def open(self, request: ChatRequest) -> ChatRun:
        """Queue a request, or find the recorded answer of its first try. ``close()`` what this returns.

        Raises ``ModelNotReady``, ``ModelNotFound``, ``IdempotencyKeyReused``, ``RequestInProgress``, and what
        ``workspace.Engine.submit`` raises.
        """
        engine = self._engine_provider()
        card = _card(engine)
        if request.model is not None and not card.answers_to(request.model):
            raise ModelNotFound(f"the model {request.model!r} does not exist here; the one available is {card.id!r}")
        key = None if request.idempotency_key is None else _request_id(request)
        self._enter(key)
        try:
            replay = None if key is None else self._recorded(key, request)
            generation = None if replay is not None else self._submit(engine, request)
        except BaseException:
            self._leave(key)
            raise
        return ChatRun(self, request, card, engine, generation, replay, key)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the bookkeeping contradicts itself."""
        with self._lock:
            assert self._active >= len(self._keys_in_use)

    def _submit(self, engine: Engine, request: ChatRequest) -> Generation:
        template = str(engine.loaded.tokenizer.chat_template)
        messages = [_for_template(message, template) for message in request.messages]
        return engine.submit(
            messages,
            self._sampling(request),
            tools=request.tools or None,
            reasoning_effort=request.reasoning_effort,
        )

    def _sampling(self, request: ChatRequest) -> SamplingParams:
        from workspace.sampling import SamplingParams

        defaults = self._engine_settings
        wanted = request.max_tokens
        if wanted is not None and wanted > defaults.max_tokens:
            raise InvalidSampling("max_tokens", f"at most {defaults.max_tokens} on this server, got {wanted}")
        named = ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        given = {name: getattr(request, name) for name in named if getattr(request, name) is not None}
        return SamplingParams(
            max_tokens=min(defaults.default_max_tokens, defaults.max_tokens) if wanted is None else wanted,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stop,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
            **given,
        )

    def _recorded(self, key: str, request: ChatRequest) -> Record | None:
        record = self._history.find_request(key)
        if record is None or record.deleted:  # a forgotten answer is not given again
            return None
        if record.meta.get("request_sha256") != request.fingerprint():
            raise IdempotencyKeyReused("this Idempotency-Key came with a different request; use a new key for each one")
        return record

    def _enter(self, key: str | None) -> None:
        with self._lock:
            if key is not None and key in self._keys_in_use:
                raise RequestInProgress("a request with this Idempotency-Key is being answered; retry in a moment")
            if key is not None:
                self._keys_in_use.add(key)
            self._active += 1

    def _leave(self, key: str | None) -> None:
        with self._lock:
            self._active -= 1
            self._keys_in_use.discard(key or "")

    def _commit(self, run: ChatRun, finished: ChatFinished) -> int | None:
        """Write the exchange; returns its id, or None when there is nothing to remember."""
        request, cancelled = run.request, finished.finish_reason == "cancelled"
        observation = _observation(request.messages)
        action = _storable(finished.text)
        if (cancelled and not action) or not (observation or action):
            return None
        experience = NewExperience(
            observation,
            action,
            domain=finished.domain,
            source="chat",
            session_id=request.session_id,
            messages=[dict(message) for message in request.messages],
            meta=_meta(run, finished),
            # A retry of what was cut off shall be answered anew, so only a whole answer claims the key.
            request_id=None if cancelled else run.key,
        )
        if self._log_prompts:
            log.info("chat", observation=observation, action=action)
        return self._history.append([experience])[0].id

    def _announce(self, card: ModelCard, finished: ChatFinished | None) -> None:
        with self._lock:
            data: dict[str, Any] = {"active": self._active, "model": card.id}
        if finished is not None:
            seconds = finished.timings.get("decode_s")
            data["completion_tokens"] = finished.completion_tokens
            data["tokens_per_second"] = round((finished.completion_tokens - 1) / seconds, 2) if seconds else None
        self._hub.publish("chat", data, key="chat")


class ChatRun:
    """One chat being answered. Read ``events`` in one thread and always ``close()`` at the end."""

    def __init__(
        self,
        service: ChatService,
        request: ChatRequest,
        card: ModelCard,
        engine: Engine,
        generation: Generation | None,
        replay: Record | None,
        key: str | None,
    ) -> None:
        self.request = request
        self.model = card
        self.domain = request.domain or service._default_domain
        self.key = key
        self.replayed = replay is not None
        self._service = service
        self._tokenizer = engine.loaded.tokenizer
        self._generation = generation
        self._replay = replay
        self._deadline = time.monotonic() + service._engine_settings.request_timeout_seconds
        self._timed_out = False
        self._ended = False
        self._closed = False
        service._announce(card, None)

    def events(self, timeout: float = 1.0) -> Iterator[Delta | ChatFinished | None]:
        """Yield text as it comes and end after ``ChatFinished``; None after ``timeout`` seconds without text.

        Raises ``GenerationFailed``, and what the history raises when the exchange cannot be stored.
        """
        from workspace.generation import Finished

        if self._generation is None:
            yield from self._repeat()
            return
        for event in self._generation.stream(timeout):
            if not self._timed_out and time.monotonic() > self._deadline:
                self._timed_out = True
                self._generation.cancel()
            if event is None:
                yield None
            elif isinstance(event, Finished):
                yield self._finish(event)
            else:
                yield self._delta(event)  # None for a token that is no text

    def cancel(self) -> None:
        """Ask for the end; ``events`` then ends with reason "cancelled" within one token."""
        if self._generation is not None:
            self._generation.cancel()

    def close(self) -> None:
        """Give everything back. If the answer had not ended, cancel it and record what was written so far."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._ended and self._generation is not None:
                self._abandon(self._generation)
        finally:
            self._service._leave(self.key)

    def _abandon(self, generation: Generation) -> None:
        generation.cancel()
        try:
            finished = generation.result(_CANCEL_WAIT_SECONDS)
        except TimeoutError:
            log.warning("a cancelled generation is still in a step; what it wrote is not recorded")
            return
        if finished.reason == "error":
            return
        try:
            self._conclude(finished, "cancelled")
        except Exception:  # nobody is left to tell, and the slot must be given back
            log.exception("an answer that was cut off could not be recorded")

    def _finish(self, finished: Finished) -> ChatFinished:
        self._ended = True
        if finished.reason == "error":
            log.error("generation failed", reason=finished.error)
            raise GenerationFailed("the model failed on this request; the server's log says why")
        reason: FinishReason = finished.reason
        return self._conclude(finished, "timeout" if reason == "cancelled" and self._timed_out else reason)

    def _conclude(self, finished: Finished, reason: FinishReason) -> ChatFinished:
        told = ChatFinished(
            finish_reason=reason,
            text=finished.text,
            prompt_tokens=finished.usage.prompt_tokens,
            completion_tokens=finished.usage.completion_tokens,
            experience_id=None,
            domain=self.domain,
            session_id=self.request.session_id,
            timings=asdict(finished.timings),
            reasoning=finished.reasoning,
            reasoning_tokens=finished.usage.reasoning_tokens,
            tool_calls=finished.tool_calls if self.request.tools else (),
        )
        experience_id = self._service._commit(self, told)
        self._service._announce(self.model, told)
        return replace(told, experience_id=experience_id)

    def _repeat(self) -> Iterator[Delta | ChatFinished]:
        record = self._replay
        assert record is not None, "a run has a generation or a recorded answer"
        self._ended = True
        calls = tuple(ToolCall(**call) for call in record.meta.get("tool_calls", ()))
        reasoning = record.meta.get("reasoning", "")
        told = tuple(ToolCallDelta(place, call.name, call.arguments) for place, call in enumerate(calls))
        yield Delta(record.action, reasoning=reasoning, tool_calls=told)
        yield ChatFinished(
            finish_reason=record.meta["finish_reason"],
            text=record.action,
            prompt_tokens=record.meta["prompt_tokens"],
            completion_tokens=record.meta["completion_tokens"],
            experience_id=record.id,
            domain=record.domain,
            session_id=record.session_id,
            timings={},
            replayed=True,
            reasoning=reasoning,
            reasoning_tokens=record.meta.get("reasoning_tokens"),
            tool_calls=calls,
        )

    def _delta(self, chunk: TokenChunk) -> Delta | None:
        tokens: tuple[TokenInfo, ...] = ()
        if chunk.logprob is not None and chunk.token_id is not None and chunk.channel == "content":
            top = tuple(self._token(item.token_id, item.logprob) for item in chunk.top_logprobs)
            tokens = (self._token(chunk.token_id, chunk.logprob, top),)
        # A call of a tool that nobody offered has nobody to answer it.
        calls = chunk.tool_calls if self.request.tools else ()
        if chunk.channel != "content" and not (chunk.text or chunk.reasoning or calls):
            return None
        return Delta(chunk.text, tokens, chunk.reasoning, calls)

    def _token(self, token_id: int, logprob: float, top: tuple[TokenInfo, ...] = ()) -> TokenInfo:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return TokenInfo(text, logprob, None if "\ufffd" in text else tuple(text.encode()), top)


def _card(engine: Engine) -> ModelCard:
    loaded = engine.loaded
    shown = Path(loaded.name).name if Path(loaded.name).expanduser().is_dir() else loaded.name
    return ModelCard(shown, loaded.name, loaded.context_length, loaded.fingerprint)


def _for_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """OpenAI's newer name of the system role, for the many templates that do not know it."""
    if message["role"] == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    return dict(message)


def _observation(messages: tuple[Mapping[str, Any], ...]) -> str:
    """The last thing the user said; without a user, the last thing said."""
    spoken = [message for message in messages if message["role"] == "user"] or list(messages)
    return str(spoken[-1]["content"])


def _meta(run: ChatRun, finished: ChatFinished) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": finished.finish_reason,
        "model": run.model.id,
        "model_fingerprint": run.model.fingerprint,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "timings": {name: None if value is None else round(value, 4) for name, value in finished.timings.items()},
        "actor": run.request.actor,
    }
    if finished.reasoning_tokens is not None:
        meta["reasoning_tokens"] = finished.reasoning_tokens
    if finished.reasoning:
        meta["reasoning"] = _storable(finished.reasoning)
    if finished.tool_calls:
        meta["tool_calls"] = [
            {"name": _storable(call.name), "arguments": _storable(call.arguments)} for call in finished.tool_calls
        ]
    if run.key is not None:
        meta["request_sha256"] = run.request.fingerprint()
    return meta


def _storable(text: str) -> str:
    return text.replace("\x00", "\ufffd")  # PostgreSQL stores no NUL


def _request_id(request: ChatRequest) -> str:
    """The key under which the exchange is stored: nobody can reach another principal's answers with it."""
    return "chat:" + hashlib.sha256(f"{request.actor}\n{request.idempotency_key}".encode()).hexdigest()
