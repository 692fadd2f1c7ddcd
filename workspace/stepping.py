"""One round of the engine: the next token of every generation that is decoding, and a chunk of prompts.

Generations that are decoding share one forward pass (``Forward.together``): each has its own cache, sampler, random
generator, grammar, prefix and workspace, and its row attends to its own cache only. What is computed of several rows at
once may round differently than alone, so in bfloat16 an answer can depend on its neighbours where two tokens are nearly
equal. With ``batching="exact"`` every generation takes the stock model's own passes alone, and an answer is independent
of what runs beside it and of what ran before, to the bit.

A generation is stepped alone where its pass cannot be shared: the first pass after its prompt, a context that carries
other things than a ``Context``, layers of unusual kinds. An error ends the generation that it comes from; when a shared
pass fails, its rows are computed alone, which shows whose fault it is.

The prompt whose turn is the longest ago gets a chunk; what a chunk leaves goes to others that fit into it whole. So a
short prompt waits for one chunk of each longer one and not for their ends, and nobody waits for ever.

A prompt is read from where the store of earlier prompts (``prefix_cache.py``) ends. One pass ends at the prompt's last
whole block, so that the same prompt takes the same last pass when its beginning comes from the store: the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from workspace.context import Context
from workspace.forward import Forward, Row
from workspace.generation import Generation
from workspace.models import LoadedModel
from workspace.prefix_cache import PrefixCache
from workspace.row_cache import as_row

logger = logging.getLogger(__name__)

Batching = Literal["batched", "exact"]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A pass to take: ``token_ids`` from position ``start`` on, with what the request's context carries."""

    generation: Generation
    token_ids: list[int]
    start: int
    carried: Mapping[str, Any]

    def row(self) -> Row | None:
        """The same as a row of a shared pass; None where it cannot be one."""
        cache = as_row(self.generation.cache)
        if cache is None or len(self.token_ids) != 1 or self.carried.keys() - {"workspace"}:
            return None
        context = self.carried.get("workspace")
        if not isinstance(context, Context | None):
            return None
        return Row(self.token_ids[0], self.start, cache, context)


