"""A chat being answered: from the engine's events to what the client is told, and to one experience.

A request has one or several choices (``n``), each a generation of its own; their events come mixed, each with its
choice's index. ``ChatFinished`` is the last event of all of them: by then the exchange is in the history.
Opening a chat, and its bookkeeping, are in ``chat.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from memory.history import Record
from olympus.chat_record import from_record, said
from olympus.chat_types import (
    ChatFinished,
    ChatRequest,
    Choice,
    Delta,
    FinishReason,
    GenerationFailed,
    ModelCard,
    ResponseNote,
    Step,
    TokenInfo,
)
from olympus.chat_workspace import Baseline, Side

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from olympus.chat import ChatService
    from workspace.engine import Engine
    from workspace.generation import Event, Finished, Generation, TokenChunk
    from workspace.run import WorkspaceRun
    from workspace.sampling import TokenLogprob

log = structlog.get_logger(__name__)

_CANCEL_WAIT_SECONDS = 5.0  # a step of the model, or a chunk of a prompt


@dataclass(frozen=True)
class Submitted:
    """The generations of a request's choices, and what serves them; ``workspace`` and ``baseline`` go with one."""

    generations: tuple[Generation, ...]
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
        submitted: Submitted | None,
        replay: Record | None,
        key: str | None,
        replaces: int | None = None,
    ) -> None:
        self.request = request
        self.model = card
        self.domain = request.domain or service.default_domain
        self.key = key
        self.replaces = replaces  #: the experience of an earlier try that was cut off
        self.said = said(request, engine.loaded.tokenizer)
        self.replayed = replay is not None
        self._service = service
        self._tokenizer = engine.loaded.tokenizer
        self._generations = () if submitted is None else submitted.generations
        self._workspace = None if submitted is None else submitted.workspace
        self._baseline = None if submitted is None else submitted.baseline
        self._cartridges = () if submitted is None else submitted.cartridges
        self._memory = None if submitted is None else submitted.memory
        self._logprobs: list[float] = []  # of the first choice
        self._steps: list[list[Step]] | None = [[] for _ in self._generations] if request.exact else None
        self._replay = replay
        self._deadline = time.monotonic() + service.timeout_seconds
        self._timed_out = False
        self._ended = False
        self._closed = False
        service.announce(card, None)

    @property
    def response(self) -> ResponseNote:
        """What the response is called and repeats; of a replayed one, what was recorded."""
        if self._replay is not None:
            return ResponseNote(**self._replay.meta["response"])
        assert self.request.response is not None, "asked of requests for a response only"
        return self.request.response

    def events(self, timeout: float = 1.0) -> Iterator[Delta | ChatFinished | None]:
        """Yield text as it comes and end after ``ChatFinished``; None after ``timeout`` seconds without text.

        Raises ``GenerationFailed``, and what the history raises when the exchange cannot be stored.
        """
        from workspace.generation import Finished

        if not self._generations:
            yield from self._repeat()
            return
        ended: dict[int, Finished] = {}
        for place, event in merged(self._generations, timeout):
            if not self._timed_out and time.monotonic() > self._deadline:
                self._timed_out = True
                self.cancel()
            if event is None:
                yield None
            elif isinstance(event, Finished):
                ended[place] = event
            else:
                yield self._delta(place, event)  # None for a token that is no text
        yield from self._finish([ended[place] for place in range(len(self._generations))], timeout)

    def cancel(self) -> None:
        """Ask for the end; ``events`` then ends with reason "cancelled" within one token."""
        for generation in self._generations:
            generation.cancel()
        if self._baseline is not None:
            self._baseline.cancel()

    def close(self) -> None:
        """Give everything back. If the answer had not ended, cancel it and record what was written so far."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._ended and self._generations:
                self._abandon()
        finally:
            self._service.leave(self.key)

    def not_heard(self, finished: ChatFinished) -> None:
        """The client had left when the answer was whole: its retry shall get this one."""
        self._service.unheard.note(self.request, finished.experience_id, whole=True)

    def _abandon(self) -> None:
        self.cancel()
        try:
            ended = [generation.result(_CANCEL_WAIT_SECONDS) for generation in self._generations]
        except TimeoutError:
            log.warning("a cancelled generation is still in a step; what it wrote is not recorded")
            return
        if any(finished.reason == "error" for finished in ended):
            return
        try:
            told = self._conclude(ended, "cancelled")
            self._service.unheard.note(self.request, told.experience_id, whole=False)
        except Exception:  # nobody is left to tell, and the slot must be given back
            log.exception("an answer that was cut off could not be recorded")

    def _finish(self, ended: list[Finished], timeout: float) -> Iterator[ChatFinished | None]:
        """The end; before it None while the other side of a comparison is still writing."""
        failed = next((finished for finished in ended if finished.reason == "error"), None)
        if failed is not None:
            self._ended = True
            log.error("generation failed", reason=failed.error)
            raise GenerationFailed("the model failed on this request; the server's log says why")
        other = None
        while self._baseline is not None and (other := self._baseline.side(timeout)) is None:
            if time.monotonic() > self._deadline:
                self.cancel()
            yield None
        self._ended = True
        sides = None if other is None else {"with": asdict(Side.of(ended[0], self._logprobs)), "without": asdict(other)}
        yield self._conclude(ended, self._reason(ended[0]), sides)

    def _reason(self, finished: Finished) -> FinishReason:
        assert finished.reason != "error", "an error is raised"
        return "timeout" if finished.reason == "cancelled" and self._timed_out else finished.reason

    def _conclude(
        self, ended: list[Finished], reason: FinishReason, compare: Mapping[str, Any] | None = None
    ) -> ChatFinished:
        finished = ended[0]
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
            cached_tokens=finished.usage.cached_tokens,
            memory=self._memory,
            steps=self._all_steps(0, finished),
            others=tuple(self._choice(place, item) for place, item in enumerate(ended) if place > 0),
        )
        if self._workspace is not None:
            self._workspace.save()  # like the exchange, before anybody is told that it is finished
        experience_id = self._service.commit(self, told)
        self._service.announce(self.model, told)
        return replace(told, experience_id=experience_id)

    def _repeat(self) -> Iterator[Delta | ChatFinished]:
        assert self._replay is not None, "a run has a generation or a recorded answer"
        self._ended = True
        yield from from_record(self._replay)

    def _choice(self, place: int, finished: Finished) -> Choice:
        return Choice(
            finish_reason=self._reason(finished),
            text=finished.text,
            completion_tokens=finished.usage.completion_tokens,
            reasoning=finished.reasoning,
            reasoning_tokens=finished.usage.reasoning_tokens,
            tool_calls=finished.tool_calls if self.request.tools else (),
            steps=self._all_steps(place, finished),
        )

    def _delta(self, place: int, chunk: TokenChunk) -> Delta | None:
        tokens: tuple[TokenInfo, ...] = ()
        if chunk.logprob is not None and place == 0:
            self._logprobs.append(chunk.logprob)
        if self._steps is not None and chunk.token_id is not None:
            self._steps[place].append(_step(chunk.token_id, chunk.logprob, chunk.top_logprobs))
        asked = self.request.logprobs and chunk.logprob is not None
        if asked and chunk.logprob is not None and chunk.token_id is not None and chunk.channel == "content":
            top = tuple(self._token(item.token_id, item.logprob) for item in chunk.top_logprobs)
            tokens = (self._token(chunk.token_id, chunk.logprob, top),)
        # A call of a tool that nobody offered has nobody to answer it.
        calls = chunk.tool_calls if self.request.tools else ()
        if chunk.channel != "content" and not (chunk.text or chunk.reasoning or calls):
            return None
        return Delta(chunk.text, tokens, chunk.reasoning, calls, place)

    def _all_steps(self, place: int, finished: Finished) -> tuple[Step, ...] | None:
        """Every token, and the one that ended the answer."""
        if self._steps is None:
            return None
        end = finished.ending
        return (*self._steps[place], *([] if end is None else [_step(end.token_id, end.logprob, end.top_logprobs)]))

    def _token(self, token_id: int, logprob: float, top: tuple[TokenInfo, ...] = ()) -> TokenInfo:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return TokenInfo(text, logprob, None if "\ufffd" in text else tuple(text.encode()), top)


def _step(token_id: int, logprob: float | None, top: Sequence[TokenLogprob]) -> Step:
    return Step(token_id, logprob, tuple((item.token_id, item.logprob) for item in top))


def merged(generations: Sequence[Generation], timeout: float) -> Iterator[tuple[int, Event | None]]:
    """The events of all generations, each with its place, until all have ended; None after ``timeout`` silent seconds.

    The engine admits them in order and gives each one token per round: so where nothing is there yet, the first that
    still writes is waited for.
    """
    from workspace.generation import Finished

    if len(generations) == 1:
        for event in generations[0].stream(timeout):
            yield 0, event
        return
    writing, wait = list(range(len(generations))), timeout
    while writing:
        heard = False
        for place in tuple(writing):
            patience = wait if place == writing[0] else 0.0
            for event in generations[place].stream(patience):
                if event is None and (heard or patience == 0):
                    break
                yield place, event
                heard = heard or event is not None
                if isinstance(event, Finished):
                    writing.remove(place)
                if event is None or patience > 0:
                    break
        wait = 0.0 if heard else timeout
