"""OpenAI's embeddings: texts into vectors, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from pydantic import BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from olympus.embeddings import Input, InvalidInput
from web.auth import requires
from web.body import Body, Ignored, without_nul
from web.context import runtime
from web.errors import ApiError, FieldError
from web.jsonio import parse_body

blueprint = Blueprint("embeddings", __name__, url_prefix="/v1")

_MOST_INPUTS = 2048  # OpenAI's


_Text = Annotated[str, StringConstraints(min_length=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
#: What clients may send as ``input``, for the OpenAPI document.
_FORMS = _Text | _Ids | Annotated[list[_Text | _Ids], Field(min_length=1, max_length=_MOST_INPUTS)]


def _inputs(value: Any) -> Any:
    """OpenAI's four forms as a list of texts and token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("value_error", "must be a text, token ids, or a list of them, not empty")
    if len(value) > _MOST_INPUTS:
        raise PydanticCustomError("value_error", "at most {most} inputs are possible", {"most": _MOST_INPUTS})
    return tuple(_input(item) for item in value)


def _input(item: Any) -> Input:
    if isinstance(item, str) and item:
        return without_nul(item)
    if isinstance(item, list) and item and all(type(token) is int for token in item):
        return tuple(item)
    raise PydanticCustomError("value_error", "each input must be a text or a list of token ids, not empty")


class EmbeddingsBody(Body):
    """``POST /v1/embeddings``."""

    input: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_inputs, json_schema_input_type=_FORMS)]
    model: Annotated[str, StringConstraints(max_length=256)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    user: Ignored = None


@blueprint.post("/embeddings")
@requires("chat")
def embeddings() -> ResponseReturnValue:
    """Vectors of length 1."""
    body = parse_body(EmbeddingsBody)
    with runtime().admission.chat():
        try:
            found = runtime().embeddings.embed(body.input, body.model, body.dimensions)
        except InvalidInput as error:
            field = str(error).partition(":")[0]
            raise ApiError(400, "invalid_value", str(error), errors=[FieldError(field, str(error))]) from error
    as_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") if as_text else row.tolist(),
        }
        for index, row in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return jsonify({"object": "list", "data": data, "model": found.model, "usage": usage})
