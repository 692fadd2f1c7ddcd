"""Between a chat and its experience in the history: what is recorded of an answer, and an answer from a record.

Pure functions; who writes, and when, is in ``chat.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from memory.history import NewExperience, Record
from olympus.chat_types import ChatFinished, ChatRequest, Delta, ModelCard
from workspace.channels import ToolCall, ToolCallDelta


def to_experience(
    request: ChatRequest, model: ModelCard, key: str | None, finished: ChatFinished
) -> NewExperience | None:
    """The exchange as it is stored, or None when there is nothing to remember."""
    cancelled = finished.finish_reason == "cancelled"
    said, action = observation(request.messages), _storable(finished.text)
    if (cancelled and not action) or not (said or action):
        return None
    return NewExperience(
        said,
        action,
        domain=finished.domain,
        source="chat",
        session_id=request.session_id,
        messages=[dict(message) for message in request.messages],
        meta=_meta(request, model, key, finished),
        # A retry of what was cut off shall be answered anew, so only a whole answer claims the key.
        request_id=None if cancelled else key,
    )


def from_record(record: Record) -> tuple[Delta, ChatFinished]:
    """The recorded answer as a client is told it: in one piece."""
    calls = tuple(ToolCall(**call) for call in record.meta.get("tool_calls", ()))
    reasoning = record.meta.get("reasoning", "")
    told = tuple(ToolCallDelta(place, call.name, call.arguments) for place, call in enumerate(calls))
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
    )
    return Delta(record.action, reasoning=reasoning, tool_calls=told), finished


def observation(messages: tuple[Mapping[str, Any], ...]) -> str:
    """The last thing the user said; without a user, the last thing said."""
    spoken = [message for message in messages if message["role"] == "user"] or list(messages)
    return str(spoken[-1]["content"])


def request_id(request: ChatRequest) -> str:
    """The key under which the exchange is stored: nobody can reach another principal's answers with it."""
    return "chat:" + hashlib.sha256(f"{request.actor}\n{request.idempotency_key}".encode()).hexdigest()


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
    if finished.reasoning_tokens is not None:
        meta["reasoning_tokens"] = finished.reasoning_tokens
    if finished.reasoning:
        meta["reasoning"] = _storable(finished.reasoning)
    if finished.tool_calls:
        meta["tool_calls"] = [
            {"name": _storable(call.name), "arguments": _storable(call.arguments)} for call in finished.tool_calls
        ]
    if finished.workspace is not None:
        meta["workspace"] = dict(finished.workspace)
    if finished.cartridges:
        meta["cartridges"], meta["cartridge_slots"] = list(finished.cartridges), finished.cartridge_slots
    if finished.memory is not None:
        meta["memory"] = dict(finished.memory)
    if key is not None:
        meta["request_sha256"] = request.fingerprint()
    return meta


def _storable(text: str) -> str:
    return text.replace("\x00", "\ufffd")  # PostgreSQL stores no NUL
