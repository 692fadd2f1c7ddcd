"""The chat service: from a conversation to an answer that has become an experience.

``open`` checks the request against the loaded model and queues it; ``ChatRun.events`` hands out the text as it is
written and, last, ``ChatFinished``: by then the exchange is committed to the history, so what a client saw end is
never lost. An answer that was cut off is recorded too, marked as cancelled, and nothing learns from it.

An ``Idempotency-Key`` makes a retry harmless: the recorded answer is given again instead of a second one.
Knows the engine and the history; HTTP and its wire formats are in ``web``. Routing by kernels comes later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from memory.history import History, Record
from olympus.chat_cartridges import ChatCartridges
from olympus.chat_memory import ChatMemory
from olympus.chat_record import from_record, observation, request_id, to_experience
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
    Step,
    TokenInfo,
)
from olympus.chat_workspace import Baseline, Side, seeded
from olympus.workbench import Workbench
from settings import Settings
from telemetry.hub import EventHub
from workspace.errors import InvalidSampling

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.engine import Engine
    from workspace.generation import Finished, Generation, TokenChunk
    from workspace.run import WorkspaceRun
    from workspace.sampling import SamplingParams, TokenLogprob

log = structlog.get_logger(__name__)

_CANCEL_WAIT_SECONDS = 5.0  # a step of the model, or a chunk of a prompt


class ChatService:
    """Opens chats. One per process; safe to use from all threads."""

    def __init__(
        self,
        settings: Settings,
        engine_provider: Callable[[], Engine],
        history: History,
        hub: EventHub,
        workbench_provider: Callable[[], Workbench] = lambda: Workbench(None, "this server has none"),
        cartridges: ChatCartridges | None = None,
        memory: ChatMemory | None = None,
    ) -> None:
        self._engine_settings = settings.engine
        self._default_domain = settings.kernels.default_domain
        self._log_prompts = settings.telemetry.log_prompts
        self._engine_provider = engine_provider
        self._workbench_provider = workbench_provider
        self._cartridges = cartridges
        self._memory = memory
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

        Raises ``ModelNotReady``, ``ModelNotFound``, ``IdempotencyKeyReused``, ``RequestInProgress``,
        ``CartridgeUnusable``, and what ``workspace.Engine.submit`` raises.
        """
        engine = self._engine_provider()
        card = _card(engine)
        if request.model is not None and not card.answers_to(request.model):
            raise ModelNotFound(f"the model {request.model!r} does not exist here; the one available is {card.id!r}")
        key = None if request.idempotency_key is None else request_id(request)
        self._enter(key)
        try:
            replay = None if key is None else self._recorded(key, request)
            submitted = None if replay is not None else self._submit(engine, request)
        except BaseException:
            self._leave(key)
            raise
        return ChatRun(self, request, card, engine, submitted, replay, key)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the bookkeeping contradicts itself."""
        with self._lock:
            assert self._active >= len(self._keys_in_use)

    def _submit(self, engine: Engine, request: ChatRequest) -> _Submitted:
        template = str(engine.loaded.tokenizer.chat_template)
        messages: list[Mapping[str, Any]] = [_for_template(message, template) for message in request.messages]
        params = seeded(self._sampling(request), request.workspace)
        options: dict[str, Any] = {"tools": request.tools or None, "reasoning_effort": request.reasoning_effort}
        used: tuple[str, ...] = ()
        if self._cartridges is not None and (found := self._cartridges.prefix(engine.loaded, request.cartridges)):
            options["prefix"], used = found  # its own until it ends, whatever is promoted meanwhile
        domain, said = request.domain or self._default_domain, observation(request.messages)
        told: dict[str, Any] | None = None
        if self._memory is not None and self._memory.wanted(request):
            remembered = self._memory.remember(engine.loaded, request, domain, messages, named=bool(used))
            messages, told = remembered.messages, remembered.report
            if remembered.prefix is not None:
                options["prefix"], used = remembered.prefix, remembered.cartridges
        workbench = self._workbench_provider()
        run = workbench.run(request.workspace, session=request.session_id, domain=domain, question=said)
        if run is None:
            return _Submitted(engine.submit(messages, params, **options), cartridges=used, memory=told)
        steered = engine.submit(workbench.with_memories(messages, run), params, request_context=run, **options)
        if request.workspace is None or not request.workspace.compare:
            return _Submitted(steered, run, cartridges=used, memory=told)
        try:
            return _Submitted(steered, run, Baseline(engine.submit(messages, params, **options)), used, told)
        except BaseException:
            steered.cancel()
            raise

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
            ignore_eos=request.ignore_eos,
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
        experience = None if run.request.unrecorded else to_experience(run.request, run.model, run.key, finished)
        if experience is None:
            return None
        if self._log_prompts:
            log.info("chat", observation=experience.observation, action=experience.action)
        return self._history.append([experience])[0].id

    def _announce(self, card: ModelCard, finished: ChatFinished | None) -> None:
        with self._lock:
            data: dict[str, Any] = {"active": self._active, "model": card.id}
        if finished is not None:
            seconds = finished.timings.get("decode_s")
            data["completion_tokens"] = finished.completion_tokens
            data["tokens_per_second"] = round((finished.completion_tokens - 1) / seconds, 2) if seconds else None
        self._hub.publish("chat", data, key="chat")


@dataclass(frozen=True)
class _Submitted:
    """A generation, the workspace that serves it, the other side of a comparison, its cartridges and its memory."""

    generation: Generation
    workspace: WorkspaceRun | None = None
    baseline: Baseline | None = None
    cartridges: tuple[str, ...] = ()
    memory: Mapping[str, Any] | None = None


class ChatRun:
    """One chat being answered. Read ``events`` in one thread and always ``close()`` at the end."""

    def __init__(
        self,
        service: ChatService,
        request: ChatRequest,
        card: ModelCard,
        engine: Engine,
        submitted: _Submitted | None,
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
        self._generation = None if submitted is None else submitted.generation
        self._workspace = None if submitted is None else submitted.workspace
        self._baseline = None if submitted is None else submitted.baseline
        self._cartridges = () if submitted is None else submitted.cartridges
        self._memory = None if submitted is None else submitted.memory
        self._logprobs: list[float] = []
        self._steps: list[Step] | None = [] if request.exact else None
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
                self.cancel()
            if event is None:
                yield None
            elif isinstance(event, Finished):
                yield from self._finish(event, timeout)
            else:
                yield self._delta(event)  # None for a token that is no text

    def cancel(self) -> None:
        """Ask for the end; ``events`` then ends with reason "cancelled" within one token."""
        if self._generation is not None:
            self._generation.cancel()
        if self._baseline is not None:
            self._baseline.cancel()

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
        self.cancel()
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

    def _finish(self, finished: Finished, timeout: float) -> Iterator[ChatFinished | None]:
        """The end; before it None while the other side of a comparison is still writing."""
        if finished.reason == "error":
            self._ended = True
            log.error("generation failed", reason=finished.error)
            raise GenerationFailed("the model failed on this request; the server's log says why")
        other = None
        while self._baseline is not None and (other := self._baseline.side(timeout)) is None:
            if time.monotonic() > self._deadline:
                self.cancel()
            yield None
        self._ended = True
        reason: FinishReason = finished.reason
        told = "timeout" if reason == "cancelled" and self._timed_out else reason
        compare = (
            None if other is None else {"with": asdict(Side.of(finished, self._logprobs)), "without": asdict(other)}
        )
        yield self._conclude(finished, told, compare)

    def _conclude(
        self, finished: Finished, reason: FinishReason, compare: Mapping[str, Any] | None = None
    ) -> ChatFinished:
        report = None if self._workspace is None else self._workspace.report
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
            workspace=None if report is None else report.to_json(),
            trace=None if report is None else report.trace,
            compare=compare,
            cartridges=self._cartridges,
            cartridge_slots=finished.usage.cartridge_slots,
            memory=self._memory,
            steps=self._all_steps(finished),
        )
        if self._workspace is not None:
            self._workspace.save()  # like the exchange, before anybody is told that it is finished
        experience_id = self._service._commit(self, told)
        self._service._announce(self.model, told)
        return replace(told, experience_id=experience_id)

    def _repeat(self) -> Iterator[Delta | ChatFinished]:
        assert self._replay is not None, "a run has a generation or a recorded answer"
        self._ended = True
        yield from from_record(self._replay)

    def _delta(self, chunk: TokenChunk) -> Delta | None:
        tokens: tuple[TokenInfo, ...] = ()
        if chunk.logprob is not None:
            self._logprobs.append(chunk.logprob)
        if self._steps is not None and chunk.token_id is not None:
            self._steps.append(_step(chunk.token_id, chunk.logprob, chunk.top_logprobs))
        asked = self.request.logprobs and chunk.logprob is not None
        if asked and chunk.logprob is not None and chunk.token_id is not None and chunk.channel == "content":
            top = tuple(self._token(item.token_id, item.logprob) for item in chunk.top_logprobs)
            tokens = (self._token(chunk.token_id, chunk.logprob, top),)
        # A call of a tool that nobody offered has nobody to answer it.
        calls = chunk.tool_calls if self.request.tools else ()
        if chunk.channel != "content" and not (chunk.text or chunk.reasoning or calls):
            return None
        return Delta(chunk.text, tokens, chunk.reasoning, calls)

    def _all_steps(self, finished: Finished) -> tuple[Step, ...] | None:
        """Every token, and the one that ended the answer."""
        if self._steps is None:
            return None
        end = finished.ending
        return (*self._steps, *([] if end is None else [_step(end.token_id, end.logprob, end.top_logprobs)]))

    def _token(self, token_id: int, logprob: float, top: tuple[TokenInfo, ...] = ()) -> TokenInfo:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return TokenInfo(text, logprob, None if "\ufffd" in text else tuple(text.encode()), top)


def _step(token_id: int, logprob: float | None, top: Sequence[TokenLogprob]) -> Step:
    return Step(token_id, logprob, tuple((item.token_id, item.logprob) for item in top))


def _card(engine: Engine) -> ModelCard:
    loaded = engine.loaded
    shown = Path(loaded.name).name if Path(loaded.name).expanduser().is_dir() else loaded.name
    return ModelCard(shown, loaded.name, loaded.context_length, loaded.fingerprint)


def _for_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """OpenAI's newer name of the system role, for the many templates that do not know it."""
    if message["role"] == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    return dict(message)
