"""Stored responses (OpenAI's Responses API): exchanges in the history that are found by an id, and gone on from.

A response is the row of its exchange, under the request id ``chat:<hex>``; its id for clients is ``resp_<hex>``, and
the ids of its items are made of the same digits, so that nothing else has to be stored. Whoever asked for a response
can read it, go on from it and delete it; for all others it does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from memory.history import History, Record
from olympus.chat_record import PREFIX
from olympus.errors import OlympusError

_ID = re.compile(r"resp_([0-9a-f]{32}|[0-9a-f]{64})")
_ITEM = re.compile(r"(msg|rs|fc)_([0-9a-f]{32}|[0-9a-f]{64})(?:_(\d{1,4}))?")

Message = dict[str, Any]


class ResponseNotFound(OlympusError):
    """There is no such response, or it was deleted, or it is not stored (``store: false``)."""

    status = 404
    code = "response_not_found"


def find_response(history: History, response_id: str, actor: str) -> Record:
    """The exchange behind ``response_id``. Raises ``ResponseNotFound``."""
    found = _ID.fullmatch(response_id)
    record = None if found is None else history.find_request(PREFIX + found.group(1))
    if record is None or record.deleted or "response" not in record.meta or record.meta.get("actor") != actor:
        raise ResponseNotFound(f"there is no response {response_id!r}; it was never stored, or it was deleted")
    return record


def hex_of(response_id: str) -> str:
    """The digits of a response's id."""
    return response_id.removeprefix("resp_")


def call_id(hex_id: str, place: int) -> str:
    """What the call ``place`` of a response is called."""
    return f"call_{hex_id[:24]}{place}"  # clients allow 40 characters


def asked(record: Record) -> list[Message]:
    """The messages that a response answered, without its instructions."""
    messages: list[Message] = list(record.messages or ())
    return messages[record.meta["response"]["instructed"] :]


def answered(record: Record, hex_id: str) -> Message:
    """What it answered, as a message."""
    message: Message = {"role": "assistant", "content": record.action}
    if calls := record.meta.get("tool_calls"):
        message["tool_calls"] = [_call(hex_id, place, call) for place, call in enumerate(calls)]
    return message


def item_message(history: History, item_id: str, actor: str) -> Message | None:
    """The message that an item of a stored response stands for; None for reasoning. Raises ``ResponseNotFound``."""
    found = _ITEM.fullmatch(item_id)
    if found is None:
        raise ResponseNotFound(f"there is no item {item_id!r} of a stored response; send the item itself")
    kind, hex_id, place = found.group(1), found.group(2), int(found.group(3) or 0)
    record = find_response(history, f"resp_{hex_id}", actor)
    if kind == "rs":
        return None
    if kind == "msg":
        return {"role": "assistant", "content": record.action}
    calls = record.meta.get("tool_calls", ())
    if place >= len(calls):
        raise ResponseNotFound(f"the response of the item {item_id!r} has no such call")
    return {"role": "assistant", "content": "", "tool_calls": [_call(hex_id, place, calls[place])]}


def _call(hex_id: str, place: int, call: Mapping[str, str]) -> dict[str, Any]:
    return {"id": call_id(hex_id, place), "type": "function", "function": dict(call)}
