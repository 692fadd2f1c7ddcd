"""One request's generation: its state while it runs, and the stream of events that its client reads.

The engine's thread owns the state (cache, sampler, text) and is the only one that advances it; any other thread may
read events, wait for the result, or cancel. How a step is made is not decided here (``stepping.py``).
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers import Cache

from workspace.channels import Channel, Output, OutputParser, ToolCall, ToolCallDelta
from workspace.prefix import KVPrefix
from workspace.sampling import SampledToken, Sampler, SamplingParams, TokenLogprob
from workspace.text import StopMatcher

if TYPE_CHECKING:
    from workspace.forward import StepContext
    from workspace.prefix_cache import Chain

FinishReason = Literal["stop", "length", "cancelled", "error"]

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One token was chosen. ``text`` is what became certain with it: possibly nothing, possibly held-back text.

    ``token_id`` is None in the one chunk that gives out what was still held back at the end. ``text`` is the answer's;
    reasoning and tool calls stand apart. ``channel`` is the token's own; None for control tokens.
    """

    text: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    channel: Channel | None = "content"
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. The answer's count includes reasoning and the token that ended it, as OpenAI counts.

    ``reasoning_tokens`` is None for models whose output has no reasoning channel. ``cartridge_slots`` were attended
    beside the prompt's tokens, which do not include them. ``cached_tokens`` of the prompt were not read again.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int | None = None
    cartridge_slots: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. ``queue_s`` and ``ttft_s`` count from submission; None where that point was never reached.

    ``decode_s`` runs from the first token to the last.
    """

    queue_s: float | None
    ttft_s: float | None
    decode_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. ``text`` equals the joined texts of all chunks; ``error`` says what failed, if it did.

    The same holds for ``reasoning`` and, call by call, for ``tool_calls``. ``ending`` is the end-of-sequence token with
    its log-probabilities, where one ended it: the last of ``token_ids``, and in no chunk.
    """

    reason: FinishReason
    usage: Usage
    text: str
    token_ids: tuple[int, ...]
    timings: Timings
    error: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    ending: SampledToken | None = None


Event = TokenChunk | Finished


