"""What every request and response carries: a request id, security headers, caching, one log line, one measurement.

The content security policy allows this origin's own files and nothing inline, so that text which a model wrote can
never become a script. A stream is logged and measured when it ends, not when it begins.
"""

from __future__ import annotations

import re
import time
import uuid

import structlog
from flask import Flask, Response, g, request

from telemetry.logs import bind_request
from telemetry.metrics import Metrics
from web.assets import Assets
from web.compression import Compressor

log = structlog.get_logger("web.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: Too frequent and too dull for the log at its normal level.
_QUIET = frozenset({"static", "ops.healthz", "ops.readyz", "ops.metrics"})


def install(app: Flask, metrics: Metrics, assets: Assets) -> None:
    """Register the hooks; before all others, so that even a refused request has its id and its line."""
    compressor = Compressor(assets)

    @app.before_request
    def begin() -> None:
        g.begun = time.perf_counter()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        bind_request(g.request_id)

    @app.after_request
    def end(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        if request.is_secure:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        _set_caching(response, assets)
        compressor.apply(response)
        _account_for(response, metrics)
        return response


def _set_caching(response: Response, assets: Assets) -> None:
    if request.endpoint == "static" and response.status_code in (200, 206, 304):
        name, version = (request.view_args or {}).get("filename", ""), request.args.get("v")
        unchanging = version is not None and assets.version(name) == version
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if unchanging else "no-cache"
    else:
        response.headers.setdefault("Cache-Control", "no-store")


def _account_for(response: Response, metrics: Metrics) -> None:
    """Log and measure: now, or for a stream once it is closed, when there is no request context any more."""
    begun, method, status = g.begun, request.method, response.status_code
    route = request.url_rule.rule if request.url_rule is not None else "(unmatched)"
    say = log.debug if request.endpoint in _QUIET else log.info

    def account() -> None:
        seconds = time.perf_counter() - begun
        metrics.observe_request(method, route, status, seconds)
        say("request", method=method, route=route, status=status, ms=round(seconds * 1000, 1))

    if response.is_streamed and not response.direct_passthrough:
        response.call_on_close(account)
    else:
        account()
