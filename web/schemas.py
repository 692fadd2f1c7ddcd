"""What a chat client may send: OpenAI's request body, field by field, and ours beside it.

Three kinds of fields: those that are honoured; those that change nothing here and that clients send all the same
(accepted and ignored); and those whose absence the user would notice (a clear error that names the field). Any other
name is an error, too, with the nearest known one. Which is which: docs/api.md.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from olympus.requests import Name

_Strict = ConfigDict(extra="forbid", allow_inf_nan=False)
Label = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]*\z")]

#: field -> values that mean "not used" and are therefore fine
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "n": (None, 1),
}
IGNORED = (
    "user", "metadata", "store", "service_tier", "reasoning_effort", "parallel_tool_calls", "verbosity",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


class TextPart(BaseModel):
    """One part of a message's content; only text is understood."""

    model_config = _Strict
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. ``developer`` is OpenAI's newer name of ``system``."""

    model_config = _Strict
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tool_calls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("tool_calls") or value.get("function_call"):
                raise ValueError("tool calls are not supported yet; send their results as text")
            dropped = ("tool_calls", "function_call", "audio", "annotations")  # clients echo these back as null
            return {key: item for key, item in value.items() if key not in dropped}
        return value

    def plain(self) -> dict[str, Any]:
        """Role and text, as chat templates understand them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatBody(BaseModel):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: list[Message] = Field(min_length=1, max_length=2048)
    model: str | None = Field(None, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # Ours.
    session: Label | None = None
    domain: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, unused in UNSUPPORTED.items():
            if name in value and value[name] not in unused:
                raise ValueError(f"{name}: not supported yet; leave it out")
        kept = {key: item for key, item in value.items() if key not in UNSUPPORTED and key not in IGNORED}
        for key in kept:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), [*cls.model_fields, *IGNORED, *UNSUPPORTED], n=1)
                hint = f"; did you mean {near[0]}?" if near else "; docs/api.md lists the known ones"
                raise ValueError(f"{key}: unknown field{hint}")
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return ()
        stops = (value,) if isinstance(value, str) else value
        if isinstance(stops, list | tuple) and (len(stops) > 4 or "" in stops):
            raise ValueError("give at most 4 stop strings, none of them empty")
        return stops

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self


class FeedbackBody(BaseModel):
    """The body of ``POST /olympus/history/<id>/feedback``."""

    model_config = _Strict
    feedback: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*\z")] | None = None
    score: float | None = Field(None, ge=-1, le=1)


class HistoryQuery(BaseModel):
    """Query string of ``GET /olympus/history``."""

    model_config = _Strict
    domain: Label | None = None
    session: Label | None = None
    before: int | None = Field(None, ge=1, lt=2**63)
    limit: int = Field(50, ge=1, le=500)


class HistorySelection(BaseModel):
    """Query string of ``DELETE /olympus/history``."""

    model_config = _Strict
    domain: Label | None = None
    session: Label | None = None


class MetricsQuery(BaseModel):
    """Query string of ``GET /olympus/kernels/<id>/metrics``."""

    model_config = _Strict
    since: int | None = Field(None, ge=0, lt=2**31)
    max_points: int = Field(2000, ge=2, le=2000)


class EmptyBody(BaseModel):
    """The body of an action without arguments: nothing, or ``{}``."""

    model_config = _Strict
