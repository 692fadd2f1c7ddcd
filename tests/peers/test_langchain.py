"""LangChain's ``ChatOpenAI`` against the server: chat, streaming, tools, structured output, and over responses."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.support import asynchronous
from tests.support.server import Server

pytestmark = pytest.mark.model
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """The city that is asked for."""

    city: Literal["Paris", "Berlin", "Rome"]


@tool
def get_weather(city: Literal["Paris", "Berlin", "Rome"]) -> str:
    """The weather in a city."""
    return f"18 degrees and sunny in {city}"


def model(server: Server, **fields: Any) -> ChatOpenAI:
    usual: dict[str, Any] = {"model": "smollm2-135m-instruct", "temperature": 0, "max_retries": 0}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="any-text", **usual | {"max_tokens": 40} | fields)


@pytest.mark.parametrize("responses", [False, True])
def test_an_answer_whole_and_streamed(server: Server, responses: bool) -> None:
    chat = model(server, use_responses_api=responses)
    whole = chat.invoke([SystemMessage("You are a helpful AI assistant."), HumanMessage(QUESTION)])
    assert "Paris" in whole.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_tokens"] > 20
    added: Any = None
    for chunk in chat.stream([SystemMessage("You are a helpful AI assistant."), HumanMessage(QUESTION)]):
        assert isinstance(chunk, AIMessageChunk)
        added = chunk if added is None else added + chunk
    assert added.text == whole.text


def test_async_batches(server: Server) -> None:
    questions = [f"What is the capital of {country}?" for country in ("France", "Italy", "Japan")]
    answers = asynchronous.run(lambda: model(server).abatch(list(questions)))
    assert [word in answer.text for word, answer in zip(("Paris", "Rome", "Tokyo"), answers, strict=True)] == [True] * 3


def test_a_tool_is_called_and_its_result_goes_back(server: Server) -> None:
    chat = model(server, max_tokens=80)
    question = HumanMessage("What is the weather in Paris?")
    called: Any = chat.bind_tools([get_weather], tool_choice="get_weather").invoke([question])
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert chat.bind_tools([get_weather], tool_choice="none").invoke([question, called, result]).text
    pieces: Any = None
    for chunk in chat.bind_tools([get_weather], tool_choice="required").stream([question]):
        pieces = chunk if pieces is None else pieces + chunk
    assert [(item["name"], item["args"]) for item in pieces.tool_calls] == [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_class_comes_back(server: Server, method: Literal["json_schema", "function_calling"]) -> None:
    chat = model(server, max_tokens=80).with_structured_output(City, method=method)
    assert chat.invoke("Which city is the capital of France?") == City(city="Paris")


def test_what_cannot_be_done_is_said(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="at most"):
        model(server, max_tokens=10**6).invoke(QUESTION)
