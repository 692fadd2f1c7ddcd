"""OpenAI's Responses request: ``POST /v1/responses``, and the queries of stored responses.

It becomes the same ``ChatRequest`` as a chat: what a response can do is what a chat can do. Tools, the text's format
and the items of the input have this dialect's flatter forms; ``previous_response_id`` puts the conversation of a
stored response before the input. What only OpenAI's own service has (its tools, background runs, conversations,
prompts) is refused by name; hints are ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from olympus.chat_record import idempotent_id
from olympus.chat_types import ChatRequest, ResponseNote
from web.body import ID_LIMIT, Body, Ignored, Unsupported, only, without_nul
from web.cartridge_requests import take_tags
from web.errors import ApiError, FieldError
from web.our_fields import OurFields
from web.response_format import FormatName
from web.response_items import Items, Message, Resolve, to_messages
from web.sampling_body import SamplerBody
from web.tool_schemas import FunctionBody, FunctionName, check_tools, tool_wish

_LOGPROBS = "message.output_text.logprobs"
_Meta = dict[
    Annotated[str, StringConstraints(max_length=64)],
    Annotated[str, StringConstraints(max_length=512), AfterValidator(without_nul)],
]


class FlatTool(FunctionBody):
    """A function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise PydanticCustomError(
                "unsupported", "tools of the type {kind} are not supported, only functions", {"kind": kind[:40]}
            )
        return value

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates take it: without what was not said."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"strict", "type"})}


class FlatChoice(Body):
    """The function that has to be called."""

    type: Literal["function"]
    name: FunctionName


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise PydanticCustomError(
            "value_error", "must be 'none', 'auto', 'required', or like {{'type': 'function', 'name': '...'}}"
        )
    return value


class TextFormat(Body):
    """What form the text shall have; a schema stands in it directly."""

    type: Literal["text", "json_object", "json_schema"]
    name: FormatName | None = None
    description: Ignored = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError("value_error", "schema goes with the type 'json_schema', and only with it")
        return self


class TextBody(Body):
    """Options of the text."""

    format: TextFormat | None = None
    verbosity: Ignored = None


class ReasoningBody(Body):
    """Options of models that reason; ``effort`` counts for those that know it. There are no summaries."""

    effort: Any = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ObfuscationOptions(Body):
    """Options of a stream; nothing is padded here."""

    include_obfuscation: Ignored = None


class ResponseBody(SamplerBody, OurFields):
    """``POST /v1/responses``."""

    input: Items
    instructions: Annotated[str, AfterValidator(without_nul)] | None = None
    previous_response_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=ID_LIMIT)] | None = None
    tools: Annotated[tuple[FlatTool, ...], Field(max_length=128)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | FlatChoice | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: tuple[str, ...] | None = None
    metadata: Annotated[_Meta, Field(max_length=16)] | None = None
    stream_options: ObfuscationOptions | None = None
    truncation: Annotated[Any, only("disabled")] = None
    background: Annotated[Any, only(False)] = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    max_tool_calls: Ignored = None  #: counts calls of OpenAI's own tools, of which there are none
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ResponseBody:
        if not self.input and self.previous_response_id is None:
            raise PydanticCustomError("value_error", "input: give a text, or at least one item")
        shaped = "text.format" if self.json_schema() is not None else None
        check_tools([tool.name for tool in self.tools or ()], self._chosen(), self._named(), shaped=shaped)
        return self

    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the text shall fit; None for free text."""
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type == "text":
            return None
        return {"type": "object"} if wanted.type == "json_object" else wanted.schema_

    def to_request(
        self,
        *,
        actor: str,
        idempotency_key: str | None,
        resolve: Resolve,
        earlier: Sequence[Message] = (),
        defaults: dict[str, float],
        session: str | None = None,
        domain: str | None = None,
    ) -> ChatRequest:
        """What the chat service takes. ``earlier``, ``session`` and ``domain`` are the previous response's.

        ``defaults``: the temperature and top_p of requests that do not say.
        """
        given = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        instructions, of_instructions = take_tags(given)
        asked, of_input = take_tags(to_messages(self.input, earlier, resolve))
        if not asked and not earlier:
            detail = "holds nothing to answer; give at least one message"
            raise ApiError(422, "invalid_request", f"input: {detail}", errors=[FieldError("input", detail)])
        ours = self.ours((*of_instructions, *of_input))
        effort = None if self.reasoning is None else self.reasoning.effort
        return ChatRequest(
            **self.sampler(),
            max_tokens=self.max_output_tokens,
            messages=(*instructions, *earlier, *asked),
            json_schema=self.json_schema(),
            **tool_wish(
                [tool.to_template() for tool in self.tools or ()],
                self._chosen(),
                self._named(),
                self.parallel_tool_calls,
            ),
            logprobs=bool(self.top_logprobs) or _LOGPROBS in (self.include or ()),
            top_logprobs=self.top_logprobs or 0,
            reasoning_effort=None if effort is None else str(effort),
            **ours | {"session_id": ours["session_id"] or session, "domain": ours["domain"] or domain},
            idempotency_key=idempotency_key,
            actor=actor,
            response=ResponseNote(
                uuid.uuid4().hex if idempotency_key is None else idempotent_id(actor, idempotency_key),
                len(instructions),
                self._repeated(defaults),
            ),
        )

    def _chosen(self) -> str | None:
        return self.tool_choice if isinstance(self.tool_choice, str) else None

    def _named(self) -> str | None:
        return self.tool_choice.name if isinstance(self.tool_choice, FlatChoice) else None

    def _repeated(self, defaults: dict[str, float]) -> dict[str, Any]:
        """What the response says of its request."""
        wanted = None if self.text is None else self.text.format
        shape = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        choice = self.tool_choice or "auto"
        return {
            "created_at": int(time.time()),
            "instructions": self.instructions,
            "previous_response_id": self.previous_response_id,
            "max_output_tokens": self.max_output_tokens,
            "temperature": defaults["temperature"] if self.temperature is None else self.temperature,
            "top_p": defaults["top_p"] if self.top_p is None else self.top_p,
            "top_logprobs": self.top_logprobs or 0,
            "tools": [
                {"parameters": None, "strict": False} | tool.model_dump(exclude_none=True) for tool in self.tools or ()
            ],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": {"format": shape},
            "reasoning": {"effort": None if self.reasoning is None else self.reasoning.effort, "summary": None},
            "metadata": dict(self.metadata or {}),
            "store": self.store is not False,
        }


class RetrieveQuery(Body):
    """``GET /v1/responses/{id}``."""

    stream: Annotated[Any, only("false", "False")] = None
    include: Ignored = None
    include_list: Annotated[Ignored, Field(alias="include[]")] = None
    include_obfuscation: Ignored = None


class ItemsQuery(Body):
    """``GET /v1/responses/{id}/input_items``."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Annotated[str, StringConstraints(max_length=256)] | None = None
    include: Ignored = None
    include_list: Annotated[Ignored, Field(alias="include[]")] = None
