"""OpenAI's ``response_format``: free text, any JSON object, or JSON that fits a schema.

What a schema may say is what the grammar library keeps (``workspace.constraints``); with and without ``strict`` the
answer is held to all of it, and what cannot be kept is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from web.body import Body, Ignored

#: For the client alone.
FormatName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}\z")]


class JsonSchemaFormat(Body):
    """A schema with a name."""

    name: FormatName
    description: Ignored = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer shall have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("value_error", "json_schema goes with the type 'json_schema', and only with it")
        return self

    def to_schema(self) -> dict[str, Any] | None:
        """The schema to keep; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None
