"""Tools in a conversation, for models that call them as Hermes does: JSON between ``<tool_call>`` marks.

Templates that know this form (Hermes, Qwen) render tools, calls and results themselves; they only need a call's
arguments as an object. For all others the same is said in words that every template can render: the tools in the
system message, a call in the assistant's text, a result in the user's. The words are those of Hermes
(NousResearch/Hermes-Function-Calling) and Qwen2.5's template. gpt-oss has its own form (``harmony_prompt.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def speaks_of_tools(messages: Sequence[Message], tools: Sequence[Tool] | None) -> bool:
    """True when there are tools, calls or results to render."""
    return bool(tools) or any(item.get("tool_calls") or item.get("role") == "tool" for item in messages)


def with_tools(
    messages: Sequence[Message], tools: Sequence[Tool] | None, template: str
) -> tuple[list[dict[str, Any]], Sequence[Tool] | None]:
    """The conversation and the tools as ``template`` takes them."""
    if OPEN in template and "tools" in template:
        return [_with_objects(item) for item in messages], tools
    told: list[dict[str, Any]] = []
    for item in messages:
        turn = _spoken(item)
        if item.get("role") == "tool" and told and told[-1].pop("of_tool", False):
            turn["content"] = f"{told.pop()['content']}\n{turn['content']}"
        told.append(turn)
    for turn in told:
        turn.pop("of_tool", None)
    if tools:
        lines = "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if told and told[0].get("role") in ("system", "developer"):
            told[0]["content"] = f"{told[0]['content']}\n\n{instructions}"
        else:
            told.insert(0, {"role": "system", "content": instructions})
    return told, None


def _with_objects(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as objects, where they are some."""
    turn = dict(message)
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
            for call in calls
        ]
    return turn


def _spoken(message: Message) -> dict[str, Any]:
    """The message as plain text of a role that every template knows."""
    turn = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if message.get("role") == "tool":
        content = f"<tool_response>\n{turn.get('content') or ''}\n</tool_response>"
        return {"role": "user", "content": content, "of_tool": True}
    calls = [
        f"{OPEN}\n{_call(call['function']['name'], call['function']['arguments'])}\n{CLOSE}"
        for call in message.get("tool_calls") or ()
    ]
    turn["content"] = "\n".join(filter(None, [turn.get("content") or "", *calls]))
    return turn


def _call(name: str, arguments: str) -> str:
    return json.dumps({"name": name, "arguments": _object(arguments)}, ensure_ascii=False)


def _object(arguments: Any) -> Any:
    """Arguments as the JSON object that they spell; what spells none stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments
