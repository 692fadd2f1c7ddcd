"""The engine: many generations, one frozen model, one worker thread.

The worker gives every running generation one token per round, all of them in one forward pass, and prefills at most
one chunk of one prompt per round, so that a long prompt slows running streams by one chunk at a time and never stops
them. Requests beyond ``max_active`` wait in order; beyond ``max_waiting`` they are refused at once.

An error in one generation ends that one. The engine knows neither HTTP nor sessions: a request brings what it needs
as an argument (``request_context``). Sampling is in ``sampling.py``, a round in ``stepping.py``, the reuse of prompts
read before in ``prefix_cache.py``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from workspace.compiled_step import CompileOptions
from workspace.errors import EngineBusy, EngineError, EngineStopped, InvalidSampling, PromptTooLong
from workspace.forward import Forward, StepContext
from workspace.generation import Generation
from workspace.harmony_output import choose_output
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, fit_prefix
from workspace.prefix_cache import PrefixCache, PrefixCacheStats, prefix_digest
from workspace.prompting import Prompting
from workspace.sampling import Sampler, SamplingParams
from workspace.stepping import Batching, Stepper

if TYPE_CHECKING:  # imported with the first grammar
    from workspace.constraints import Grammar, Grammars

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

#: Tokens of a block of the store: of a prompt that begins like another one, at most so many less one are read again.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Totals count from the start of the engine; ``finished`` counts by reason.

    ``decode_rows / decode_passes`` is how many generations shared a pass. ``cached_tokens`` of all prompt tokens came
    from the store of earlier prompts, whose state is ``prefix_cache``; None where there is none.
    """

    alive: bool
    active: int
    waiting: int
    submitted: int
    refused: int
    finished: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    busy_seconds: float  #: time the worker spent in steps
    decode_passes: int = 0  #: forward passes over tokens of answers
    decode_rows: int = 0  #: tokens of answers that they took
    cached_tokens: int = 0
    prefix_cache: PrefixCacheStats | None = None


