"""What a view may reach: the runtime of its application, and who asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flask import current_app, g

from olympus.access import Principal

if TYPE_CHECKING:  # the runtime imports torch; whoever made the application has done so already
    from olympus.runtime import Runtime


def runtime() -> Runtime:
    """The one object behind all views."""
    return cast("Runtime", current_app.extensions["olympus"])


def principal() -> Principal:
    """Who the current request acts as; only after authentication, so not in views of open routes."""
    return cast("Principal", g.principal)


def request_id() -> str:
    """The current request's id, as in the log and in the ``X-Request-Id`` header."""
    return cast("str", g.request_id)
