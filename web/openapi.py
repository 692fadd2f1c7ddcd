"""The OpenAPI 3.1 document, made from the routes, their views and their pydantic models.

``GET /openapi.json`` serves it, ``python -m cli.main openapi`` prints it, ``docs/openapi.json`` is that print, and a
test compares the two. Pages and static files are not in it. Events of streams have no schema here: ``docs/api.md``
tells them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Flask, current_app, jsonify
from flask.typing import ResponseReturnValue
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from werkzeug.routing import BaseConverter, IntegerConverter, PathConverter, Rule, UnicodeConverter

from web.admin_schemas import ADMIN_ANSWERS
from web.answer_schemas import ANSWERS, OpenAIError, ProblemDetails
from web.auth import ANY, OPEN, requires, scope_of
from web.ops import application_version
from web.view_reading import Reading, read_view

blueprint = Blueprint("openapi", __name__)

_ANSWERS: dict[str, type[BaseModel]] = {**ANSWERS, **ADMIN_ANSWERS}
_TEMPLATE = "#/components/schemas/{model}"
_UNSEEN = ("pages", "static")
_JSON = "application/json"
_EVENTS = "text/event-stream"
_OPENAI, _PROBLEM = "OpenAI", "Problem"  #: the dialects of errors, as their responses are named
_LONGEST_LINE = 8190  # configs/gunicorn.conf.py
_REFUSALS = {
    400: "The request does not fit",
    401: "There is no valid key",
    403: "The key lacks a scope, or another site asks",
    404: "It is not there",
    405: "Not with this method",
    409: "Its state does not allow it",
    413: "The body is too large",
    415: "The body is not of this media type",
    421: "The Host header names somebody else",
    422: "A field does not fit",
    429: "Too much at once",
    503: "Not ready",
    507: "No room for another checkpoint",
}


@blueprint.get("/openapi.json")
@requires(ANY)
def openapi() -> ResponseReturnValue:
    """This document."""
    app = current_app
    if "olympus.openapi" not in app.extensions:
        app.extensions["olympus.openapi"] = document(app)
    return jsonify(app.extensions["olympus.openapi"])


class _Schemas(GenerateJsonSchema):
    """Pydantic's, with patterns as ECMA 262 has them, which knows no ``\\z``."""

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> dict[str, Any]:
        """One model's schema."""
        told: dict[str, Any] = _ecma(super().generate(schema, mode))
        return told

    def generate_definitions(self, inputs: Any) -> Any:
        """Those of many."""
        found, definitions = super().generate_definitions(inputs)
        return found, _ecma(definitions)


def _ecma(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            name: value.replace(r"\z", "$") if name == "pattern" and isinstance(value, str) else _ecma(value)
            for name, value in schema.items()
        }
    return [_ecma(item) for item in schema] if isinstance(schema, list) else schema


def document(app: Flask) -> dict[str, Any]:
    """The document of ``app``'s routes."""
    routes = list(_routes(app))
    models = {reading.body for _, _, reading in routes if reading.body is not None}
    models |= {
        OpenAIError,
        ProblemDetails,
        *(_ANSWERS[rule.endpoint] for rule, _, _ in routes if rule.endpoint in _ANSWERS),
    }
    ordered = sorted(models, key=lambda model: (model.__module__, model.__qualname__))
    refs, told = models_json_schema(
        [(model, "validation") for model in ordered], ref_template=_TEMPLATE, schema_generator=_Schemas
    )
    named = {model: refs[model, "validation"] for model in ordered}
    paths: dict[str, Any] = {}
    for rule, method, reading in routes:
        path = re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule)
        paths.setdefault(path, {})[method.lower()] = _operation(app, rule, method, path, reading, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Olympus",
            "version": application_version(),
            "description": "OpenAI's API under /v1, our own under /olympus. docs/api.md says what the fields mean.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(told["$defs"].items())),
            "responses": _refusals(named),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "oly_<id>_<secret>"}},
        },
    }


def _routes(app: Flask) -> Iterator[tuple[Rule, str, Reading]]:
    """Every route with each of its methods."""
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        if rule.endpoint.partition(".")[0] in _UNSEEN:
            continue
        reading = read_view(app.view_functions[rule.endpoint])
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            yield rule, method, reading


def _operation(
    app: Flask, rule: Rule, method: str, path: str, reading: Reading, named: dict[type[BaseModel], dict[str, Any]]
) -> dict[str, Any]:
    view = app.view_functions[rule.endpoint]
    scope = scope_of(view)
    told: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]),
        "tags": [rule.endpoint.partition(".")[0]],
        "summary": (view.__doc__ or "").strip().partition("\n")[0],
        "parameters": [*_of_path(rule), *_of_query(reading.query)],
    }
    if scope is not None:
        told["description"] = "Any key." if scope == ANY else f"Needs the scope `{scope}`."
    told["security"] = [] if rule.endpoint in OPEN else [{"key": []}]
    if reading.body is not None:
        told["requestBody"] = {"required": not reading.optional, "content": {_JSON: {"schema": named[reading.body]}}}
    elif reading.raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        told["requestBody"] = {"required": True, "content": dict.fromkeys(reading.raw, binary)}
    told["responses"] = _responses(rule, method, reading, named)
    return {name: value for name, value in told.items() if value != []} | {"security": told["security"]}


