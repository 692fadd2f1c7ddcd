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
    if generation.cache is None:
        generation.cache = forward.new_cache()
    if generation.prefilled:
        fed = generation.token_ids[-1:]
    else:
        fed = list(generation.prompt_ids[generation.position : generation.position + prefill_chunk])
    logits = _feed(generation, forward, fed)
    if generation.prefilled:
        generation.accept(generation.sampler.choose(logits), eos_ids)


def _feed(generation: Generation, forward: Forward, token_ids: list[int]) -> torch.Tensor:
    """Run the model on ``token_ids`` after what is cached; logits of the last one [V]."""
    cache = generation.cache
    assert cache is not None
    start = generation.position
    extra = {} if generation.context is None else generation.context.forward_kwargs(start, len(token_ids))
    logits = forward(token_ids, cache, start, extra)
    generation.position = start + len(token_ids)
    return logits
