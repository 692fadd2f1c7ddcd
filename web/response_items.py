"""The items of OpenAI's Responses API: what a request gives as ``input``, as messages of a chat, and back.

A message stays one; calls that follow each other become one assistant's message, together with the text before them; a
call's output becomes a tool's message. Reasoning is not repeated to the model, as in a chat. An ``item_reference``
means an item of a stored response, by its id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from web.body import Body, Ignored, without_nul
from web.chat_schemas import TextPart, flatten
from web.errors import ApiError, FieldError
from web.tool_schemas import CalledFunction

Message = dict[str, Any]
#: An item's id to the message that it stands for; None for reasoning. Raises what the client is told.
Resolve = Callable[[str], Message | None]

_Id = Annotated[str, StringConstraints(max_length=256)]
_Text = Annotated[str, BeforeValidator(flatten, json_schema_input_type=str | list[TextPart])]


class MessageItem(Body):
    """A turn: as clients write one, or as a response held it."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Text
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    @model_validator(mode="after")
    def _is_storable(self) -> MessageItem:
        without_nul(self.content)
        return self


class CallItem(CalledFunction):
    """A call of a function, as a response held it."""

    type: Literal["function_call"]
    call_id: _Id
    id: Ignored = None
    status: Ignored = None
    namespace: Ignored = None
    caller: Ignored = None
    async_: Annotated[Ignored, Field(alias="async")] = None

    def to_call(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class OutputItem(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: _Id
    output: _Text
    id: Ignored = None
    status: Ignored = None
    name: Ignored = None
    namespace: Ignored = None
    caller: Ignored = None

    @model_validator(mode="after")
    def _is_storable(self) -> OutputItem:
        without_nul(self.output)
        return self


class ReasoningItem(Body):
    """Accepted, and not repeated to the model."""

    type: Literal["reasoning"]
    id: Ignored = None
    summary: Ignored = None
    content: Ignored = None
    encrypted_content: Ignored = None
    status: Ignored = None


class ReferenceItem(Body):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: _Id


_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, Mapping) else getattr(item, "type", None)
    return f"item[{kind}]" if kind in _KINDS else None


#: The tags look like what ``field_path`` leaves out.
Item = Annotated[
    Annotated[MessageItem, Tag("item[message]")]
    | Annotated[CallItem, Tag("item[function_call]")]
    | Annotated[OutputItem, Tag("item[function_call_output]")]
    | Annotated[ReasoningItem, Tag("item[reasoning]")]
    | Annotated[ReferenceItem, Tag("item[item_reference]")],
    Discriminator(
        _kind,
        custom_error_type="unsupported",
        custom_error_message=f"only items of the types {', '.join(_KINDS)} are supported",
    ),
]


def _items(value: Any) -> Any:
    """A text is what the user says."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list):
        raise PydanticCustomError("value_error", "must be a text, or a list of items")
    return tuple(value)


Items = Annotated[
    tuple[Item, ...], Field(max_length=2000), BeforeValidator(_items, json_schema_input_type=str | list[Item])
]


def to_messages(items: Iterable[Any], earlier: Sequence[Message], resolve: Resolve) -> list[Message]:
    """``items`` as messages after the ``earlier`` ones. Raises ``ApiError`` for an output without its call."""
    calls = {call["id"] for message in earlier for call in message.get("tool_calls", ())}
    messages: list[Message] = []
    for place, item in enumerate(items):
        message = _message(item, resolve)
        if message is None:
            continue
        calls |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in calls:
            field = f"input[{place}].call_id"
            detail = f"no function call before it has the call_id {message['tool_call_id']!r}"
            raise ApiError(422, "invalid_request", f"{field}: {detail}", errors=[FieldError(field, detail)])
        last = messages[-1] if messages else None
        if last is not None and last["role"] == "assistant" and "tool_calls" in message:
            messages[-1] = last | {"tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages


def _message(item: Any, resolve: Resolve) -> Message | None:
    if isinstance(item, MessageItem):
        return {"role": item.role, "content": item.content}
    if isinstance(item, CallItem):
        return {"role": "assistant", "content": "", "tool_calls": [item.to_call()]}
    if isinstance(item, OutputItem):
        return {"role": "tool", "content": item.output, "tool_call_id": item.call_id}
    return resolve(item.id) if isinstance(item, ReferenceItem) else None


def to_items(messages: Iterable[Message], hex_id: str) -> list[dict[str, Any]]:
    """The messages that a stored response answered, as its input items; ids are made of the response's digits."""
    items: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            told: dict[str, Any] = {"type": "function_call_output", "call_id": message.get("tool_call_id") or ""}
            items.append(told | {"output": message["content"]})
            continue
        if message["content"] or not message.get("tool_calls"):
            items.append(_turn(message))
        items += [
            {"type": "function_call", "call_id": call["id"], **call["function"]}
            for call in message.get("tool_calls", ())
        ]
    return [{"id": f"in_{hex_id}_{place}", "status": "completed"} | item for place, item in enumerate(items)]


def _turn(message: Message) -> dict[str, Any]:
    said = message["role"] == "assistant"
    part: dict[str, Any] = {"type": "output_text" if said else "input_text", "text": message["content"]}
    if said:
        part["annotations"] = []
    return {"type": "message", "role": message["role"], "content": [part]}
