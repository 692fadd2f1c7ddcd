"""Answers side by side: the same request with the workspace and without it.

Both start from the same seed and are written in turns of one token, so that their speeds can be compared. What is
remembered is the answer with the workspace (``chat.py``).
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from olympus.chat_types import WorkspaceWish

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.generation import Finished, Generation
    from workspace.sampling import SamplingParams


def seeded(params: SamplingParams, wish: WorkspaceWish | None) -> SamplingParams:
    """With the workspace's seed where the request has none of its own; one for both sides of a comparison."""
    if wish is None:
        return params
    if params.seed is None and wish.seed is not None:
        params = replace(params, seed=wish.seed)
    if wish.compare:
        seed = secrets.randbits(53) if params.seed is None else params.seed
        params = replace(params, seed=seed, logprobs=True)
    return params


@dataclass(frozen=True, slots=True)
class Side:
    """One of two answers. ``logprob`` is the mean over its tokens, by the model as it served it."""

    text: str
    finish_reason: str
    completion_tokens: int
    prompt_tokens: int
    ttft_s: float | None
    tokens_per_second: float | None
    mean_logprob: float | None

    @classmethod
    def of(cls, finished: Finished, logprobs: Sequence[float]) -> Side:
        """From a generation's end."""
        count, seconds = finished.usage.completion_tokens, finished.timings.decode_s
        return cls(
            text=finished.text,
            finish_reason=finished.reason,
            completion_tokens=count,
            prompt_tokens=finished.usage.prompt_tokens,
            ttft_s=None if finished.timings.ttft_s is None else round(finished.timings.ttft_s, 4),
            tokens_per_second=round((count - 1) / seconds, 3) if seconds > 0 and count > 1 else None,
            mean_logprob=round(statistics.fmean(logprobs), 4) if logprobs else None,
        )


class Baseline:
    """The other side of a comparison: a second generation of the same request, without the workspace."""

    def __init__(self, generation: Generation):
        self._generation = generation

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._generation.cancel()

    def side(self, timeout: float) -> Side | None:
        """Wait at most ``timeout`` seconds for its end; None while it has not ended."""
        from workspace.generation import TokenChunk

        try:
            finished = self._generation.result(timeout)
        except TimeoutError:
            return None
        chunks = [event for event in self._generation.stream(0.0) if isinstance(event, TokenChunk)]
        return Side.of(finished, [chunk.logprob for chunk in chunks if chunk.logprob is not None])
