"""OpenAI's messages as the chat template of gpt-oss models takes them.

What that template would drop in silence or misread is put right here: it renders a system or developer message only
in the first place, knows reasoning as ``thinking``, and writes the arguments of a tool call as JSON itself. Rendering
stays the template's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workspace.errors import InvalidPrompt

EFFORTS = ("low", "medium", "high")
_INSTRUCTIONS = ("system", "developer")


def harmony_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for the template. Instructions from anywhere in it stand first, in their order."""
    instructions = [str(item.get("content") or "") for item in messages if item.get("role") in _INSTRUCTIONS]
    turns = [_turn(item) for item in messages if item.get("role") not in _INSTRUCTIONS]
    if not instructions:
        return turns
    return [{"role": "developer", "content": "\n\n".join(filter(None, instructions))}, *turns]


def check_effort(effort: str) -> str:
    """``effort``, if the format knows it. Raises ``InvalidPrompt``."""
    if effort not in EFFORTS:
        raise InvalidPrompt(
            f"reasoning_effort: this model knows {', '.join(EFFORTS)}, got {effort!r}", "reasoning_effort"
        )
    return effort


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    thinking = turn.get("thinking") or message.get("reasoning_content") or message.get("reasoning")
    if thinking and turn.get("role") == "assistant":
        turn["thinking"] = thinking
    calls = turn.get("tool_calls")
    if calls:
        turn["tool_calls"] = [_call(call) for call in calls]
        if thinking and turn.get("content"):  # the template takes one of them; both were said before the call
            turn["thinking"] = f"{thinking}\n\n{turn.pop('content')}"
    else:
        turn.pop("tool_calls", None)  # its presence alone would be read as a call
    return turn


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object; text that is no JSON object stays text."""
    function = dict(call.get("function") or call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function} if "function" in call else function
