"""The shapes of answers, for the OpenAPI document: OpenAI's objects as the wires write them, and the two errors.

They describe and are not used to write: ``openai_wire.py`` and its like do that, and ``tests/peers`` and schemathesis
hold what is written against these. What else stands in an object is allowed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """An object that may hold more than what is said here."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(Answer):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Answer):
    """The error of every route under ``/v1`` and ``/custom``."""

    error: ErrorDetail


class ProblemField(Answer):
    """One field that does not fit."""

    field: str
    detail: str
    code: str


class ProblemDetails(Answer):
    """RFC 9457's error, of all other routes; with ``errors`` where fields do not fit."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str


class ModelShown(Answer):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    """All of them."""

    object: Literal["list"]
    data: list[ModelShown]


class Usage(Answer):
    """Counts of the model's own tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Ours(Answer):
    """What OpenAI has no field for."""

    experience_id: int | None
    domain: str
    session: str | None
    ended_by: Literal["stop", "length", "timeout"]
    replayed: bool


class AssistantMessage(Answer):
    """What the model said; ``tool_calls`` and ``reasoning_content`` where there are some."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(Answer):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice] = Field(min_length=1)
    usage: Usage
    olympus: Ours


class TextChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Answer):
    """How a text goes on."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice] = Field(min_length=1)
    usage: Usage
    olympus: Ours


class EmbeddingShown(Answer):
    """A vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens that were sent."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    """One vector per input."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingShown] = Field(min_length=1)
    usage: EmbeddingUsage


class OutputShown(Answer):
    """Reasoning, a message, or a call of a function."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["completed", "incomplete", "in_progress"]


class ResponseUsage(Answer):
    """The counts under the Responses dialect's names."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseShown(Answer):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "cancelled"]
    model: str
    output: list[OutputShown]
    usage: ResponseUsage
    metadata: dict[str, str]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: str | None
    error: None


class ResponseDeleted(Answer):
    """A response that is gone."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputShown(Answer):
    """What a response answered."""

    id: str
    type: Literal["message", "function_call", "function_call_output"]


class InputItemList(Answer):
    """A page of it."""

    object: Literal["list"]
    data: list[InputShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


#: Endpoint -> the shape of its answer.
ANSWERS: dict[str, type[Answer]] = {
    "openai.models": ModelList,
    "openai.model": ModelShown,
    "openai.chat_completions": ChatCompletion,
    "openai.completions": TextCompletion,
    "tokasaurus.cartridge_chat_completions": ChatCompletion,
    "tokasaurus.cartridge_completions": TextCompletion,
    "embeddings.embeddings": EmbeddingList,
    "responses.create": ResponseShown,
    "responses.retrieve": ResponseShown,
    "responses.delete": ResponseDeleted,
    "responses.input_items": InputItemList,
}
