"""OpenAI's response objects, and the typed events of their streams, plus our ``olympus``.

A stream opens an item when the first of it is said, and closes it when something else begins: reasoning, the message,
each call. Events are numbered, carry their type as the event's name, too, and the last one holds the whole response;
no ``[DONE]`` follows. Shapes: the OpenAI API reference, and what its clients were seen to accept.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from olympus.chat_responses import call_id
from olympus.chat_types import ChatFinished, Delta, TokenInfo
from web import sse
from web.openai_wire import Tokens, ours, usage
from workspace.channels import ToolCallDelta

_INCOMPLETE = {"reason": "max_output_tokens"}  # a time limit, too: see ``olympus.ended_by``
_STATUS = {"stop": "completed", "length": "incomplete", "timeout": "incomplete", "cancelled": "cancelled"}


class ResponseWire:
    """The objects of one response. ``fields``: what it repeats of its request (``ResponseNote``)."""

    closing = ""

    def __init__(self, model: str, hex_id: str, fields: Mapping[str, Any]) -> None:
        self._model, self._hex, self._fields = model, hex_id, fields
        self._numbers = itertools.count()
        self._said: list[_Item] = []  # of a stream, in order; only the last one may be open

    def completion(self, finished: ChatFinished, tokens: Tokens | None) -> dict[str, Any]:
        """The whole response; ``tokens`` where log-probabilities were asked for."""
        items: list[_Item] = []
        if finished.reasoning:
            items.append(_Reasoning(self._hex, 0, 0, finished.reasoning))
        if finished.text or not finished.tool_calls:
            told = None if tokens is None else list(tokens.get(0, ()))
            items.append(_Message(self._hex, 0, len(items), finished.text, told))
        for place, call in enumerate(finished.tool_calls):
            items.append(_Call(self._hex, place, len(items), call.name, call.arguments))
        return self._whole(finished, items)

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The response before anything is said."""
        started = self._object("in_progress", [])
        return [self._event(kind, response=started) for kind in ("response.created", "response.in_progress")]

    def told(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Events of what was said since the last ones."""
        events: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.reasoning:
                events += self._say(_Reasoning, delta.reasoning)
            if delta.text or delta.tokens:
                events += self._say(_Message, delta.text, delta.tokens)
            for call in delta.tool_calls:
                events += self._call(call)
        return events

    def ending(self, finished: ChatFinished) -> list[dict[str, Any]]:
        """The end of the last item, and the whole response."""
        events = [] if self._said else self._say(_Message, "")
        events += self._close("completed" if finished.finish_reason == "stop" else "incomplete")
        whole = self._whole(finished, self._said)
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def failure(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """The response as far as it came, with the error."""
        told = error["error"]
        items = [item.shown("incomplete") for item in self._said]
        failed = self._object("failed", items) | {"error": {"code": "server_error", "message": told["message"]}}
        return [self._event("response.failed", response=failed)]

    def framed(self, chunk: dict[str, Any]) -> str:
        """An event with a name."""
        return sse.event(chunk, name=chunk["type"])

    def _say(self, kind: type[_Reasoning] | type[_Message], text: str, tokens: Sequence[TokenInfo] = ()) -> list[Any]:
        events: list[dict[str, Any]] = []
        if not self._said or not isinstance(self._said[-1], kind):
            place = sum(isinstance(item, kind) for item in self._said)
            events += self._open(kind(self._hex, place, len(self._said)))
        item = self._said[-1]
        assert isinstance(item, _Reasoning | _Message)
        detail = item.add(text, tokens)
        return [*events, self._of(item, f"{item.text_event}.delta", content_index=0, delta=text, **detail)]

    def _call(self, delta: ToolCallDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if delta.name is not None:
            events += self._open(_Call(self._hex, delta.index, len(self._said), delta.name))
        item = self._said[-1]
        assert isinstance(item, _Call), "a call's first piece has its name"
        item.arguments += delta.arguments
        if delta.arguments:
            events.append(self._of(item, "response.function_call_arguments.delta", delta=delta.arguments))
        return events

    def _open(self, item: _Item) -> list[dict[str, Any]]:
        events = self._close("completed")
        self._said.append(item)
        events.append(
            self._event("response.output_item.added", output_index=item.index, item=item.shown("in_progress"))
        )
        if not isinstance(item, _Call):
            events.append(self._of(item, "response.content_part.added", content_index=0, part=item.part()))
        return events

    def _close(self, status: str) -> list[dict[str, Any]]:
        if not self._said:
            return []
        item = self._said[-1]
        item.status = status
        if isinstance(item, _Call):
            told = {"name": item.name, "arguments": item.arguments}
            events = [self._of(item, "response.function_call_arguments.done", **told)]
        else:
            events = [
                self._of(item, f"{item.text_event}.done", content_index=0, text=item.text, **item.detail()),
                self._of(item, "response.content_part.done", content_index=0, part=item.part()),
            ]
        return [*events, self._event("response.output_item.done", output_index=item.index, item=item.shown())]

    def _of(self, item: _Item, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item.id, output_index=item.index, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers)} | fields

    def _whole(self, finished: ChatFinished, items: Sequence[_Item]) -> dict[str, Any]:
        status = _STATUS[finished.finish_reason]
        if status != "completed" and items:
            items[-1].status = "incomplete"
        whole = self._object(status, [item.shown() for item in items])
        if status == "incomplete":
            whole["incomplete_details"] = _INCOMPLETE
        if status == "completed":
            whole["completed_at"] = int(time.time())
        return whole | {"usage": _usage(finished), "olympus": ours(finished)}

    def _object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"resp_{self._hex}",
            "object": "response",
            "created_at": self._fields["created_at"],
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": output,
            "truncation": "disabled",
            "usage": None,
        } | {name: value for name, value in self._fields.items() if name != "created_at"}


class _Reasoning:
    """What a model thought, as it wrote it."""

    text_event = "response.reasoning_text"

    def __init__(self, hex_id: str, place: int, index: int, text: str = "") -> None:
        self.id, self.index = _numbered("rs", hex_id, place), index
        self.text, self.status = text, "completed"

    def add(self, text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """More of it; returns what its event says beside it."""
        self.text += text
        return {}

    def detail(self) -> dict[str, Any]:
        """What the event of its end says beside the text."""
        return {}

    def part(self) -> dict[str, Any]:
        """Its one part."""
        return {"type": "reasoning_text", "text": self.text}

    def shown(self, status: str | None = None) -> dict[str, Any]:
        """The item."""
        content = [] if status == "in_progress" else [self.part()]
        told = {"id": self.id, "type": "reasoning", "summary": [], "content": content}
        return told | {"status": status or self.status}


class _Message:
    """What a model said; ``tokens`` None where log-probabilities were not asked for."""

    text_event = "response.output_text"

    def __init__(
        self, hex_id: str, place: int, index: int, text: str = "", tokens: list[TokenInfo] | None = None
    ) -> None:
        self.id, self.index = _numbered("msg", hex_id, place), index
        self.text, self.tokens, self.status = text, list(tokens or ()), "completed"

    def add(self, text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """More of it; returns what its event says beside it."""
        self.text += text
        self.tokens += tokens
        return {"logprobs": [_logprob(token) for token in tokens]}

    def detail(self) -> dict[str, Any]:
        """What the event of its end says beside the text."""
        return {"logprobs": [_logprob(token) for token in self.tokens]}

    def part(self) -> dict[str, Any]:
        """Its one part."""
        return {"type": "output_text", "text": self.text, "annotations": [], **self.detail()}

    def shown(self, status: str | None = None) -> dict[str, Any]:
        """The item."""
        content = [] if status == "in_progress" else [self.part()]
        told = {"id": self.id, "type": "message", "role": "assistant", "content": content}
        return told | {"status": status or self.status}


class _Call:
    """A call of a function."""

    def __init__(self, hex_id: str, place: int, index: int, name: str, arguments: str = "") -> None:
        self.id, self.call_id, self.index = f"fc_{hex_id}_{place}", call_id(hex_id, place), index
        self.name, self.arguments, self.status = name, arguments, "completed"

    def shown(self, status: str | None = None) -> dict[str, Any]:
        """The item."""
        told = {"id": self.id, "type": "function_call", "call_id": self.call_id, "name": self.name}
        return told | {"arguments": self.arguments, "status": status or self.status}


_Item = _Reasoning | _Message | _Call


def _numbered(kind: str, hex_id: str, place: int) -> str:
    return f"{kind}_{hex_id}_{place}" if place else f"{kind}_{hex_id}"


def _usage(finished: ChatFinished) -> dict[str, Any]:
    """The counts of a chat under this dialect's names."""
    counts = usage(finished)
    prompt, completion = counts.pop("prompt_tokens"), counts.pop("completion_tokens")
    cached = counts.pop("prompt_tokens_details", {}).get("cached_tokens", 0)
    reasoning = counts.pop("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
    } | counts


def _logprob(token: TokenInfo) -> dict[str, Any]:
    """In this dialect bytes are always a list: empty where the token is only part of a character."""
    told = {"token": token.token, "logprob": token.logprob, "bytes": list(token.bytes or ())}
    return told | {"top_logprobs": [_logprob(item) for item in token.top]} if token.top else told | {"top_logprobs": []}
