"""The unmodified ``openai`` Python client gives SmolLM2 tools: a forced call, its result, and the answer."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.model
MODEL = "smollm2-135m-instruct"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "description": "The time of day."}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": [WEATHER, TIME], "temperature": 0, "max_tokens": 120}
    forced = {"type": "function", "function": {"name": "get_weather"}}
    first = client.chat.completions.create(messages=QUESTION, tool_choice=forced, **options)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments["city"].startswith("Paris")
    assert arguments["unit"] in ("celsius", "fahrenheit")
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}
    turns = [*QUESTION, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=turns, **options | {"tool_choice": "none"})
    assert second.choices[0].message.content


def test_a_forced_call_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, TIME],  # type: ignore[list-item]
        tool_choice="required",
        temperature=0,
        max_tokens=120,
        stream=True,
    )
    name, arguments, reason = "", "", None
    for chunk in stream:
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "tool_calls"
    assert name in ("get_weather", "get_time")
    assert isinstance(json.loads(arguments), dict)
