"""JSON in and JSON out: bodies and query strings into checked models, values into text that any parser reads.

Parsing is strict (a number in quotes is not a number), unknown fields are refused with the nearest known name, and
a message says where: line and column for text that is not JSON, the field's path for a value that does not fit.
JSON has no NaN and no infinity: they go out as null.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from typing import Any, TypeVar

from flask import request
from flask.json.provider import DefaultJSONProvider
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import RequestEntityTooLarge

from web.errors import ApiError, FieldError

Model = TypeVar("Model", bound=BaseModel)

_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "unsupported": "unsupported"}
#: What pydantic puts into a path for the branches of a union; it means nothing to a client.
_BRANCH = re.compile(r"[a-z-]+\[|^(str|int|float|bool|dict|list|tuple|none)$")


class JsonProvider(DefaultJSONProvider):
    """Flask's, with keys in their own order and null for what JSON has no number for."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        """``obj`` as JSON text."""
        return dumps(obj)


def dumps(value: Any) -> str:
    """``value`` as one line of JSON, also where there is no application context (in a stream)."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def parse_body(model: type[Model]) -> Model:
    """The current request's JSON body as ``model``. Raises 415, 413, 400 (not JSON) or 422 (does not fit)."""
    if not request.is_json:
        given = request.headers.get("Content-Type", "")
        raise ApiError(
            415,
            "unsupported_media_type",
            f"send JSON with the header Content-Type: application/json{f', not {given[:80]}' if given else ''}",
        )
    raw = read_body()
    if not raw.strip():
        raise ApiError(400, "empty_body", "the body is empty; send a JSON object, {} at the least")
    try:
        return model.model_validate_json(raw, strict=True)
    except ValidationError as error:
        if any(problem["type"] == "int_type" for problem in error.errors()):
            return _with_whole_numbers(model, raw)
        raise _explained(error, model) from None


def _with_whole_numbers(model: type[Model], raw: bytes) -> Model:
    """``raw`` as ``model``, where 3.0 is an integer, too: JSON has one kind of number, and some clients write it so."""
    text = json.dumps(json.loads(raw, parse_float=_whole))
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _explained(error, model) from None


def _whole(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) <= 2**53 else number


def read_body() -> bytes:
    """The current request's body, at most ``request.max_content_length`` bytes. Raises 413.

    Werkzeug cuts a chunked one off at the limit without a word; here that is a 413, too."""
    raw = request.get_data(cache=False)
    limit = request.max_content_length
    if request.content_length is None and limit is not None and len(raw) >= limit:
        raise RequestEntityTooLarge
    return raw


def parse_query(model: type[Model]) -> Model:
    """The current request's query string as ``model``. Raises 422, also for a NUL, which no database looks for."""
    for name, text in request.args.items():
        if "\x00" in name + text:
            field = name.replace("\x00", "\ufffd")[:200]
            detail = "must not contain NUL characters"
            raise ApiError(422, "invalid_request", f"{field}: {detail}", errors=[FieldError(field, detail)])
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise _explained(error, model) from None


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    for problem in problems:
        if problem["type"] == "json_invalid":
            where = problem["msg"].removeprefix("Invalid JSON: ")
            return ApiError(400, "malformed_json", f"the body is not valid JSON: {where}")
    fields = [_field_error(problem, model) for problem in problems]
    unique = list(dict.fromkeys(fields))
    more = f" (and {len(unique) - 1} more)" if len(unique) > 1 else ""
    first = unique[0]
    detail = f"{first.field}: {first.detail}{more}" if first.field else f"{first.detail}{more}"
    return ApiError(422, "invalid_request", detail, errors=unique)


def _field_error(problem: Any, model: type[BaseModel]) -> FieldError:
    path = field_path(problem["loc"])
    code = _CODES.get(problem["type"], "invalid_value")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _siblings(model, problem["loc"]), n=1, cutoff=0.5)
        return FieldError(path, f"unknown field{f'; did you mean {near[0]}?' if near else ''}", code)
    return FieldError(path, problem["msg"].removeprefix("Value error, "), code)


def field_path(location: tuple[str | int, ...]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path or not _BRANCH.search(part):
            path += f".{part}" if path else part
    return path[:200].encode("utf-8", "replace").decode()


def _siblings(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The fields that are known at the place of ``location``."""
    schema = model.model_json_schema()
    known = schema.get("$defs", {})
    places = [schema]
    for part in location[:-1]:
        key = "items" if isinstance(part, int) else "properties"
        inside = [place[key] for place in places if key in place]
        if isinstance(part, str):
            inside = [fields[part] for fields in inside if part in fields]
        places = [branch for place in inside for branch in _branches(place, known)]
    return [name for place in places for name in place.get("properties", {})]


def _branches(schema: dict[str, Any], known: dict[str, Any]) -> list[dict[str, Any]]:
    """``schema`` itself, what it refers to, or the alternatives that it offers."""
    if "$ref" in schema:
        return [known[schema["$ref"].rsplit("/", 1)[-1]]]
    if "anyOf" in schema:
        return [branch for option in schema["anyOf"] for branch in _branches(option, known)]
    return [schema]
