"""One place that turns whatever went wrong into an answer, in the dialect of the path.

``/v1/*`` and ``/custom/*`` speak OpenAI's error shape, pages get a small HTML page, everything else
``application/problem+json`` (RFC 9457, with ``code``, ``request_id`` and ``errors``). Domain exceptions bring their
status and code themselves (``olympus.errors``); those of the floors below, which know no HTTP, are listed here. The
text of an unexpected exception never leaves the server: the client gets the request id, the log gets the traceback.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import structlog
from flask import Flask, Response, current_app, json, render_template, request
from jinja2 import TemplateNotFound
from markupsafe import escape
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from memory.cartridges import errors as cartridges
from memory.history import HistoryError
from olympus.errors import OlympusError
from storage.errors import StorageError
from web.context import request_id
from workspace.errors import EngineBusy, EngineStopped, PromptTooLong, RequestError

log = structlog.get_logger(__name__)

_API_PREFIXES = ("/olympus/", "/custom/", "/ping", "/healthz", "/readyz", "/metrics", "/static/")
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field of a request that cannot be taken. ``field`` is its path: ``messages[0].content``."""

    field: str
    detail: str
    code: str = "invalid_value"

    def to_json(self) -> dict[str, str]:
        """An entry of ``errors[]``."""
        return {"field": self.field, "detail": self.detail, "code": self.code}


@dataclass(frozen=True, slots=True)
class Problem:
    """What the client is told, before it is put into a dialect."""

    status: int
    code: str
    detail: str
    errors: tuple[FieldError, ...] = ()
    retry_after: float | None = None
    headers: tuple[tuple[str, str], ...] = field(default=())
    extensions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The status' own phrase, as RFC 9457 asks for with the type ``about:blank``."""
        return HTTPStatus(self.status).phrase if self.status in set(HTTPStatus) else "Error"