def _of_path(rule: Rule) -> list[dict[str, Any]]:
    """The parameters of a path, with what their converters let through."""
    return [
        {"name": name, "in": "path", "required": True, "schema": _of_converter(rule._converters[name])}
        for name in sorted(rule.arguments)
    ]


def _of_converter(converter: BaseConverter) -> dict[str, Any]:
    if isinstance(converter, IntegerConverter):
        return {"type": "integer", "minimum": converter.min or 0, "maximum": converter.max}
    if isinstance(converter, UnicodeConverter | PathConverter):
        return {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}
    lengths, _, plain = converter.regex.rpartition(")(?=")  # a look-ahead only bounds the length
    return {"type": "string", "pattern": f"^{re.sub(r'^[(][?]=.*?[$][)][)]', '', plain or lengths)}$"}


def _of_query(model: type[BaseModel] | None) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema(schema_generator=_Schemas)
    needed = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in needed, "schema": _in_query(name, told)}
        for name, told in schema["properties"].items()
    ]


def _in_query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: a parameter is there or not. What is not looked at is text, as all is in a query, or many.

    No text in it may hold a NUL.
    """
    text = {"pattern": r"^[^\x00]*$", "type": "string"}
    kept = {name: value for name, value in schema.items() if name not in ("title", "default")}
    default = {} if schema.get("default") is None else {"default": schema["default"]}
    options = [option for option in kept.pop("anyOf", ()) if option.get("type") != "null"]
    told = kept | (options[0] if len(options) == 1 else {"anyOf": options} if options else {}) | default
    if not told.keys() - {"description"}:
        return told | ({"type": "array", "items": text} if name.endswith("[]") else text)
    return {"pattern": text["pattern"]} | told if told.get("type") == "string" and "enum" not in told else told


def _responses(
    rule: Rule, method: str, reading: Reading, named: dict[type[BaseModel], dict[str, Any]]
) -> dict[str, Any]:
    dialect = _OPENAI if rule.rule.startswith(("/v1", "/custom")) else _PROBLEM
    refused = set() if rule.endpoint in OPEN else {401, 403, 421, 503}
    if reading.query or reading.body:
        refused |= {400} if dialect == _OPENAI or reading.body else set()
        refused |= {422} if dialect == _PROBLEM else set()
    if reading.body is not None or reading.raw:
        refused |= {413, 415}
    if rule.arguments or dialect == _OPENAI or reading.body is not None:  # bodies name kernels and runs, too
        refused |= {404}
    if rule.arguments:  # another route may take the same path
        refused |= {405}
    if method != "GET":
        refused |= {409, 429, 507}
    if _EVENTS in reading.media:
        refused |= {429}
    told: dict[str, Any] = {str(status): {"$ref": f"#/components/responses/{dialect}{status}"} for status in refused}
    if rule.arguments or reading.query:
        told["414"] = {"$ref": "#/components/responses/LongLine"}
    for status in reading.statuses:
        meaning = "Done." if status < 400 else "Not yet."
        told[str(status)] = {"description": meaning, "content": _content(rule, reading, named)}
    return dict(sorted(told.items()))


def _refusals(named: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    """Every refusal in both dialects, and what gunicorn says before the application is asked."""
    shapes = {
        _OPENAI: (_JSON, named[OpenAIError]),
        _PROBLEM: ("application/problem+json", named[ProblemDetails]),
    }
    long_line = {
        "description": f"The request line is longer than {_LONGEST_LINE:,} bytes.",
        "content": {"text/html": {"schema": {"type": "string"}}},
    }
    return {"LongLine": long_line} | {
        f"{dialect}{status}": {"description": f"{why}.", "content": {media: {"schema": shape}}}
        for dialect, (media, shape) in shapes.items()
        for status, why in _REFUSALS.items()
    }


def _content(rule: Rule, reading: Reading, named: dict[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    if rule.endpoint in _ANSWERS:
        shape: dict[str, Any] = named[_ANSWERS[rule.endpoint]]
    elif reading.keys is not None:
        listed = {name: {"type": "array"} if is_list else {} for name, is_list in reading.keys.items()}
        shape = {"type": "object", "properties": listed, "required": list(reading.keys)}
    else:
        shape = {"type": "object"}
    others = sorted(reading.media - {_JSON})
    told: dict[str, Any] = {media: {} if media == _EVENTS else {"schema": {"type": "string"}} for media in others}
    return told | ({_JSON: {"schema": shape}} if _JSON in reading.media or not told else {})
