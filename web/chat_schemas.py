"""OpenAI's chat completion request.

``ChatBody`` takes what clients really send (contents as text or as text parts, nulls
for what they do not set, hints of OpenAI's own service), plus ``session`` and ``domain``. What would change the
answer and is not built yet is refused by name; what is a hint only is accepted and ignored. Nothing is ignored that
a client could rely on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from olympus.chat_types import ChatRequest, MemoryWish, WorkspaceWish
from olympus.requests import Name
from web.body import ID_LIMIT, Body, Ignored, Session, Unsupported, only, without_nul
from web.cartridge_requests import CartridgeList, take_tags
from web.response_format import ResponseFormat
from web.sampling_body import SamplingBody
from web.tool_schemas import NamedTool, ToolBody, ToolCallBody, ToolChoice

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _flatten(content: Any) -> Any:
    """OpenAI's two forms of content as one text; parts that are not text are refused by their type."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind not in ("text", "input_text"):
            raise PydanticCustomError("unsupported", "parts of type {kind} are not supported yet", {"kind": kind[:40]})
        else:
            raise PydanticCustomError("value_error", "each part must be like {{'type': 'text', 'text': '...'}}")
    return "\n".join(texts)


Content = Annotated[str | None, BeforeValidator(_flatten)]


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


class WorkspaceBody(Body):
    """Which parts of the workspace serve a request; what is not said is as the server's settings say."""

    enabled: bool | None = None
    virtual_kv: bool | None = None
    residual_delta: bool | None = None
    controller: bool | None = None
    memory: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=ID_LIMIT)] | None = None
    trace: bool = False
    compare: bool = False

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> WorkspaceBody:
        if self.enabled is False and (self.compare or self.trace):
            raise PydanticCustomError("value_error", "compare and trace need the workspace; leave enabled out")
        return self


def _workspace(value: Any) -> Any:
    """``true`` and ``false`` switch all of it."""
    return {"enabled": value} if isinstance(value, bool) else value


Workspace = Annotated[WorkspaceBody | None, BeforeValidator(_workspace)]


class MemoryBody(Body):
    """Whether the domain's cartridge stands in for a long history, and how many turns stay as they are."""

    enabled: bool | None = None
    recent_turns: Annotated[int, Field(ge=0, le=1000)] | None = None


def _memory(value: Any) -> Any:
    """``true`` and ``false``; an object is a wish for it unless it says otherwise."""
    if isinstance(value, bool):
        return {"enabled": value}
    return {"enabled": True, **value} if isinstance(value, dict) else value


Memory = Annotated[MemoryBody | None, BeforeValidator(_memory)]


class OlympusOptions(Body):
    """Ours, in a field of its own: clients that check OpenAI's fields pass it on as it is."""

    session: Session | None = None
    domain: Name | None = None
    workspace: Workspace = None
    cartridges: CartridgeList | None = None
    memory: Memory = None


class ChatBody(SamplingBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=ID_LIMIT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    session: Session | None = None
    domain: Name | None = None
    workspace: Workspace = None
    cartridges: CartridgeList | None = None
    memory: Memory = None
    olympus: OlympusOptions | None = None
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
        inner = self.olympus or OlympusOptions()
        for name, one, other in (
            ("max_tokens and max_completion_tokens", self.max_tokens, self.max_completion_tokens),
            ("session and olympus.session", self.session, inner.session),
            ("domain and olympus.domain", self.domain, inner.domain),
            ("workspace and olympus.workspace", self.workspace, inner.workspace),
            ("cartridges and olympus.cartridges", self.cartridges, inner.cartridges),
            ("memory and olympus.memory", self.memory, inner.memory),
        ):
            if one is not None and other is not None and one != other:
                raise PydanticCustomError("value_error", "{name} differ; give one of them", {"name": name})
        return self

    @model_validator(mode="after")
    def _can_call(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("value_error", "tools: each function needs a name of its own")
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("value_error", "tool_choice 'required' needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise PydanticCustomError(
                "value_error", "tool_choice names {name}, which is not among the tools", {"name": name}
            )
        shaped = self.response_format is not None and self.response_format.to_schema() is not None
        if shaped and names and self.tool_choice != "none":
            raise PydanticCustomError(
                "value_error", "response_format and tools exclude each other; send one, or tool_choice 'none'"
            )
        return self

    def _one_call(self) -> bool:
        """Several calls unless they are not wanted; of forced ones only where they are."""
        if not self.tools or self.tool_choice == "none":
            return False
        wanted = self.parallel_tool_calls
        return (
            wanted is False
            or isinstance(self.tool_choice, NamedTool)
            or (self.tool_choice == "required" and not wanted)
        )

    def to_request(self, *, actor: str, idempotency_key: str | None) -> ChatRequest:
        """What the chat service takes."""
        inner = self.olympus or OlympusOptions()
        wish = self.workspace or inner.workspace
        memory = self.memory or inner.memory
        messages, tagged = take_tags([message.to_template() for message in self.messages])
        named = tuple(item.to_wish() for item in self.cartridges or inner.cartridges or ())
        return ChatRequest(
            **self.sampling()
            | {"max_tokens": self.max_completion_tokens if self.max_tokens is None else self.max_tokens},
            messages=messages,
            json_schema=None if self.response_format is None else self.response_format.to_schema(),
            tools=() if self.tool_choice == "none" else tuple(tool.to_template() for tool in self.tools or ()),
            must_call=self.tool_choice not in (None, "none", "auto"),
            call_named=self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None,
            one_call=self._one_call(),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            reasoning_effort=None if self.reasoning_effort is None else str(self.reasoning_effort),
            workspace=None if wish is None else WorkspaceWish(**wish.model_dump()),
            cartridges=(*named, *tagged),
            memory=None if memory is None else MemoryWish(**memory.model_dump()),
            session_id=self.session or inner.session,
            domain=self.domain or inner.domain,
            idempotency_key=idempotency_key,
            actor=actor,
        )
