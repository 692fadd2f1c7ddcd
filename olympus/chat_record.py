"""Between a chat and its experience in the history: what is recorded of an answer, and an answer from a record.

Pure functions; who writes, and when, is in ``chat.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from memory.history import NewExperience, Record
from olympus.chat_types import ChatFinished, ChatRequest, Choice, Delta, ModelCard
from workspace.channels import ToolCall, ToolCallDelta

PREFIX = "chat:"  #: of the request ids of chats in the history


def to_experience(
    request: ChatRequest, said: str, model: ModelCard, key: str | None, finished: ChatFinished
) -> NewExperience | None:
    """The exchange as it is stored, or None when there is nothing to remember. ``said``: what was asked, as a text."""
    cancelled = finished.finish_reason == "cancelled"
    action = finished.text
    if (cancelled and not action) or not (said or action):
        return None
    return NewExperience(
        said,
        action,
        domain=finished.domain,
        source="chat",
        session_id=request.session_id,
        messages=[dict(message) for message in request.messages] or None,
        meta=_meta(request, model, key, finished),
        # A retry of what was cut off shall be answered anew, so only a whole answer claims the key.
        request_id=None if cancelled and key is not None else request_id(request),
    )


def from_record(record: Record) -> tuple[Delta | ChatFinished, ...]:
    """The recorded answer as a client is told it: each choice in one piece, and the end."""
    calls, reasoning = _calls(record.meta), record.meta.get("reasoning", "")
    finished = ChatFinished(
        finish_reason=record.meta["finish_reason"],
        text=record.action,
        prompt_tokens=record.meta["prompt_tokens"],
        completion_tokens=record.meta["completion_tokens"],
        experience_id=record.id,
        domain=record.domain,
        session_id=record.session_id,
        timings={},
        replayed=True,
        reasoning=reasoning,
        reasoning_tokens=record.meta.get("reasoning_tokens"),
        tool_calls=calls,
        workspace=record.meta.get("workspace"),
        cartridges=tuple(record.meta.get("cartridges", ())),
        memory=record.meta.get("memory"),
        cartridge_slots=record.meta.get("cartridge_slots", 0),
        cached_tokens=record.meta.get("cached_tokens", 0),
        others=tuple(
            Choice(
                finish_reason=noted["finish_reason"],
                text=noted["text"],
                completion_tokens=noted["completion_tokens"],
                reasoning=noted.get("reasoning", ""),
                reasoning_tokens=noted.get("reasoning_tokens"),
                tool_calls=_calls(noted),
            )
            for noted in record.meta.get("choices", ())
        ),
    )
    return (*(_told(place, choice) for place, choice in enumerate(finished.choices)), finished)


def _calls(noted: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(**call) for call in noted.get("tool_calls", ()))


def _told(place: int, choice: Choice) -> Delta:
    calls = tuple(ToolCallDelta(number, call.name, call.arguments) for number, call in enumerate(choice.tool_calls))
    return Delta(choice.text, reasoning=choice.reasoning, tool_calls=calls, index=place)


def said(request: ChatRequest, tokenizer: Any) -> str:
    """What was asked, as a text: the last message, or the text to go on with."""
    if request.prompt is None:
        return observation(request.messages)
    if isinstance(request.prompt, str):
        return request.prompt
    try:
        return _storable(tokenizer.decode(list(request.prompt)))
    except (OverflowError, TypeError):  # ids that no vocabulary has, which the engine refuses
        return ""


def observation(messages: tuple[Mapping[str, Any], ...]) -> str:
    """The last thing the user said; without a user, the last thing said."""
    spoken = [message for message in messages if message["role"] == "user"] or list(messages)
    return str(spoken[-1]["content"])


def idempotent_id(actor: str, idempotency_key: str) -> str:
    """64 hexadecimal digits: nobody can reach another principal's answers with the same key."""
    return hashlib.sha256(f"{actor}\n{idempotency_key}".encode()).hexdigest()


def request_id(request: ChatRequest) -> str | None:
    """Under what the exchange is found again: its idempotency key, or its response's id."""
    if request.idempotency_key is not None:
        return PREFIX + idempotent_id(request.actor, request.idempotency_key)
    return None if request.response is None else PREFIX + request.response.id


def _meta(request: ChatRequest, model: ModelCard, key: str | None, finished: ChatFinished) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": finished.finish_reason,
        "model": model.id,
        "model_fingerprint": model.fingerprint,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "timings": {name: None if value is None else round(value, 4) for name, value in finished.timings.items()},
        "actor": request.actor,
    }
    meta |= _said(finished.choices[0])
    if finished.others:  # beside the experience, which is the first one's: nothing learns from them
        meta["choices"] = [
            {
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "completion_tokens": choice.completion_tokens,
            }
            | _said(choice)
            for choice in finished.others
        ]
    if finished.workspace is not None:
        meta["workspace"] = dict(finished.workspace)
    if finished.cartridges:
        meta["cartridges"], meta["cartridge_slots"] = list(finished.cartridges), finished.cartridge_slots
    if finished.cached_tokens:
        meta["cached_tokens"] = finished.cached_tokens
    if finished.memory is not None:
        meta["memory"] = dict(finished.memory)
    if request.prompt is not None:
        meta["kind"] = "completion"
    if key is not None:
        meta["request_sha256"] = request.fingerprint()
    if request.response is not None:
        meta["response"] = asdict(request.response)
    return meta


def _said(choice: Choice) -> dict[str, Any]:
    """What an answer said beside its text."""
    said: dict[str, Any] = {}
    if choice.reasoning_tokens is not None:
        said["reasoning_tokens"] = choice.reasoning_tokens
    if choice.reasoning:
        said["reasoning"] = choice.reasoning
    if choice.tool_calls:
        said["tool_calls"] = [
            {"name": _storable(call.name), "arguments": _storable(call.arguments)} for call in choice.tool_calls
        ]
    return said


def _storable(text: str) -> str:
    """For what does not come from the detokenizer, which gives no NUL: prompts of ids, and what JSON has decoded."""
    return text.replace("\x00", "\ufffd")  # PostgreSQL stores none
