"""OpenAI's older completion objects (``text_completion``), with log-probabilities in their older shape.

``text_offset`` counts characters from the beginning of the completion's text, as vLLM has it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from olympus.chat_types import ChatFinished, Delta, ModelCard, TokenInfo
from web.openai_wire import PlainStream, Tokens, by_choice, finish_reason, ours, packed, usage


@dataclass(frozen=True, slots=True)
class CompletionWire(PlainStream):
    """What all objects of one completion have in common."""

    model: ModelCard
    created: int = field(default_factory=lambda: int(time.time()))
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    _offsets: dict[int, int] = field(default_factory=dict)  #: characters of each choice that a stream has told of

    def completion(self, finished: ChatFinished, tokens: Tokens | None) -> dict[str, Any]:
        """The whole answer of a request that does not stream."""
        choices = [
            _choice(index, choice.text, None if tokens is None else tokens.get(index, ()), 0, finish_reason(choice))
            for index, choice in enumerate(finished.choices)
        ]
        whole = self._object(choices) | {"usage": usage(finished), "olympus": ours(finished)}
        if finished.steps is not None:
            whole["system_fingerprint"] = packed([choice.steps or () for choice in finished.choices])
        return whole

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Nothing: this dialect has no first chunk."""
        return []

    def told(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """One chunk for each choice that ``deltas`` speak of."""
        return [self._told(of_one) for of_one in by_choice(deltas)]

    def ending(self, finished: ChatFinished) -> list[dict[str, Any]]:
        """The chunks that say why each choice ended, and the usage, if that was asked for."""
        chunks = [
            self._chunk([_choice(index, "", None, 0, finish_reason(choice))])
            for index, choice in enumerate(finished.choices)
        ]
        chunks[0]["olympus"] = ours(finished)
        if self.with_usage:
            chunks.append(self._object([]) | {"usage": usage(finished)})
        return chunks

    def _told(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        index = deltas[0].index
        tokens = [token for delta in deltas for token in delta.tokens]
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.token) for token in tokens)
        text = "".join(delta.text for delta in deltas)
        return self._chunk([_choice(index, text, tokens or None, offset, None)])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object(choices)
        return chunk | {"usage": None} if self.with_usage else chunk

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": f"fp_{self.model.fingerprint[:12]}",
            "choices": choices,
        }


def _choice(
    index: int, text: str, tokens: Sequence[TokenInfo] | None, offset: int, reason: str | None
) -> dict[str, Any]:
    numbers = None if tokens is None else _logprobs(tokens, offset)
    return {"index": index, "text": text, "logprobs": numbers, "finish_reason": reason}


def _logprobs(tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
    """Parallel lists; alternatives by their text, of equal texts the more probable one."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{item.token: item.logprob for item in reversed(token.top)} for token in tokens],
        "text_offset": offsets,
    }
