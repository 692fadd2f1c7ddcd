"""The engine of this process as a language-model client: exact ids, exact log-probabilities, no HTTP.

Cartridges come as prefixes from a function ``resolve(id)``, given by whoever owns them; this floor knows no registry.
Several are joined in the order of their ids, as Tokasaurus does, so that one request means the same everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from lm.chat_api import check_limits, plain_messages
from lm.errors import GenerationFailed, InvalidCall, LanguageModelError, Unavailable, UnknownCartridge
from lm.types import CartridgeRef, Messages, Reply, Trace
from workspace.engine import Engine
from workspace.errors import EngineBusy, EngineStopped, PrefixMismatch, RequestError
from workspace.generation import Finished, Generation, TokenChunk
from workspace.prefix import KVPrefix, join_prefixes
from workspace.sampling import SampledToken, SamplingParams

#: Gives the prefix of a cartridge id; what it raises for one that cannot be had becomes ``UnknownCartridge``.
Resolve = Callable[[str], KVPrefix]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between tries while the engine's queue is full


class EngineClient:
    """See the module docstring. Does not start or stop the engine. Safe to use from any thread.

    A call waits at most ``timeout`` seconds, a full waiting queue included, and is cancelled then.
    """

    def __init__(self, engine: Engine, *, resolve: Resolve | None = None, timeout: float = 600.0):
        self.name = f"engine:{engine.loaded.name}"
        self._engine = engine
        self._resolve = resolve
        self._timeout = timeout

    def call(
        self,
        messages: Messages,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        cartridges: Sequence[CartridgeRef] = (),
    ) -> Reply:
        """The answer. Raises a ``LanguageModelError``."""
        check_limits(max_tokens=max_tokens, temperature=temperature)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=tuple(stop))
        reply, _ = self._run(messages, params, cartridges)
        return reply

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        """The greedy answer with every token, the one that ended it included, and K candidates at each step."""
        check_limits(max_tokens=max_tokens, top_logprobs=top_logprobs)
        width = min(top_logprobs, self._engine.loaded.vocabulary_size)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=True, top_logprobs=width)
        reply, steps = self._run(messages, params, cartridges)
        ids = [[item.token_id for item in step.top_logprobs] for step in steps]
        values = [[item.logprob for item in step.top_logprobs] for step in steps]
        shape = (len(steps), width)
        trace = Trace(
            tuple(step.token_id for step in steps),
            np.asarray(ids, np.int32).reshape(shape),
            np.minimum(np.asarray(values, np.float32), 0.0).reshape(shape),
        )
        return reply, trace

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the prompt that ``messages`` become. Raises ``InvalidCall``."""
        try:
            return len(self._engine.render(plain_messages(messages)))
        except RequestError as error:
            raise InvalidCall(str(error)) from error

    def context_length(self) -> int:
        """Of the model, in tokens."""
        return self._engine.loaded.context_length

    def close(self) -> None:
        """Nothing: the engine is its owner's."""

    def _run(
        self, messages: Messages, params: SamplingParams, cartridges: Sequence[CartridgeRef]
    ) -> tuple[Reply, list[SampledToken]]:
        started = time.perf_counter()
        plain = plain_messages(messages)
        try:
            prefix = self._prefix(cartridges)
            generation = self._submit(plain, params, prefix, started + self._timeout)
        except PrefixMismatch as error:
            raise UnknownCartridge("+".join(item.id for item in cartridges), str(error)) from error
        except RequestError as error:
            raise InvalidCall(str(error)) from error
        except EngineStopped as error:
            raise Unavailable(self.name, 1, str(error)) from error
        finished, steps = self._follow(generation, started + self._timeout)
        reply = Reply(
            text=finished.text,
            prompt_tokens=finished.usage.prompt_tokens,
            completion_tokens=finished.usage.completion_tokens,
            finish_reason=finished.reason,
            cartridge_slots=finished.usage.cartridge_slots,
            seconds=time.perf_counter() - started,
            ttft_seconds=finished.timings.ttft_s,
        )
        return reply, steps

    def _submit(
        self, messages: list[dict[str, str]], params: SamplingParams, prefix: KVPrefix | None, deadline: float
    ) -> Generation:
        """Queue it, waiting for a place: many threads may ask at once, and the queue is short on purpose."""
        pause, tries = _FIRST_PAUSE, 1
        while True:
            try:
                return self._engine.submit(messages, params, prefix=prefix)
            except EngineBusy as error:
                if time.perf_counter() + pause > deadline:
                    raise Unavailable(self.name, tries, str(error)) from error
            time.sleep(pause)
            pause, tries = min(2 * pause, _LONGEST_PAUSE), tries + 1

    def _follow(self, generation: Generation, deadline: float) -> tuple[Finished, list[SampledToken]]:
        steps: list[SampledToken] = []
        try:
            for event in generation.stream(timeout=0.2):
                if isinstance(event, Finished):
                    if event.reason in ("error", "cancelled"):
                        raise GenerationFailed(f"{self.name}: {event.error or 'the engine is stopping'}")
                    return event, steps if event.ending is None else [*steps, event.ending]
                if isinstance(event, TokenChunk) and event.token_id is not None:
                    steps.append(SampledToken(event.token_id, event.logprob, event.top_logprobs))
                if time.perf_counter() > deadline:
                    raise Unavailable(self.name, 1, f"no end within {self._timeout:g} s")
        finally:
            generation.cancel()  # harmless when it has ended
        raise AssertionError("a stream always ends with Finished")

    def _prefix(self, cartridges: Sequence[CartridgeRef]) -> KVPrefix | None:
        if not cartridges:
            return None
        prefixes = [self._find(item) for item in sorted(cartridges, key=lambda item: item.id)]
        return prefixes[0] if len(prefixes) == 1 else join_prefixes(prefixes)

    def _find(self, wanted: CartridgeRef) -> KVPrefix:
        if wanted.source != "local":
            raise UnknownCartridge(wanted.id, f"source {wanted.source!r}: import it first, then name it as local")
        if self._resolve is None:
            raise UnknownCartridge(wanted.id, f"{self.name} was given no function that finds cartridges (resolve)")
        try:
            return self._resolve(wanted.id)
        except LanguageModelError:
            raise
        except LookupError as error:  # a mapping's, whose message is only the id again
            raise UnknownCartridge(wanted.id) from error
        except (RuntimeError, ValueError, OSError) as error:  # a registry's own words: not found, damaged, ...
            raise UnknownCartridge(wanted.id, str(error)) from error
