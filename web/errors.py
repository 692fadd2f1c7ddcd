"""Errors in the dialect of whoever asked: OpenAI's shape under /v1, a page for people, problem+json elsewhere.

One handler for HTTP errors and one for everything else; views never build an error. Domain exceptions carry their own
``status`` and ``code`` and a message made for the user. Of an unexpected exception the client learns the request id
and nothing else; the traceback is in the log.

Sources: RFC 9457 (problem details), the OpenAI API reference (error codes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import structlog
from flask import Flask, Response, g, jsonify, render_template, request
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from memory.history import HistoryError
from olympus.errors import OlympusError
from storage.errors import StorageError

log = structlog.get_logger(__name__)

Body = TypeVar("Body", bound=BaseModel)

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. ``param`` names the field at fault, ``errors`` all of them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        errors: Sequence[dict[str, str]] = (),
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.errors = list(errors)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(math.ceil(retry_after))


def is_openai(path: str) -> bool:
    """True for paths whose clients expect OpenAI's error shape."""
    return path == "/v1" or path.startswith("/v1/")


def openai_error(error: ApiError) -> dict[str, Any]:
    """The body OpenAI's clients parse; also sent inside a stream that has already begun."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def translate(error: Exception) -> ApiError | None:
    """Any exception whose message is made for users, as an ``ApiError``; None for an unexpected one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OlympusError):
        if error.status == 500:
            log.error("internal state error", reason=str(error), exc_info=error)
        return ApiError(error.status, str(error), code=error.code, retry_after=error.retry_after)
    if isinstance(error, HistoryError):
        return ApiError(422, str(error), code="invalid_request")
    if isinstance(error, StorageError):
        log.error("storage error", exc_info=error)
        return ApiError(503, "the database does not answer; try again shortly", code="storage", retry_after=5)
    if isinstance(error, HTTPException):
        return _from_http(error)
    return _from_workspace(error)


def _from_workspace(error: Exception) -> ApiError | None:
    if type(error).__module__ != "workspace.errors":  # not imported here: that would load torch with the web server
        return None
    from workspace.errors import EngineBusy, EngineStopped, PromptTooLong, RequestError

    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), code="context_length_exceeded", param=error.param)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value", param=error.param)
    if isinstance(error, EngineBusy):
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=2)
    if isinstance(error, EngineStopped):
        return ApiError(503, "the server is stopping", code="stopping", retry_after=5)
    return None


def _from_http(error: HTTPException) -> ApiError:
    status = error.code or 500
    if isinstance(error, RequestEntityTooLarge):
        limit = request.max_content_length
        return ApiError(413, f"the request body is larger than the limit of {limit} bytes", code="body_too_large")
    headers = {key: value for key, value in error.get_headers() if key in ("Allow", "Retry-After")}
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    message = {
        404: f"there is nothing at {request.path}",
        405: f"{request.method} is not possible at {request.path}",
    }.get(status, error.description or HTTPStatus(status).phrase)
    return ApiError(status, message, code=code, headers=headers)


def register(app: Flask) -> None:
    """Install the two handlers."""
    app.register_error_handler(HTTPException, _handle)
    app.register_error_handler(Exception, _handle)


def _handle(error: Exception) -> Response:
    known = translate(error)
    if known is None:
        log.error("unexpected error", method=request.method, path=request.path, exc_info=error)
        known = ApiError(500, f"an unexpected error; the server's log has it under {g.get('request_id', '')}")
    response = _render(known)
    response.status_code = known.status
    response.headers.update(known.headers)
    return response


def _render(error: ApiError) -> Response:
    if is_openai(request.path):
        return jsonify(openai_error(error))
    phrase = HTTPStatus(error.status).phrase
    if g.get("wants_page", False):
        page = render_template(
            "error.html", page="error", status=error.status, title=phrase, detail=error.message, request_id=g.request_id
        )
        return Response(page, mimetype="text/html")
    problem = {
        "type": "about:blank",
        "title": phrase,
        "status": error.status,
        "detail": error.message,
        "instance": request.path,
        "request_id": g.get("request_id"),
    }
    if error.code:
        problem["code"] = error.code
    if error.errors:
        problem["errors"] = error.errors
    response = jsonify(problem)
    response.mimetype = "application/problem+json"
    return response


# -- reading requests -------------------------------------------------------------------------------------------


def read_body(kind: type[Body], *, optional: bool = False) -> Body:
    """The JSON body as ``kind``, or an ``ApiError`` that names what is wrong and where."""
    raw = request.get_data(cache=False)
    if optional and not raw:
        raw = b"{}"
    elif request.mimetype != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json", code="not_json")
    try:
        return kind.model_validate_json(raw, strict=False)
    except ValidationError as error:
        raise _invalid(error) from None


def read_query(kind: type[Body]) -> Body:
    """The query string as ``kind``."""
    try:
        return kind.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> ApiError:
    details = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if not field and ": " in message and message.split(": ", 1)[0].isidentifier():
            field, message = message.split(": ", 1)  # a validator of the whole body names the field itself
        details.append({"field": field, "message": message})
    first = details[0]
    said = f"{first['field']}: {first['message']}" if first["field"] else first["message"]
    malformed = any(item["type"] == "json_invalid" for item in error.errors(include_url=False))
    status = 400 if malformed or is_openai(request.path) else 422
    return ApiError(
        status,
        said if len(details) == 1 else f"{said} (and {len(details) - 1} more)",
        code="malformed_json" if malformed else "invalid_value",
        param=first["field"] or None,
        errors=details,
    )
