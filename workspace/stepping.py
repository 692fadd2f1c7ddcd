"""One step of one generation: a chunk of its prompt, or its next token.

A step is the unit of scheduling, of cancellation and of failure. Each generation has its own cache, so a step never
sees another request; that makes an answer independent of what runs beside it, to the bit. Batching several
generations into one pass belongs here, below the same ``advance``.
"""

from __future__ import annotations

import torch

from workspace.forward import Forward
from workspace.generation import Generation


def advance(generation: Generation, forward: Forward, *, eos_ids: frozenset[int], prefill_chunk: int) -> None:
    """Do one step. Finishes the generation when it was cancelled, hits a stop, or reaches its limit."""
    if generation.cancelled:
        generation.finish("cancelled")
        return
    context = generation.context
    if generation.cache is None:
        generation.cache = forward.new_cache(generation.slots + len(generation.prompt_ids) + generation.limit)
        if generation.prefix is not None:
            generation.prefix.fill(generation.cache)
        if context is not None:
            context.begin(generation.cache, generation.prompt_ids)
    if generation.prefilled:
        fed = generation.token_ids[-1:]
    else:
        most = prefill_chunk if context is None else min(prefill_chunk, context.most_tokens or prefill_chunk)
        fed = list(generation.prompt_ids[generation.position : generation.position + most])
    logits = _feed(generation, forward, fed)
    if not generation.prefilled:
        return
    sampled = generation.sampler.choose(logits)
    generation.accept(sampled, eos_ids)
    if context is not None and generation.finished is None and context.chosen(logits, sampled.token_id):
        generation.finish("stop")


def _feed(generation: Generation, forward: Forward, token_ids: list[int]) -> torch.Tensor:
    """Run the model on ``token_ids`` after what is cached; logits of the last one [V]."""
    cache, context = generation.cache, generation.context
    start = generation.slots + generation.position  # a prefix owns the positions before
    assert cache is not None
    if context is None:
        logits = forward(token_ids, cache, start, {})
    else:
        logits = forward(token_ids, cache, start, context.forward_kwargs(start, len(token_ids)))
        context.fed(start, len(token_ids))
    generation.position += len(token_ids)
    return logits
