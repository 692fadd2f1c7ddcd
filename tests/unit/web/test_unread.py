"""The rest of a body is skipped after the answer, up to a bound, whatever it is like."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest

from web.unread import SkipUnread


class Response:
    """As gunicorn's: the application gets its bound method."""

    closes = False

    def force_close(self) -> None:
        self.closes = True

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return lambda data: None


def answered(body: Any, read: int = 0, most: int = 100, **environ: str) -> Response:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        environ["wsgi.input"].read(read)
        return [b"done"]

    response = Response()
    found = SkipUnread(app, most)({"wsgi.input": body, **environ}, response.start_response)  # type: ignore[arg-type]
    assert list(found) == [b"done"]
    if hasattr(found, "close"):
        found.close()
    return response


def test_the_rest_is_read() -> None:
    body = io.BytesIO(b"a" * 90)
    assert not answered(body, read=7, CONTENT_LENGTH="90").closes
    assert body.tell() == 90


def test_not_more_than_the_bound_and_then_the_connection_closes() -> None:
    body = io.BytesIO(b"a" * 300)
    assert answered(body, CONTENT_LENGTH="300").closes
    assert body.tell() == 100


def test_chunked_bodies_too() -> None:
    body = io.BytesIO(b"a" * 300)
    answered(body, HTTP_TRANSFER_ENCODING="gzip, Chunked")
    assert body.tell() == 100


@pytest.mark.parametrize("environ", [{}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}, {"CONTENT_LENGTH": "x"}])
def test_without_a_body_nothing_is_touched(environ: dict[str, str]) -> None:
    body = io.BytesIO(b"the next request")
    answered(body, **environ)
    assert body.tell() == 0


def test_a_client_that_is_gone_is_no_error() -> None:
    class Gone(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size:
                raise ConnectionResetError
            return b""

    answered(Gone(), CONTENT_LENGTH="50")
