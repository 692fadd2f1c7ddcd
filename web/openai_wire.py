"""OpenAI's chat completion objects, byte for byte as their clients read them, plus one field of ours, ``olympus``.

Shapes: the OpenAI API reference, and what its Python client was seen to accept. Reasoning, which that API does not
give out, goes by both names that clients look for, ``reasoning_content`` and ``reasoning``. No logic, no HTTP.
"""

from __future__ import annotations

import base64
import json
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from olympus.chat_types import ChatFinished, Delta, ModelCard, Step, TokenInfo
from workspace.channels import ToolCallDelta

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
        message: dict[str, Any] = {"role": "assistant", "content": finished.text, "refusal": None}
        message |= _reasoning(finished.reasoning)
        if finished.tool_calls:
            message["content"] = finished.text or None
            message["tool_calls"] = [
                self._call(place, call.name, call.arguments) for place, call in enumerate(finished.tool_calls)
            ]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": logprobs(tokens),
            "finish_reason": _finish(finished),
        }
        whole = self._head("chat.completion") | {"choices": [choice], "usage": usage(finished)}
        if finished.steps is not None:
            whole["system_fingerprint"] = packed(finished.steps)
        return whole | {"olympus": ours(finished)}

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A chunk of text, reasoning, or tool calls; several deltas become one."""
        tokens = [token for delta in deltas for token in delta.tokens]
        told = _reasoning("".join(delta.reasoning for delta in deltas))
        if calls := [call for delta in deltas for call in delta.tool_calls]:
            told["tool_calls"] = self._call_deltas(calls)
        text = "".join(delta.text for delta in deltas)
        if text or not told:
            told["content"] = text
        return self._chunk(told, logprobs(tokens or None))

    def last(self, finished: ChatFinished) -> dict[str, Any]:
        """The chunk that says why the answer ended, and what became of it."""
        return self._chunk({}, finish_reason=_finish(finished)) | {"olympus": ours(finished)}

    def usage_chunk(self, finished: ChatFinished) -> dict[str, Any]:
        """The chunk after the last, for clients that asked for the usage."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finished)}

    def _call(self, place: int, name: str, arguments: str) -> dict[str, Any]:
        call_id = f"call_{self.id.removeprefix('chatcmpl-')[:24]}{place}"  # clients allow 40 characters
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _call_deltas(self, deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
        """One entry per call; the first that is told of a call holds its name."""
        entries: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            if delta.name is not None:
                entries[delta.index] = {"index": delta.index} | self._call(delta.index, delta.name, "")
            entry = entries.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
            entry["function"]["arguments"] += delta.arguments
        return list(entries.values())

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


def usage(finished: ChatFinished) -> dict[str, Any]:
    """True counts, of the model's own tokens."""
    prompt, completion = finished.prompt_tokens, finished.completion_tokens
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if finished.reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": finished.reasoning_tokens}
    if finished.cartridge_slots:  # attended, but no prompt tokens: never hidden
        counts["cartridge_slots"] = finished.cartridge_slots
    if finished.workspace is not None:
        counts["workspace"] = dict(finished.workspace)
    return counts


def packed(steps: Sequence[Step]) -> str:
    """Tokasaurus' packed fingerprint: JSON text with base64 of little-endian numbers, for exact ids and numbers.

    As ``lm.fingerprint`` reads it. What was not asked for is null.
    """
    ids, width = [step.token_id for step in steps], min((len(step.top) for step in steps), default=0)
    chosen = [step.logprob for step in steps if step.logprob is not None]
    top = [pair for step in steps for pair in step.top[:width]]
    told = {
        "completion_ids": [ids],
        "packed_chosen_logprobs": [_base64("f", chosen)] if len(chosen) == len(ids) and ids else None,
        "packed_topk_indices": [_base64("i", [token for token, _ in top])] if top else None,
        "packed_topk_logprobs": [_base64("f", [value for _, value in top])] if top else None,
    }
    return json.dumps(told)


def _base64(kind: str, values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode("ascii")


def logprobs(tokens: Sequence[TokenInfo] | None) -> dict[str, Any] | None:
    """Log-probabilities, or None when they were not asked for."""
    if tokens is None:
        return None
    content = [_token(token) | {"top_logprobs": [_token(item) for item in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def ours(finished: ChatFinished) -> dict[str, Any]:
    """What OpenAI has no field for: which experience the exchange became, and where it belongs."""
    told: dict[str, Any] = {
        "experience_id": finished.experience_id,
        "domain": finished.domain,
        "session": finished.session_id,
        "ended_by": finished.finish_reason,
        "replayed": finished.replayed,
    }
    if finished.cartridges:
        told["cartridges"] = list(finished.cartridges)
    for name in ("memory", "trace", "compare"):
        value = getattr(finished, name)
        if value is not None:
            told[name] = value
    return told


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _finish(finished: ChatFinished) -> str:
    called = bool(finished.tool_calls) and finished.finish_reason == "stop"
    return "tool_calls" if called else _FINISH[finished.finish_reason]


def _token(token: TokenInfo) -> dict[str, Any]:
    exact = None if token.bytes is None else list(token.bytes)
    return {"token": token.token, "logprob": token.logprob, "bytes": exact}
