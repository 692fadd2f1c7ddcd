"""What the bodies and queries of all routes have in common: strictness, and the types of single fields.

What would change an answer and is not built is refused by name (``Unsupported``, ``only``); what is a hint only is
accepted and ignored (``Ignored``). Nothing is ignored that a client could rely on.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

ID_LIMIT = 2**63 - 1
_MOST_STOPS = 4
_MOST_BIASES = 1024

Session = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]*\z")]


class Body(BaseModel):
    """A request: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _unsupported(value: Any) -> Any:
    if value in (None, [], {}):
        return None
    raise PydanticCustomError("unsupported", "is not supported yet; leave it out")


Unsupported = Annotated[Any, AfterValidator(_unsupported), WithJsonSchema({"enum": [None, [], {}]})]
Ignored = Any


class only:
    """In the annotation of a field: accept exactly these values, and null; the rest is not supported yet."""

    def __init__(self, *allowed: Any) -> None:
        self._allowed = allowed

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self._allowed, None]}

    def _check(self, value: Any) -> Any:
        if value is None or any(value == item and type(value) is type(item) for item in self._allowed):
            return value
        shown = " or ".join(repr(item) for item in self._allowed)
        raise PydanticCustomError("unsupported", "only {shown} is supported yet", {"shown": shown})


def without_nul(text: str) -> str:
    """``text``, unless it holds a NUL."""
    if "\x00" in text:
        raise PydanticCustomError("value_error", "must not contain NUL characters")
    return text


#: What clients may send as ``stop``, for the OpenAPI document.
STOPS = (
    Annotated[str, StringConstraints(min_length=1)]
    | Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(max_length=_MOST_STOPS)]
    | None
)


def stop_texts(value: Any) -> Any:
    """OpenAI's two forms of ``stop`` as a tuple."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise PydanticCustomError("value_error", "must be a text, or a list of texts, none of them empty")
    if len(stops) > _MOST_STOPS:
        raise PydanticCustomError("value_error", "at most {most} stop texts are possible", {"most": _MOST_STOPS})
    return tuple(stops)


def _token_ids(value: Any) -> Any:
    """JSON's keys are texts, and these mean token ids."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise PydanticCustomError("value_error", 'must map token ids to numbers, like {{"50256": -100}}')
    if len(value) > _MOST_BIASES:
        raise PydanticCustomError("value_error", "at most {most} biases are possible", {"most": _MOST_BIASES})
    return {int(key): bias for key, bias in value.items()}


#: OpenAI's map of token ids to what is added to their logits.
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]] | None,
    BeforeValidator(_token_ids),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": _MOST_BIASES,
                },
                {"type": "null"},
            ]
        }
    ),
]
