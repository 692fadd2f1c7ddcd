"""OpenAI's chat completion request.

``ChatBody`` takes what clients really send (contents as text or as text parts, nulls
for what they do not set, hints of OpenAI's own service), plus our own fields. What would change the
answer and is not built yet is refused by name; what is a hint only is accepted and ignored. Nothing is ignored that
a client could rely on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from olympus.chat_types import ChatRequest
from web.body import ID_LIMIT, Body, Ignored, Unsupported, only, without_nul
from web.cartridge_requests import take_tags
from web.our_fields import OurFields
from web.response_format import ResponseFormat
from web.sampling_body import SamplingBody
from web.tool_schemas import NamedTool, ToolBody, ToolCallBody, ToolChoice, check_tools, tool_wish

Role = Literal["system", "developer", "user", "assistant", "tool"]


_TEXTS = ("text", "input_text", "output_text")


class TextPart(Body):
    """A part of a content. What else clients copy from answers is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["text", "input_text", "output_text"]
    text: str


#: What clients may send as content, for the OpenAPI document.
CONTENT = str | list[TextPart] | None


def flatten(content: Any) -> Any:
    """OpenAI's two forms of content as one text; parts that are not text are refused by their type."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind not in _TEXTS:
            raise PydanticCustomError("unsupported", "parts of type {kind} are not supported yet", {"kind": kind[:40]})
        else:
            raise PydanticCustomError("value_error", "each part must be like {{'type': 'text', 'text': '...'}}")
    return "\n".join(texts)


Content = Annotated[str | None, BeforeValidator(flatten, json_schema_input_type=CONTENT)]


class Message(Body):
    """One turn. Also takes what clients copy from earlier answers (``refusal: null`` and the like)."""

    role: Role
    content: Content = None
    name: Annotated[str, StringConstraints(max_length=128)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    tool_calls: tuple[ToolCallBody, ...] | None = None
    function_call: Unsupported = None
    audio: Unsupported = None
    refusal: Ignored = None
    annotations: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("value_error", "content is missing; give a text")
        without_nul(self.content or "")
        return self

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        for key in ("name", "tool_call_id"):
            value = getattr(self, key)
            if value is not None:
                turn[key] = value
        if self.tool_calls:
            turn["tool_calls"] = [call.to_template() for call in self.tool_calls]
        return turn


class ChatBody(SamplingBody, OurFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=ID_LIMIT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[Any, only(["text"])] = None
    tools: Annotated[tuple[ToolBody, ...], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    metadata: Ignored = None
    service_tier: Ignored = None
    reasoning_effort: Any = None  #: only some models know it: they judge the value, the others ignore it
    verbosity: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    apply_chat_template_overrides: Unsupported = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("value_error", "max_tokens and max_completion_tokens differ; give one of them")
        check_tools(
            [tool.function.name for tool in self.tools or ()],
            self.tool_choice if isinstance(self.tool_choice, str) else None,
            self._named(),
            shaped="response_format" if self.json_schema() is not None else None,
        )
        return self

    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the answer shall fit; None for free text."""
        return None if self.response_format is None else self.response_format.to_schema()

    def _named(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def to_request(self, *, actor: str, idempotency_key: str | None) -> ChatRequest:
        """What the chat service takes."""
        messages, tagged = take_tags([message.to_template() for message in self.messages])
        return ChatRequest(
            **self.sampling()
            | {"max_tokens": self.max_completion_tokens if self.max_tokens is None else self.max_tokens},
            messages=messages,
            json_schema=self.json_schema(),
            **tool_wish(
                [tool.to_template() for tool in self.tools or ()],
                self.tool_choice if isinstance(self.tool_choice, str) else None,
                self._named(),
                self.parallel_tool_calls,
            ),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            reasoning_effort=None if self.reasoning_effort is None else str(self.reasoning_effort),
            **self.ours(tagged),
            idempotency_key=idempotency_key,
            actor=actor,
        )
