"""What every language-model client takes and gives: messages in, a reply out, and a trace where it is asked for.

A client is anything with ``call``; one that can also say what the model's distribution was at every step has
``call_with_trace``, which makes it a teacher. Numbers here are exact ids and natural logarithms at temperature 1.
This module holds no client and imports none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lm.errors import InvalidTrace

Source = Literal["local", "wandb", "huggingface"]

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reply:
    """One answer. ``cartridge_slots`` are attended but not in ``prompt_tokens``: what they cost is never hidden.

    ``completion_tokens`` counts the token that ended the answer, as OpenAI does. ``ttft_seconds`` is the time to the
    first token, None where the server does not show it.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    cartridge_slots: int = 0
    seconds: float = 0.0
    ttft_seconds: float | None = None


@dataclass(frozen=True)
class Trace:
    """What the model said, token for token, and its K most probable tokens at every step, most probable first.

    ``token_ids`` [T] includes the token that ended the answer. ``topk_token_ids`` is [T, K] int32 and
    ``topk_logprobs`` [T, K] float32: natural logarithms of the model's own distribution, at temperature 1.
    Raises ``InvalidTrace`` when these contradict each other.
    """

    token_ids: tuple[int, ...]
    topk_token_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]

    def __post_init__(self) -> None:
        ids, logprobs = self.topk_token_ids, self.topk_logprobs
        if ids.ndim != 2 or ids.shape != logprobs.shape or ids.shape[0] != len(self.token_ids):
            raise InvalidTrace(
                f"a trace of {len(self.token_ids)} tokens needs ids and log-probabilities [T, K] of one shape, "
                f"got {list(ids.shape)} and {list(logprobs.shape)}"
            )
        if ids.dtype != np.int32 or logprobs.dtype != np.float32:
            raise InvalidTrace(f"a trace holds int32 ids and float32 logarithms, got {ids.dtype} and {logprobs.dtype}")
        if np.isnan(logprobs).any() or (logprobs > 1e-3).any():  # rounding may leave a little above 0
            raise InvalidTrace("a trace holds log-probabilities that are NaN or above 0")
        if ids.size and int(ids.min()) < 0:
            raise InvalidTrace("a trace holds negative token ids")


@dataclass(frozen=True)
class CartridgeRef:
    """Which cartridge to attach, in the words of the Tokasaurus API."""

    id: str
    source: Source = "local"
    force_redownload: bool = False

    def as_json(self) -> dict[str, Any]:
        """The object that goes into a request's ``cartridges``."""
        return {"id": self.id, "source": self.source, "force_redownload": self.force_redownload}


@runtime_checkable
class LanguageModel(Protocol):
    """A client. Its errors are ``lm.errors.LanguageModelError``. Safe to use from any thread."""

    name: str

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
        """The answer to ``messages`` (role, content), with ``cartridges`` attended before them."""

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        """The greedy answer and the model's ``top_logprobs`` most probable tokens at each of its steps."""

    def close(self) -> None:
        """Give back connections, or the model that it loaded; a client is of no use afterwards."""


@runtime_checkable
class MeasuringModel(Protocol):
    """A client that has its model's tokenizer, so that prompts can be cut to what fits instead of being estimated."""

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the prompt that ``messages`` become, without cartridges."""

    def context_length(self) -> int:
        """Prompt, cartridges and answer together, in tokens."""
