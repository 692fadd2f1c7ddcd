"""The chat service: from a conversation to an answer that has become an experience.

``open`` checks the request against the loaded model and queues it; ``ChatRun`` (``chat_run.py``) hands out the text as
it is written and, last, ``ChatFinished``: by then the exchange is committed to the history, so what a client saw end is
never lost. An answer that was cut off is recorded too, marked as cancelled, and nothing learns from it.

An ``Idempotency-Key`` makes a retry harmless: the recorded answer is given again instead of a second one; so does what
OpenAI's clients say of their retries (``chat_retries.py``).
Knows the engine and the history; HTTP and its wire formats are in ``web``. Routing by kernels comes later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from memory.history import History, Record
from olympus.chat_cartridges import ChatCartridges
from olympus.chat_memory import ChatMemory
from olympus.chat_record import observation, request_id, to_experience
from olympus.chat_retries import UnheardAnswers
from olympus.chat_run import ChatRun, Submitted
from olympus.chat_types import (
    ChatFinished,
    ChatRequest,
    IdempotencyKeyReused,
    ModelCard,
    ModelNotFound,
    RequestInProgress,
)
from olympus.chat_workspace import Baseline, seeded
from olympus.workbench import Workbench
from settings import Settings
from telemetry.hub import EventHub
from workspace.errors import InvalidPrompt, InvalidSampling, PromptTooLong

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.engine import Engine
    from workspace.generation import Generation
    from workspace.sampling import SamplingParams

log = structlog.get_logger(__name__)

_COMPLETION_TOKENS = 16  # OpenAI's default for texts to go on with


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
        self.timeout_seconds = settings.engine.request_timeout_seconds
        self.default_domain = settings.kernels.default_domain
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
        self.unheard = UnheardAnswers()

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
            replay, missed = None if key is None else self._recorded(key, request), self.unheard.take(request)
            if missed is not None and missed.whole and replay is None:
                replay = self._living(missed.experience_id)
            submitted = None if replay is not None else self._submit(engine, request)
        except BaseException:
            self.leave(key)
            raise
        replaces = None if missed is None or missed.whole else missed.experience_id
        return ChatRun(self, request, card, engine, submitted, replay, key, replaces)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` when the bookkeeping contradicts itself."""
        with self._lock:
            assert self._active >= len(self._keys_in_use)
        self.unheard.check_invariants()

    def _submit(self, engine: Engine, request: ChatRequest) -> Submitted:
        if request.prompt is not None:
            return self._submit_prompt(engine, request, request.prompt)
        template = str(engine.loaded.tokenizer.chat_template)
        messages: list[Mapping[str, Any]] = [_for_template(message, template) for message in request.messages]
        params = seeded(self._sampling(request), request.workspace)
        options: dict[str, Any] = {"tools": request.tools or None, "reasoning_effort": request.reasoning_effort}
        if request.json_schema is not None:
            options["grammar"] = engine.grammars.json_schema(request.json_schema)
        if request.must_call:
            from workspace.tool_grammar import call_grammar

            several = not request.one_call and request.call_named is None
            options["grammar"] = call_grammar(engine.grammars, request.tools, named=request.call_named, several=several)
        if request.one_call:
            options["one_call"] = True
        used: tuple[str, ...] = ()
        if self._cartridges is not None and (found := self._cartridges.prefix(engine.loaded, request.cartridges)):
            options["prefix"], used = found  # its own until it ends, whatever is promoted meanwhile
        domain, said = request.domain or self.default_domain, observation(request.messages)
        told: dict[str, Any] | None = None
        if self._memory is not None and self._memory.wanted(request):
            remembered = self._memory.remember(engine.loaded, request, domain, messages, named=bool(used))
            messages, told = remembered.messages, remembered.report
            if remembered.prefix is not None:
                options["prefix"], used = remembered.prefix, remembered.cartridges
        workbench = self._workbench_provider()
        run = workbench.run(request.workspace, session=request.session_id, domain=domain, question=said)
        if run is None:
            choices = _submit_choices(engine, request.n, messages, params, options)
            return Submitted(choices, cartridges=used, memory=told)
        if request.n > 1:
            raise InvalidSampling("n", "only 1 with the workspace, whose session lives through one answer")
        steered = engine.submit(workbench.with_memories(messages, run), params, request_context=run, **options)
        if request.workspace is None or not request.workspace.compare:
            return Submitted((steered,), run, cartridges=used, memory=told)
        try:
            return Submitted((steered,), run, Baseline(engine.submit(messages, params, **options)), used, told)
        except BaseException:
            steered.cancel()
            raise

    def _submit_prompt(self, engine: Engine, request: ChatRequest, prompt: str | tuple[int, ...]) -> Submitted:
        """A bare text: no chat template, no workspace, and no memory but the cartridges that it names."""
        options: dict[str, Any] = {}
        used: tuple[str, ...] = ()
        if self._cartridges is not None and (found := self._cartridges.prefix(engine.loaded, request.cartridges)):
            options["prefix"], used = found
        ids = engine.encode(prompt, after_prefix=bool(options)) if isinstance(prompt, str) else prompt
        try:
            choices = _submit_choices(engine, request.n, ids, self._sampling(request), options)
        except (PromptTooLong, InvalidPrompt) as error:
            error.param = "prompt"
            raise
        return Submitted(choices, cartridges=used)

    def _sampling(self, request: ChatRequest) -> SamplingParams:
        from workspace.sampling import SamplingParams

        defaults = self._engine_settings
        wanted = request.max_tokens
        if wanted is not None and wanted > defaults.max_tokens:
            raise InvalidSampling("max_tokens", f"at most {defaults.max_tokens} on this server, got {wanted}")
        usual = defaults.default_max_tokens if request.prompt is None else _COMPLETION_TOKENS
        named = ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        given = {name: getattr(request, name) for name in named if getattr(request, name) is not None}
        return SamplingParams(
            max_tokens=min(usual, defaults.max_tokens) if wanted is None else wanted,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stop,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
            ignore_eos=request.ignore_eos,
            logit_bias=request.logit_bias,
            **given,
        )

    def _recorded(self, key: str, request: ChatRequest) -> Record | None:
        record = self._history.find_request(key)
        if record is None or record.deleted:  # a forgotten answer is not given again
            return None
        if record.meta.get("request_sha256") != request.fingerprint():
            raise IdempotencyKeyReused("this Idempotency-Key came with a different request; use a new key for each one")
        return record

    def _living(self, experience_id: int) -> Record | None:
        record = self._history.get(experience_id)
        return None if record is None or record.deleted else record

    def _enter(self, key: str | None) -> None:
        with self._lock:
            if key is not None and key in self._keys_in_use:
                raise RequestInProgress("a request with this Idempotency-Key is being answered; retry in a moment")
            if key is not None:
                self._keys_in_use.add(key)
            self._active += 1

    def leave(self, key: str | None) -> None:
        """A chat is over; its key may be used again."""
        with self._lock:
            self._active -= 1
            self._keys_in_use.discard(key or "")

    def commit(self, run: ChatRun, finished: ChatFinished) -> int | None:
        """Write the exchange; returns its id, or None when there is nothing to remember."""
        experience = (
            None if run.request.unrecorded else to_experience(run.request, run.said, run.model, run.key, finished)
        )
        if experience is None:
            return None
        if self._log_prompts:
            log.info("chat", observation=experience.observation, action=experience.action)
        written = self._history.append([experience])[0].id
        if run.replaces is not None and finished.finish_reason != "cancelled":
            self._history.delete(experience_id=run.replaces, actor=run.request.actor)
        return written

    def announce(self, card: ModelCard, finished: ChatFinished | None) -> None:
        """Tell the event stream that a chat began, or how it ended."""
        with self._lock:
            data: dict[str, Any] = {"active": self._active, "model": card.id}
        if finished is not None:
            seconds = finished.timings.get("decode_s")
            data["completion_tokens"] = finished.completion_tokens
            data["tokens_per_second"] = round((finished.completion_tokens - 1) / seconds, 2) if seconds else None
        self._hub.publish("chat", data, key="chat")


def _submit_choices(
    engine: Engine, count: int, prompt: Sequence[Any], params: SamplingParams, options: Mapping[str, Any]
) -> tuple[Generation, ...]:
    """``count`` generations of one prompt; each has its own seed, the first the request's. All or none."""
    made: list[Generation] = []
    try:
        for place in range(count):
            own = params if params.seed is None or place == 0 else replace(params, seed=params.seed + place)
            made.append(engine.submit(prompt, own, **options))
    except BaseException:
        for generation in made:
            generation.cancel()
        raise
    return tuple(made)


def _card(engine: Engine) -> ModelCard:
    loaded = engine.loaded
    shown = Path(loaded.name).name if Path(loaded.name).expanduser().is_dir() else loaded.name
    return ModelCard(shown, loaded.name, loaded.context_length, loaded.fingerprint)


def _for_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """OpenAI's newer name of the system role, for the many templates that do not know it."""
    if message["role"] == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    return dict(message)
