"""OpenAI's chat completion objects, byte for byte as their clients read them, plus one field of ours, ``olympus``.

Shapes: the OpenAI API reference, and what its Python client was seen to accept. Reasoning, which that API does not
give out, goes by both names that clients look for, ``reasoning_content`` and ``reasoning``. No logic, no HTTP.
"""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olympus.chat_types import ChatFinished, Choice, Delta, ModelCard, Step, TokenInfo
from web import sse
from workspace.channels import ToolCallDelta

#: OpenAI knows no time limit; to a client it is a limit on the length like any other. ``olympus`` says which it was.
_FINISH = {"stop": "stop", "length": "length", "timeout": "length"}


#: The tokens of each choice, by its index.
Tokens = Mapping[int, Sequence[TokenInfo]]


def model_object(card: ModelCard, created: int) -> dict[str, Any]:
    """An entry of ``GET /v1/models``."""
    return {
        "id": card.id,
        "object": "model",
        "created": created,
        "owned_by": "olympus",
        "context_length": card.context_length,
    }


def embedding_object(name: str, created: int) -> dict[str, Any]:
    """An entry of ``GET /v1/models`` for a model that only embeds."""
    return {"id": name, "object": "model", "created": created, "owned_by": "olympus", "task": "embedding"}


class PlainStream:
    """A stream of chunks as unnamed events, which ``[DONE]`` ends; an error is a chunk of its own, and ends it, too."""

    __slots__ = ()
    closing = "data: [DONE]\n\n"

    def failure(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """The error object is the chunk."""
        return [error]

    def framed(self, chunk: dict[str, Any]) -> str:
        """One line of data."""
        return sse.event(chunk)


@dataclass(frozen=True, slots=True)
class Wire(PlainStream):
    """What all objects of one answer have in common."""

    model: ModelCard
    created: int = field(default_factory=lambda: int(time.time()))
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def completion(self, finished: ChatFinished, tokens: Tokens | None) -> dict[str, Any]:
        """The whole answer of a request that does not stream; ``tokens`` of each choice for its log-probabilities."""
        choices = [
            self._choice(index, choice, None if tokens is None else tokens.get(index, ()))
            for index, choice in enumerate(finished.choices)
        ]
        whole = self._head("chat.completion") | {"choices": choices, "usage": usage(finished)}
        if finished.steps is not None:
            whole["system_fingerprint"] = packed([choice.steps or () for choice in finished.choices])
        return whole | {"olympus": ours(finished)}

    def _choice(self, index: int, choice: Choice, tokens: Sequence[TokenInfo] | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        message |= _reasoning(choice.reasoning)
        if choice.tool_calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [
                self._call(index, place, call.name, call.arguments) for place, call in enumerate(choice.tool_calls)
            ]
        told = {"index": index, "message": message, "logprobs": logprobs(tokens)}
        return told | {"finish_reason": finish_reason(choice)}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that open a stream."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def told(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """One chunk for each choice that ``deltas`` speak of."""
        return [self.delta(of_one) for of_one in by_choice(deltas)]

    def ending(self, finished: ChatFinished) -> list[dict[str, Any]]:
        """The chunks that say why each choice ended, and the usage, if that was asked for."""
        chunks = [
            self._chunk(index, {}, finish_reason=finish_reason(choice)) for index, choice in enumerate(finished.choices)
        ]
        chunks[0]["olympus"] = ours(finished)
        if self.with_usage:
            chunks.append(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finished)})
        return chunks

    def delta(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A chunk of text, reasoning, or tool calls; several deltas of one choice become one."""
        index = deltas[0].index
        tokens = [token for delta in deltas for token in delta.tokens]
        told = _reasoning("".join(delta.reasoning for delta in deltas))
        if calls := [call for delta in deltas for call in delta.tool_calls]:
            told["tool_calls"] = self._call_deltas(index, calls)
        text = "".join(delta.text for delta in deltas)
        if text or not told:
            told["content"] = text
        return self._chunk(index, told, logprobs(tokens or None))

    def _call(self, index: int, place: int, name: str, arguments: str) -> dict[str, Any]:
        number = f"{index}_{place}" if index else f"{place}"
        call_id = f"call_{self.id.removeprefix('chatcmpl-')[:24]}{number}"  # clients allow 40 characters
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _call_deltas(self, index: int, deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
        """One entry per call; the first that is told of a call holds its name."""
        entries: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            if delta.name is not None:
                entries[delta.index] = {"index": delta.index} | self._call(index, delta.index, delta.name, "")
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
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.with_usage else chunk


def usage(finished: ChatFinished) -> dict[str, Any]:
    """True counts, of the model's own tokens; those of all choices together."""
    prompt = finished.prompt_tokens
    completion = sum(choice.completion_tokens for choice in finished.choices)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }
    if finished.reasoning_tokens is not None:
        reasoning = sum(choice.reasoning_tokens or 0 for choice in finished.choices)
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    if finished.cartridge_slots:  # attended, but no prompt tokens: never hidden
        counts["cartridge_slots"] = finished.cartridge_slots
    if finished.workspace is not None:
        counts["workspace"] = dict(finished.workspace)
    return counts


def packed(choices: Sequence[Sequence[Step]]) -> str:
    """Tokasaurus' packed fingerprint: JSON text with base64 of little-endian numbers, for exact ids and numbers.

    As ``lm.fingerprint`` reads it; each list has one entry per choice. What was not asked for is null.
    """
    ids = [[step.token_id for step in steps] for steps in choices]
    chosen = [[step.logprob for step in steps if step.logprob is not None] for steps in choices]
    tops = [_top(steps) for steps in choices]
    exact = all(of_one and len(of_one) == len(numbers) for of_one, numbers in zip(chosen, ids, strict=True))
    told = {
        "completion_ids": ids,
        "packed_chosen_logprobs": [_base64("f", of_one) for of_one in chosen] if exact else None,
        "packed_topk_indices": [_base64("i", [token for token, _ in top]) for top in tops] if all(tops) else None,
        "packed_topk_logprobs": [_base64("f", [value for _, value in top]) for top in tops] if all(tops) else None,
    }
    return json.dumps(told)


def _top(steps: Sequence[Step]) -> list[tuple[int, float]]:
    """The alternatives of all steps in a row, equally many of each."""
    width = min((len(step.top) for step in steps), default=0)
    return [pair for step in steps for pair in step.top[:width]]


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


def by_choice(deltas: Sequence[Delta]) -> list[list[Delta]]:
    """``deltas`` apart by their choice, in the order of the indices."""
    found: dict[int, list[Delta]] = {}
    for delta in deltas:
        found.setdefault(delta.index, []).append(delta)
    return [found[index] for index in sorted(found)]


def finish_reason(choice: Choice) -> str:
    """Why a choice ended, in OpenAI's words."""
    called = bool(choice.tool_calls) and choice.finish_reason == "stop"
    return "tool_calls" if called else _FINISH[choice.finish_reason]


def _token(token: TokenInfo) -> dict[str, Any]:
    exact = None if token.bytes is None else list(token.bytes)
    return {"token": token.token, "logprob": token.logprob, "bytes": exact}
