"""OpenAI's chat completion objects, byte for byte as their clients read them, plus one field of ours, ``olympus``.

Shapes: the OpenAI API reference, and what its Python client was seen to accept. No logic, no HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from olympus.chat_types import ChatFinished, Delta, ModelCard, TokenInfo

#: OpenAI knows no time limit; to a client it is a limit on the length like any other. ``olympus`` says which it was.
_FINISH = {"stop": "stop", "length": "length", "timeout": "length"}


def model_object(card: ModelCard, created: int) -> dict[str, Any]:
    """An entry of ``GET /v1/models``."""
    return {
        "id": card.id,
        "object": "model",
        "created": created,
        "owned_by": "olympus",
        "context_length": card.context_length,
    }


@dataclass(frozen=True, slots=True)
class Wire:
    """What all objects of one answer have in common."""

    model: ModelCard
    created: int
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def completion(self, finished: ChatFinished, tokens: Sequence[TokenInfo] | None) -> dict[str, Any]:
        """The whole answer of a request that does not stream."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": finished.text, "refusal": None},
            "logprobs": logprobs(tokens),
            "finish_reason": _FINISH[finished.finish_reason],
        }
        whole = self._head("chat.completion") | {"choices": [choice], "usage": usage(finished)}
        return whole | {"olympus": ours(finished)}

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A chunk of text; several deltas become one."""
        tokens = [token for delta in deltas for token in delta.tokens]
        return self._chunk({"content": "".join(delta.text for delta in deltas)}, logprobs(tokens or None))

    def last(self, finished: ChatFinished) -> dict[str, Any]:
        """The chunk that says why the answer ended, and what became of it."""
        return self._chunk({}, finish_reason=_FINISH[finished.finish_reason]) | {"olympus": ours(finished)}

    def usage_chunk(self, finished: ChatFinished) -> dict[str, Any]:
        """The chunk after the last, for clients that asked for the usage."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finished)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.id,
            "system_fingerprint": f"fp_{self.model.fingerprint[:12]}",
        }

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.with_usage else chunk


def usage(finished: ChatFinished) -> dict[str, int]:
    """True counts, of the model's own tokens."""
    prompt, completion = finished.prompt_tokens, finished.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logprobs(tokens: Sequence[TokenInfo] | None) -> dict[str, Any] | None:
    """Log-probabilities, or None when they were not asked for."""
    if tokens is None:
        return None
    content = [_token(token) | {"top_logprobs": [_token(item) for item in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def ours(finished: ChatFinished) -> dict[str, Any]:
    """What OpenAI has no field for: which experience the exchange became, and where it belongs."""
    return {
        "experience_id": finished.experience_id,
        "domain": finished.domain,
        "session": finished.session_id,
        "ended_by": finished.finish_reason,
        "replayed": finished.replayed,
    }


def _token(token: TokenInfo) -> dict[str, Any]:
    exact = None if token.bytes is None else list(token.bytes)
    return {"token": token.token, "logprob": token.logprob, "bytes": exact}