class Stepper:
    """Advances generations; used by the engine's thread only. ``store`` None: every prompt is read whole."""

    def __init__(
        self,
        loaded: LoadedModel,
        forward: Forward,
        *,
        prefill_chunk: int,
        batching: Batching,
        store: PrefixCache | None = None,
    ):
        self._forward = forward
        self._loaded = loaded
        self._prefill_chunk = prefill_chunk
        self._exact = batching == "exact"
        self._shares: bool | None = False if self._exact else None  # None: not tried yet
        self._store = store
        self._rounds = 0
        self.passes = 0  #: over tokens of answers
        self.rows = 0  #: tokens of answers that they took

    def round(self, active: Sequence[Generation], stopping: Callable[[], bool]) -> None:
        """End what was cancelled, give a token to all that are decoding, then read ``prefill_chunk`` prompt tokens."""
        self._rounds += 1
        for generation in active:
            if generation.cancelled:
                generation.finish("cancelled")
        running = [item for item in active if item.finished is None]
        reading = [item for item in running if not item.prefilled]
        self._decode([item for item in running if item.prefilled], stopping)
        self._read(reading, stopping)

    def _read(self, generations: Sequence[Generation], stopping: Callable[[], bool]) -> None:
        for generation in generations:
            generation.turn = generation.turn or self._rounds
        left = self._prefill_chunk
        for place, generation in enumerate(sorted(generations, key=lambda item: item.turn)):
            if place > 0 and len(generation.prompt_ids) - generation.position > left:
                continue
            # Mostly one pass; two where one has to end at a block.
            while not generation.prefilled and len(self._chunk(generation)) <= left and not stopping():
                step = self._prepared(generation)
                if step is None:
                    break
                left -= len(step.token_ids)
                generation.turn = self._rounds + 1
                self._take(step)

    def _decode(self, generations: Sequence[Generation], stopping: Callable[[], bool]) -> None:
        alone = list(generations)
        if generations and self._may_share():
            candidates = [item for item in generations if as_row(item.cache) is not None]
            alone = [item for item in generations if as_row(item.cache) is None]
            self._take_together([step for item in candidates if (step := self._prepared(item)) is not None])
        for generation in alone:
            if stopping():
                return
            step = self._prepared(generation)
            if step is not None:
                self._take(step)

    def _may_share(self) -> bool:
        if self._shares is None:
            self._shares = self._forward.rows_agree()
        return self._shares and self._forward.has_rows

    def _take_together(self, steps: Sequence[_Step]) -> None:
        rows = {id(step): row for step in steps if (row := step.row()) is not None}
        shared = [step for step in steps if id(step) in rows]
        logits = None
        if shared:
            try:
                logits = self._forward.together([rows[id(step)] for step in shared])
                self.passes += 1
                self.rows += len(shared)
            except Exception:  # one row's context may be wrong for the model; alone it fails alone
                logger.exception("a pass of %d generations failed; each is computed alone", len(shared))
        for step in steps:
            if step in shared and logits is not None:
                self._complete(step, logits[shared.index(step)])
            else:
                self._take(step)
        if shared and logits is None and all(_went_well(step.generation) for step in shared):
            logger.error("no generation failed alone: passes are not shared any more")
            self._shares = False

    def _prepared(self, generation: Generation) -> _Step | None:
        """The next pass of ``generation``, its cache made where it has none; None when that failed and ended it."""
        try:
            if generation.finished is not None:  # a pass failed, or the engine was stopped from another thread
                return None
            if generation.cache is None:
                self._begin(generation)
            context = generation.context
            fed = generation.token_ids[-1:] if generation.prefilled else self._chunk(generation)
            start = generation.slots + generation.position  # a prefix owns the positions before
            carried = {} if context is None else context.forward_kwargs(start, len(fed))
            return _Step(generation, fed, start, carried)
        except Exception as error:
            _fail(generation, error)
            return None

    def _begin(self, generation: Generation) -> None:
        prompt = generation.slots + len(generation.prompt_ids)
        cache = self._forward.new_cache(prompt + generation.limit, soon=prompt + min(generation.limit, 256))
        if generation.prefix is not None:
            generation.prefix.fill(cache)
        if generation.context is not None:  # which changes what the model makes of the text, or wants to see it
            generation.context.begin(cache, generation.prompt_ids)
        elif self._store is not None:
            chain = self._store.open(generation.prefix_id, generation.prompt_ids, cache, generation.slots)
            if chain is not None:
                generation.chain = chain
                generation.position = generation.cached_tokens = chain.reused
        generation.cache = cache

    def _chunk(self, generation: Generation) -> list[int]:
        context, begin = generation.context, generation.position
        most = self._prefill_chunk if context is None else min(self._prefill_chunk, context.most_tokens or 1 << 30)
        end = min(begin + most, len(generation.prompt_ids))
        if generation.chain is not None and self._store is not None:
            last_block = (len(generation.prompt_ids) - 1) // self._store.block * self._store.block
            if begin < last_block < end:
                end = last_block
        return list(generation.prompt_ids[begin:end])

    def _take(self, step: _Step) -> None:
        """The pass alone, and what follows from it."""
        cache = step.generation.cache
        if cache is None:  # ended from another thread
            return
        try:
            logits = self._forward(step.token_ids, cache, step.start, step.carried)
        except Exception as error:  # whatever a request, its context or its tokens provoke stays with that request
            _fail(step.generation, error)
            return
        if step.generation.prefilled:
            self.passes += 1
            self.rows += 1
        self._complete(step, logits)

    def _complete(self, step: _Step, logits: torch.Tensor) -> None:
        """Note the pass, and where the prompt is in the cache choose the next token from its ``logits`` [V]."""
        generation, context = step.generation, step.generation.context
        try:
            answering = generation.prefilled
            if context is not None:
                context.fed(step.start, len(step.token_ids))
            generation.position += len(step.token_ids)
            self._keep(generation, answering)
            if not generation.prefilled:
                return
            sampled = generation.sampler.choose(logits)
            generation.accept(sampled, self._loaded.eos_ids)
            if context is not None and generation.finished is None and context.chosen(logits, sampled.token_id):
                generation.finish("stop")
        except Exception as error:
            _fail(generation, error)

    def _keep(self, generation: Generation, answering: bool) -> None:
        """Let the store have what the pass made; in exact mode only what it makes of whole chunks of a prompt."""
        chain, cache = generation.chain, generation.cache
        if chain is None or cache is None or (answering and self._exact) or not chain.due(generation.position):
            return
        known = (*generation.prompt_ids, *generation.token_ids)
        chain.extend(known[: generation.position], cache, answering=answering)


def _fail(generation: Generation, error: Exception) -> None:
    logger.error("generation %d failed", generation.id, exc_info=error)
    generation.finish("error", f"{type(error).__name__}: {error}")


def _went_well(generation: Generation) -> bool:
    return generation.finished is None or generation.finished.reason != "error"
