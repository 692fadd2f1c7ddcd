"""The unmodified ``openai`` Python client asks SmolLM2 for structured answers, also as a pydantic class."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.model
MODEL = "smollm2-135m-instruct"
QUESTION: list[Any] = [{"role": "user", "content": "Which city is the capital of France, on which continent?"}]


class City(BaseModel):
    """What the answer shall be."""

    city: Literal["Paris", "Berlin", "Rome"]
    continent: Literal["Europe", "Asia"]


def test_parse_gives_the_clients_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=150
    )
    if answer.choices[0].finish_reason == "stop":
        parsed = answer.choices[0].message.parsed
        assert parsed is not None
        assert (parsed.city, parsed.continent) == ("Paris", "Europe")


def test_an_object_streams(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Give me a JSON object with the keys name and age of a person."}]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=question,  # type: ignore[arg-type]
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
        stream=True,
    )
    text, reason = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert text.startswith("{")
    assert reason in ("stop", "length")
    if reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_keyword_that_cannot_be_kept_is_named(client: openai.OpenAI) -> None:
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type]
        )
    assert refused.value.param == "response_format"