class Engine:
    """Generates text with ``loaded``. ``start()`` it once, ``submit()`` from any thread, ``stop()`` it once.

    ``threads`` is the number of cores for one forward pass; 0 leaves one of the machine's cores to the rest.
    ``compiled`` makes the step of a single answer with ``torch.compile``: half a minute in ``warm_up``, quicker later.
    ``batching`` "exact" computes every generation alone. ``prefix_cache_bytes`` bounds what is kept of prompts and
    answers for prompts that begin the same way; 0 keeps nothing.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_active: int,
        max_waiting: int,
        threads: int,
        prefill_chunk: int = 256,
        compiled: CompileOptions | None = None,
        batching: Batching = "batched",
        prefix_cache_bytes: int = 0,
    ):
        if max_active < 1 or prefill_chunk < 1 or min(max_waiting, threads, prefix_cache_bytes) < 0:
            raise ValueError(
                "max_active and prefill_chunk must be at least 1, max_waiting, threads and prefix_cache_bytes at least "
                f"0, got {max_active}, {prefill_chunk}, {max_waiting}, {threads}, {prefix_cache_bytes}"
            )
        if batching not in get_args(Batching):
            raise ValueError(f"batching must be one of {', '.join(get_args(Batching))}, got {batching!r}")
        self.loaded = loaded
        self.threads = threads or max(1, usable_cores() - 1)
        self._max_active = max_active
        self._max_waiting = max_waiting
        # Exact: a beginning is taken over only where a prompt read whole would have had the same passes.
        block = prefill_chunk if batching == "exact" else min(_BLOCK, prefill_chunk)
        self._store = PrefixCache(prefix_cache_bytes, block) if prefix_cache_bytes else None
        self._stepper = Stepper(
            loaded,
            Forward(loaded, compiled, rows=1 if batching == "exact" else max_active),
            prefill_chunk=prefill_chunk,
            batching=batching,
            store=self._store,
        )
        self._prompting = Prompting(loaded)
        self._grammars: Grammars | None = None
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        self._worker: threading.Thread | None = None
        self._stopping = False
        self._submitted = self._refused = self._prompt_tokens = self._completion_tokens = self._cached_tokens = 0
        self._finished: Counter[str] = Counter()
        self._busy_seconds = 0.0

    # Life.

    def start(self) -> None:
        """Start the worker thread. Raises ``EngineStopped`` after ``stop``."""
        with self._changed:
            if self._stopping:
                raise EngineStopped("this engine was stopped; make a new one")
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
                self._worker.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Refuse new requests and end all others with reason "cancelled", within one step.

        Returns True when the worker has ended within ``timeout`` seconds. If it has not (a step of a huge model), its
        generations are ended all the same, and the thread, a daemon, ends after that step.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            worker = self._worker
        if worker is not None:
            worker.join(timeout)
        ended = worker is None or not worker.is_alive()
        if not ended:
            logger.warning("the engine's worker is still in a step after %.1f s", timeout)
        self._end_all("cancelled")
        return ended

    def warm_up(self) -> float:
        """Run a short generation, so that the first request does not pay for lazy initialisation; seconds it took.

        Raises ``EngineError`` when the model cannot generate at all, which is better known now than by a user.
        """
        started = time.perf_counter()
        token = next(iter(sorted(self.loaded.eos_ids)), 0)
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        finished = self.submit([token] * min(16, self.loaded.context_length - 2), params).result()
        if finished.reason == "error":
            raise EngineError(f"the model {self.loaded.name} cannot generate: {finished.error}")
        return time.perf_counter() - started

    # Requests.

    @property
    def grammars(self) -> Grammars:
        """Grammars for this model; made when first asked for, since most servers never are."""
        with self._changed:
            if self._grammars is None:
                from workspace.constraints import Grammars

                self._grammars = Grammars(self.loaded)
            return self._grammars

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        after_prefix: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """Prompt ids for a conversation, by the model's chat template. Raises ``InvalidPrompt``.

        ``after_prefix``: the conversation follows a prefix, so it begins no sequence.
        """
        return self._prompting.render(messages, tools, after_prefix=after_prefix, **template_kwargs)

    def encode(self, text: str, *, after_prefix: bool = False) -> list[int]:
        """Prompt ids for plain text, with the tokenizer's own beginning-of-sequence token if it has one."""
        return self._prompting.encode(text, after_prefix=after_prefix)

    def submit(
        self,
        prompt: Sequence[int] | Sequence[Message],
        params: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        request_context: StepContext | None = None,
        prefix: KVPrefix | None = None,
        grammar: Grammar | None = None,
        one_call: bool = False,
    ) -> Generation:
        """Queue a request; ``prompt`` is token ids or messages. Returns at once.

        ``tools`` and ``reasoning_effort`` (of models that know it) go into the prompt with messages. ``prefix`` takes
        the first positions: the text starts after its slots, and messages are rendered without a beginning of sequence.
        ``grammar``, one of ``grammars``, holds the answer to it. ``one_call`` ends it after the first call of a tool.
        Generates at most ``params.max_tokens``, less where the context ends first (reason "length" either way).
        Raises ``PromptTooLong``, ``InvalidPrompt``, ``PrefixMismatch``, ``EngineBusy`` or ``EngineStopped``.
        """
        if grammar is not None and params.ignore_eos:
            raise InvalidSampling("ignore_eos", "not with a grammar, which says where the answer ends")
        prefix_id = prefix_digest(prefix) if self._store is not None else ""
        if prefix is not None:
            prefix = fit_prefix(self.loaded, prefix)
        prompt_ids, params = self._prompting.prepare(
            prompt, params, tools=tools, reasoning_effort=reasoning_effort, after_prefix=prefix is not None
        )
        slots = 0 if prefix is None else prefix.slots
        room = self.loaded.context_length - slots - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(len(prompt_ids), self.loaded.context_length, slots)
        generation = Generation(
            prompt_ids,
            params,
            limit=min(params.max_tokens, room),
            sampler=Sampler(params, prompt_ids, None if grammar is None else grammar.start()),
            output=choose_output(self.loaded, prompt_ids, tools, one_call=one_call),
            context=request_context,
            prefix=prefix,
            prefix_id=prefix_id,
        )
        with self._changed:
            if self._worker is None or self._stopping:
                raise EngineStopped("the engine is not running; call start() first, and not after stop()")
            if self._places_taken() >= self._max_active + self._max_waiting:
                self._refused += 1
                raise EngineBusy(len(self._active), len(self._waiting))
            self._submitted += 1
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    @property
    def is_busy(self) -> bool:
        """Whether generations run or wait; without a lock, for those who ask every millisecond."""
        return bool(self._active or self._waiting)

    def stats(self) -> EngineStats:
        """A consistent snapshot of the counters."""
        with self._changed:
            return EngineStats(
                alive=self._worker is not None and self._worker.is_alive() and not self._stopping,
                active=len(self._active),
                waiting=len(self._waiting),
                submitted=self._submitted,
                refused=self._refused,
                finished=dict(self._finished),
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._completion_tokens,
                busy_seconds=self._busy_seconds,
                decode_passes=self._stepper.passes,
                decode_rows=self._stepper.rows,
                cached_tokens=self._cached_tokens,
                prefix_cache=None if self._store is None else self._store.stats(),
            )

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the queues or counters contradict themselves."""
        with self._changed:
            assert len(self._active) <= self._max_active, len(self._active)
            assert self._places_taken() <= self._max_active + self._max_waiting
            assert not set(map(id, self._active)) & set(map(id, self._waiting))
            assert self._submitted == len(self._active) + len(self._waiting) + sum(self._finished.values())
            assert all(generation.cache is None for generation in self._waiting), "waiting requests hold no cache"
        if self._store is not None:
            self._store.check_invariants()

    def _places_taken(self) -> int:
        """Unfinished generations; one that has just finished is in the list until the end of its round."""
        return sum(1 for item in (*self._active, *self._waiting) if item.finished is None)

    # The worker.

    def _work(self) -> None:
        torch.set_num_threads(self.threads)  # counts for this thread only
        try:
            with torch.inference_mode():
                while self._admit():
                    self._round()
                    self._retire()
        except Exception:  # a defect of the scheduling itself: say so, and leave nobody waiting
            logger.exception("the engine's worker failed; all its generations end and it takes no new ones")
            with self._changed:
                self._stopping = True
            self._end_all("error")
        else:
            self._end_all("cancelled")

    def _admit(self) -> bool:
        """Wait for work and let waiting generations in; False when the engine stops."""
        with self._changed:
            while not (self._active or self._waiting or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            for generation in [item for item in self._waiting if item.cancelled]:
                self._waiting.remove(generation)
                generation.finish("cancelled")
                self._count(generation)
            while self._waiting and len(self._active) < self._max_active:
                generation = self._waiting.popleft()
                generation.admit()
                self._active.append(generation)
            return True

    def _round(self) -> None:
        """One round of all active generations; only this thread changes ``_active``, so it is read without the lock."""
        started = time.perf_counter()
        self._stepper.round(self._active, lambda: self._stopping)
        with self._changed:
            self._busy_seconds += time.perf_counter() - started

    def _retire(self) -> None:
        with self._changed:
            for generation in [item for item in self._active if item.finished is not None]:
                self._active.remove(generation)
                self._count(generation)

    def _end_all(self, reason: str) -> None:
        with self._changed:
            for generation in [*self._active, *self._waiting]:
                if reason == "error":
                    generation.finish("error", "the engine's worker failed; see the server's log")
                else:
                    generation.finish("cancelled")
                self._count(generation)
            self._active.clear()
            self._waiting.clear()

    def _count(self, generation: Generation) -> None:
        """Add a finished generation to the totals; the lock is held."""
        finished = generation.finished
        assert finished is not None
        self._finished[finished.reason] += 1
        self._prompt_tokens += finished.usage.prompt_tokens
        self._completion_tokens += finished.usage.completion_tokens
        self._cached_tokens += finished.usage.cached_tokens


def usable_cores() -> int:
    """Cores this process may use (containers often allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
