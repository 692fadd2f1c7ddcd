"""What nobody has read of a request's body is skipped before the connection is used again.

An answer may be known before the body is: no such route, no key, another media type. gunicorn (27.0) then promises to
keep the connection, skips at most 64 KiB of the rest, and where there is more closes it without a word: a client that
keeps its connections finds out by its next request, which fails ("server disconnected"). So the rest is skipped here,
after the answer was given, up to the length of a body that would be read; with a longer one the answer says that the
connection closes (RFC 9112, section 9.6).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from werkzeug.wsgi import ClosingIterator

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_AT_ONCE = 1 << 16


class SkipUnread:
    """``app`` whose requests are read to their end, where that is at most ``most`` bytes away."""

    def __init__(self, app: WSGIApplication, most: int):
        self._app, self._most = app, most

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """As WSGI has it."""
        length = environ.get("CONTENT_LENGTH") or "0"
        declared = int(length) if length.isdecimal() else 0
        if not declared and "chunked" not in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
            return self._app(environ, start_response)
        if declared > self._most:
            _close_after(start_response)
        return ClosingIterator(self._app(environ, start_response), lambda: self._skip(environ["wsgi.input"]))

    def _skip(self, body: Any) -> None:
        left = self._most
        with contextlib.suppress(Exception):  # the client is gone, or sends nonsense: gunicorn closes then
            while left > 0 and (read := len(body.read(min(left, _AT_ONCE)))):
                left -= read


def _close_after(start_response: StartResponse) -> None:
    """gunicorn ignores a ``Connection`` header of the application; its response can be told. Others see to it."""
    tell = getattr(getattr(start_response, "__self__", None), "force_close", None)
    if callable(tell):
        tell()