class Generation:
    """A request in the engine. Clients use ``stream``, ``result``, ``cancel`` and the read-only properties."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        limit: int,
        sampler: Sampler,
        output: OutputParser,
        context: StepContext | None = None,
        prefix: KVPrefix | None = None,
        prefix_id: str = "",
    ):
        self.id = next(_numbers)
        self.prompt_ids = prompt_ids
        self.params = params
        self.limit = limit  #: most tokens to generate: the request's wish, or what the context has left
        self.context = context
        self.prefix = prefix  #: fills the cache before the prompt; shared with others and never changed
        self.prefix_id = prefix_id  #: what it holds (``prefix_digest``), for the reuse of what follows it
        # Touched by the engine's thread only.
        self.cache: Cache | None = None
        self.chain: Chain | None = None  #: its way through the store of prompts read before
        self.cached_tokens = 0  #: tokens of the prompt that came from there
        self.turn = 0  #: the round in which it came, or from which on it waits for the next chunk of its prompt
        self.position = 0  #: tokens of the text in the cache, without the prefix's slots
        self.token_ids: list[int] = []
        self.sampler = sampler
        self._output = output
        self._stops = StopMatcher(params.stop)  # they stand for the answer's text only
        self._ended_by: SampledToken | None = None
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[list[str]] = []  # of each tool call its name, and its arguments in pieces
        # Shared.
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a stop of the engine may end it from another thread
        self._done = threading.Event()
        self._cancelled = threading.Event()
        self._finished: Finished | None = None
        self._submitted = time.perf_counter()
        self._admitted: float | None = None
        self._first_token: float | None = None
        self._last_token: float | None = None

    # What clients use.

    def stream(self, timeout: float = 1.0) -> Iterator[TokenChunk | Finished | None]:
        """Yield each event as it happens and end after ``Finished``; None whenever ``timeout`` seconds were silent.

        Meant for one reader: events are handed out once. A later call yields ``Finished`` only.
        """
        while True:
            if self._finished is not None and self._events.empty():  # the end was handed out already
                yield self._finished
                return
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                yield None
                continue
            yield event
            if isinstance(event, Finished):
                return

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the end. Raises ``TimeoutError`` after ``timeout`` seconds; the generation goes on."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"generation {self.id} has not ended within {timeout} s; cancel() ends it")
        assert self._finished is not None
        return self._finished

    def cancel(self) -> None:
        """Ask for the end; it comes before the next token or prompt chunk. Harmless at any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True once somebody asked for the end."""
        return self._cancelled.is_set()

    @property
    def finished(self) -> Finished | None:
        """How it ended, or None while it has not."""
        return self._finished

    @property
    def prefilled(self) -> bool:
        """True when the whole prompt is in the cache and each further step yields a token."""
        return self.position >= len(self.prompt_ids)

    @property
    def slots(self) -> int:
        """Slots of the prefix: the position of the first token of the prompt."""
        return 0 if self.prefix is None else self.prefix.slots

    # What the engine uses.

    def admit(self) -> None:
        """It leaves the queue: from here on it counts as running."""
        self._admitted = time.perf_counter()

    def accept(self, sampled: SampledToken, eos_ids: frozenset[int]) -> None:
        """Take the chosen token: publish its text, or finish. Ignored once finished."""
        with self._lock:
            if self._finished is None:
                self._accept(sampled, eos_ids)

    def _accept(self, sampled: SampledToken, eos_ids: frozenset[int]) -> None:
        now = time.perf_counter()
        if self._first_token is None:
            self._first_token = now
        self._last_token = now
        token = sampled.token_id
        self.token_ids.append(token)
        if token in self.params.stop_ids or (token in eos_ids and not self.params.ignore_eos):
            self._ended_by = sampled
            self.finish("stop")
            return
        output = self._output.push(token)
        self._publish(output, self._stops.push(output.content), sampled)
        if self._stops.matched is not None or (self._output.ended and not self.params.ignore_eos):
            self.finish("stop")
        elif len(self.token_ids) >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End it, give out held-back text and free the cache. Only the first call counts; any thread may call."""
        with self._lock:
            if self._finished is not None:
                return
            if reason != "error":
                self._publish_held_back()
            self.cache = self.chain = None
            if self.context is not None:  # before anybody can see that it is finished: what it keeps is part of the end
                self.context.ended()
            self._finished = Finished(
                reason=reason,
                usage=Usage(
                    len(self.prompt_ids),
                    len(self.token_ids),
                    self._output.reasoning_tokens,
                    self.slots,
                    self.cached_tokens,
                ),
                text="".join(self._pieces),
                token_ids=tuple(self.token_ids),
                timings=self._timings(),
                error=error,
                reasoning="".join(self._thoughts),
                tool_calls=tuple(ToolCall(call[0], "".join(call[1:])) for call in self._calls),
                ending=self._ended_by,
            )
            self._done.set()  # first: whoever reads the last event finds it done
            self._events.put(self._finished)

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the state contradicts itself."""
        assert 0 <= self.position <= len(self.prompt_ids) + len(self.token_ids)
        assert len(self.token_ids) <= self.limit, (len(self.token_ids), self.limit)
        assert 0 <= self.cached_tokens < len(self.prompt_ids)
        if self._finished is not None:
            assert self.cache is None, "a finished generation holds no cache"
            assert self._done.is_set()
            assert self._finished.text == "".join(self._pieces)
            assert self._stops.matched is None or self._stops.matched not in self._finished.text

    def _publish_held_back(self) -> None:
        """Give out what the parser and the stop matcher kept; nothing after a match."""
        output = self._output.flush(None if self._ended_by is None else self._ended_by.token_id)
        text = self._stops.push(output.content) + self._stops.flush()
        if text or output.reasoning or output.tool_calls:
            self._publish(output, text)

    def _publish(self, output: Output, text: str, sampled: SampledToken | None = None) -> None:
        """Hand out ``output``, of whose content the stop matcher has let ``text`` pass."""
        self._pieces.append(text)
        self._thoughts.append(output.reasoning)
        for call in output.tool_calls:
            if call.name is not None:
                self._calls.append([call.name])
            self._calls[call.index].append(call.arguments)
        chunk = TokenChunk(
            text,
            sampled.token_id if sampled else None,
            sampled.logprob if sampled else None,
            sampled.top_logprobs if sampled else (),
            output.channel,
            output.reasoning,
            output.tool_calls,
        )
        self._events.put(chunk)

    def _timings(self) -> Timings:
        first, last = self._first_token, self._last_token
        return Timings(
            queue_s=None if self._admitted is None else self._admitted - self._submitted,
            ttft_s=None if first is None else first - self._submitted,
            decode_s=0.0 if first is None or last is None else last - first,
        )
