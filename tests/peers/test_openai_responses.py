"""The unmodified ``openai`` Python client asks for responses: whole, streamed, chained, with functions and classes."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support import asynchronous
from tests.support.server import Server

pytestmark = pytest.mark.model
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class City(BaseModel):
    """What the answer shall be."""

    city: Literal["Paris", "Berlin", "Rome"]


def test_an_answer_and_the_next_turn(client: openai.OpenAI, server: Server) -> None:
    first = client.responses.create(
        model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40, metadata={"topic": "geography"}
    )
    assert "Paris" in first.output_text
    assert first.status == "completed"
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    second = client.responses.create(
        model=MODEL, input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=30
    )
    assert "Rome" in second.output_text
    stored = client.responses.retrieve(first.id)
    assert (stored.output_text, stored.metadata) == (first.output_text, {"topic": "geography"})
    items: list[Any] = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.content[0].text for item in items] == [QUESTION, first.output_text, "And of Italy?"]
    assert first.model_extra is not None
    record = server.json("GET", f"/olympus/history/{first.model_extra['olympus']['experience_id']}")
    assert (record["observation"], record["action"]) == (QUESTION, first.output_text)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_stream_is_followed_event_by_event(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40, store=False)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        last = stream.get_final_response()
    assert text == last.output_text == whole.output_text


def test_a_call_its_output_and_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_output_tokens": 80}
    question = "What is the weather in Paris?"
    with client.responses.stream(input=question, tool_choice="required", **options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    (call,) = first.output
    assert call.type == "function_call"
    assert call.arguments == "".join(pieces)
    assert json.loads(call.arguments)["city"].startswith("Paris")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees and sunny"}]
    second = client.responses.create(input=result, previous_response_id=first.id, tool_choice="none", **options)
    assert second.output_text


def test_a_class_comes_back(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model=MODEL,
        input="Which city is the capital of France?",
        text_format=City,
        temperature=0,
        max_output_tokens=60,
    )
    assert answer.output_parsed == City(city="Paris")


def test_async_and_our_own_fields(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
            extra = {"session": "peer-responses", "domain": "travel"}
            whole = await client.responses.create(input=QUESTION, extra_body=extra, **options)
            text = ""
            async for event in await client.responses.create(input=QUESTION, stream=True, **options):
                text += event.delta if event.type == "response.output_text.delta" else ""
            return whole.output_text, text

    whole, streamed = asynchronous.run(ask)
    assert streamed == whole
    (record,) = server.json("GET", "/olympus/history", params={"session": "peer-responses"})["experiences"]
    assert (record["domain"], record["action"]) == ("travel", whole)


def test_what_is_not_there_is_the_clients_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input=QUESTION, background=True)
    assert refused.value.param == "background"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.responses.create(model=MODEL, input=QUESTION, previous_response_id="resp_" + "0" * 32)
    assert (unknown.value.param, unknown.value.code) == ("previous_response_id", "previous_response_not_found")
