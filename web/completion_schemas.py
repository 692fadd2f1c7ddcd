"""OpenAI's older completion request: a text, or token ids of the served model, that the model goes on with.

One prompt per request. ``echo``, ``suffix`` and ``best_of`` are refused: what they would add is not computed here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from olympus.chat_types import ChatRequest
from olympus.requests import Name
from web.body import Session, Unsupported, only, without_nul
from web.cartridge_requests import CartridgeList
from web.sampling_body import SamplingBody

_Ids = Annotated[list[int], Field(min_length=1)]
#: What clients may send as ``prompt``, for the OpenAPI document.
_FORMS = str | _Ids | Annotated[list[str | _Ids], Field(min_length=1, max_length=1)]


def _prompt(value: Any) -> Any:
    """OpenAI's four forms: a text, token ids, and lists of one of them."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError(
                "unsupported", "holds {count} prompts; send one per request", {"count": len(value)}
            )
        value = value[0]
    if isinstance(value, str):
        return without_nul(value)
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return tuple(value)
    raise PydanticCustomError("value_error", "must be a text, or a list of token ids, not empty")


class CompletionBody(SamplingBody):
    """``POST /v1/completions``."""

    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_prompt, json_schema_input_type=_FORMS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    session: Session | None = None
    domain: Name | None = None
    cartridges: CartridgeList | None = None
    echo: Annotated[Any, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Unsupported = None

    def to_request(self, *, actor: str, idempotency_key: str | None) -> ChatRequest:
        """What the chat service takes."""
        return ChatRequest(
            **self.sampling(),
            messages=(),
            prompt=self.prompt,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            cartridges=tuple(item.to_wish() for item in self.cartridges or ()),
            session_id=self.session,
            domain=self.domain,
            idempotency_key=idempotency_key,
            actor=actor,
        )