class ApiError(Exception):
    """An answer that a view or a guard has decided on."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Iterable[FieldError] = (),
        headers: Iterable[tuple[str, str]] = (),
        retry_after: float | None = None,
    ):
        self.problem = Problem(status, code, detail, tuple(errors), retry_after, tuple(headers))
        super().__init__(detail)


def install(app: Flask) -> None:
    """Handle every exception of ``app``, also those of paths that no blueprint knows."""
    app.register_error_handler(HTTPException, _answer)
    app.register_error_handler(Exception, _answer)


def _answer(error: Exception) -> Response:
    return respond(problem_of(error, request.path, request_id()))


def problem_of(error: Exception, path: str, request_id: str) -> Problem:
    """What to tell the client of ``path`` about ``error``. Logs what is our fault, with its traceback.

    Streams call it, too, when there is no request context any more.
    """
    if isinstance(error, ApiError):
        return error.problem
    if isinstance(error, HTTPException):
        return _of_http(error)
    known = _of_domain(error)
    if known is None:
        log.error("unexpected error", path=path, exc_info=error)
        return Problem(500, "internal_error", f"an unexpected error; the server's log has it as {request_id}")
    if known.status >= 500 and known.status not in (503, 507):
        log.error("failed", path=path, code=known.code, exc_info=error)
    return known


def _of_domain(error: Exception) -> Problem | None:
    if isinstance(error, OlympusError):
        return Problem(error.status, error.code, str(error), retry_after=error.retry_after, extensions=error.extensions)
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else "invalid_value"
        return Problem(400, code, str(error), (FieldError(error.param or "messages", str(error), code),))
    if isinstance(error, EngineBusy):
        return Problem(429, "engine_busy", str(error), retry_after=2.0)
    if isinstance(error, EngineStopped):
        return Problem(503, "server_stopping", "the model is not running; the server is stopping", retry_after=5.0)
    if isinstance(error, HistoryError):
        return Problem(422, "invalid_request", str(error))
    if isinstance(error, cartridges.CartridgeError):
        return _of_cartridge(error)
    if isinstance(error, StorageError):
        return Problem(503, "storage_unavailable", "the database cannot be used now; try again", retry_after=5.0)
    return None


_CARTRIDGE_PROBLEMS: dict[type[cartridges.CartridgeError], tuple[int, str]] = {
    cartridges.InvalidCartridgeId: (422, "invalid_request"),
    cartridges.CartridgeNotFound: (404, "cartridge_not_found"),
    cartridges.CartridgeConflict: (409, "invalid_action"),
    cartridges.CartridgeMismatch: (409, "cartridge_mismatch"),
    cartridges.CartridgeFileInvalid: (422, "invalid_cartridge_file"),
    cartridges.CartridgeNotExportable: (409, "not_exportable"),
}


def _of_cartridge(error: cartridges.CartridgeError) -> Problem:
    for kind, (status, code) in _CARTRIDGE_PROBLEMS.items():
        if isinstance(error, kind):
            return Problem(status, code, str(error))
    # Damage is ours, and its message names places on this machine: the log has it.
    detail = "a file of the cartridge is missing or altered; the server's log names it"
    return Problem(500, "cartridge_damaged", detail)


def _of_http(error: HTTPException) -> Problem:
    status = error.code or 500
    code = HTTPStatus(status).name.lower() if status in set(HTTPStatus) else "error"
    kept = tuple((name, value) for name, value in error.get_headers() if name.lower() != "content-type")
    detail = error.description or ""
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        detail = f"{request.method} is not possible here; possible: {allowed}"
    elif isinstance(error, RequestEntityTooLarge):
        limit = request.max_content_length
        usual = limit == current_app.config["MAX_CONTENT_LENGTH"]
        kind = {"cartridges": "cartridges", "history_files": "memory"}.get(request.blueprint or "", "kernels")
        setting = "server.max_body_bytes" if usual else f"{kind}.import_max_bytes"
        detail = f"the body is larger than {limit} bytes, which is the limit ({setting})"
    elif type(error) is NotFound and error.description == NotFound.description:
        detail = f"there is nothing at {request.path}"
    return Problem(status, code, detail, headers=kept)


def respond(problem: Problem) -> Response:
    """``problem`` in the dialect of the current request's path."""
    if request.path == "/v1" or request.path.startswith(("/v1/", "/custom/")):
        response = _json(openai_error(problem, request_id()), _openai_status(problem), "application/json")
    elif _wants_page():
        response = Response(_page(problem), problem.status, mimetype="text/html")
    else:
        response = _json(_problem_json(problem), problem.status, "application/problem+json")
    for name, value in problem.headers:
        response.headers[name] = value
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(problem.retry_after)))
    return response


def openai_error(problem: Problem, request_id: str) -> dict[str, Any]:
    """OpenAI's error object. Also what a stream sends when something fails after its first byte."""
    status = _openai_status(problem)
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message, param, code = problem.detail, None, problem.code
    if problem.errors:
        first, more = problem.errors[0], len(problem.errors) - 1
        param, code = first.field or None, first.code
        named = first.detail if first.detail.startswith(first.field) else f"{first.field}: {first.detail}"
        message = named + (f" (and {more} more)" if more else "")
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if status >= 500:
        error["request_id"] = request_id
    return {"error": error}


def _openai_status(problem: Problem) -> int:
    """OpenAI says 400 where HTTP has the finer 422."""
    return 400 if problem.status == 422 else problem.status


def _problem_json(problem: Problem) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "instance": request.path,
        "code": problem.code,
        "request_id": request_id(),
        **problem.extensions,
    }
    if problem.errors:
        body["errors"] = [item.to_json() for item in problem.errors]
    return body


def _wants_page() -> bool:
    if request.path.startswith(_API_PREFIXES):
        return False
    return request.blueprint == "pages" or "text/html" in request.headers.get("Accept", "")


def _page(problem: Problem) -> str:
    shown = {"status": problem.status, "title": problem.title, "detail": problem.detail, "request_id": request_id()}
    try:
        return render_template("error.html", page="error", **shown)
    except TemplateNotFound:
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{problem.status} {escape(problem.title)}</title>"
            f"<h1>{problem.status} {escape(problem.title)}</h1><p>{escape(problem.detail)}</p><p>{request_id()}</p>"
        )


def _json(body: dict[str, Any], status: int, mimetype: str) -> Response:
    return Response(json.dumps(body) + "\n", status, mimetype=mimetype)
