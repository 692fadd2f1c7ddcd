"""Who asks, and may they: one ``authenticate`` for every route, deny by default.

Every endpoint stands in ``SCOPES`` or ``OPEN`` (a test walks the URL map); one that is forgotten is refused. A key comes
as ``Authorization: Bearer``; a browser signs in once and holds a signed cookie that names its key, which is checked
against the key store on every request, so that revoking works at once. Without any key only this machine is served:
the server listens on loopback, the peer is on loopback, and no proxy has forwarded the request.

Cross-site requests: the approach of datasette's ``csrf.py`` (Fetch Metadata, then Origin), no tokens in forms. DNS
rebinding: a Host allowlist for everything that is not proven by a bearer key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import threading
import time
from collections import deque
from typing import Any

from flask import Flask, Response, current_app, g, redirect, request
from itsdangerous import BadSignature, URLSafeTimedSerializer

from olympus.access import LOCAL, KeyStore, Principal, looks_like_key
from settings import LOOPBACK_HOSTS, ServerSettings
from web.errors import ApiError

COOKIE = "olympus_session"
COOKIE_SECONDS = 14 * 86400
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN = frozenset({"static", "ops.healthz", "ops.readyz", "pages.login", "pages.sign_in", "pages.sign_out"})
PAGES = frozenset({"pages.overview", "pages.chat", "pages.kernels", "pages.kernel"})
SCOPES: dict[str, str] = {
    **dict.fromkeys(PAGES, "kernels:read"),
    "openai.models": "chat",
    "openai.model": "chat",
    "openai.chat_completions": "chat",
    "history.page": "history:read",
    "history.sessions": "history:read",
    "history.feedback": "history:write",
    "history.delete_one": "history:write",
    "history.delete_many": "history:write",
    "kernels.index": "kernels:read",
    "kernels.status": "kernels:read",
    "kernels.checkpoints": "kernels:read",
    "kernels.metrics": "kernels:read",
    "kernels.query": "kernels:read",
    "kernels.spawn": "kernels:write",
    "kernels.experiences": "kernels:write",
    "kernels.act": "kernels:write",
    "kernels.restore": "kernels:write",
    "kernels.pin": "kernels:write",
    "kernels.unpin": "kernels:write",
    "kernels.delete": "kernels:write",
    "ops.status": "kernels:read",
    "ops.metrics": "kernels:read",
    "stream.events": "kernels:read",
}


class Authenticator:
    """The rules above, for one application."""

    def __init__(self, settings: ServerSettings, keys: KeyStore):
        self._settings = settings
        self._keys = keys
        self._attempts: dict[str, deque[float]] = {}
        self._attempts_lock = threading.Lock()
        self._hosts = {"localhost", "127.0.0.1", "::1", settings.host, *settings.allowed_hosts}
        self._hosts |= set(filter(None, os.environ.get("REPLIT_DOMAINS", "").split(",")))

    # -- every request ----------------------------------------------------------------------------------------

    def check(self) -> Response | None:
        """``before_request``: refuse, send to the sign-in page, or set ``g.principal`` and let pass."""
        g.wants_page = request.endpoint in PAGES | {"pages.login", "pages.sign_in"}
        bearer = _bearer()
        if not (bearer and looks_like_key(bearer)):
            self._check_host()
            self._check_origin()
        if request.endpoint is None or request.endpoint in OPEN:
            return None  # an unknown path becomes a 404 and tells nothing
        principal = self.authenticate(bearer)
        if principal is None:
            if g.wants_page:
                return redirect(f"/login?next={request.path}", 303)  # type: ignore[return-value]
            raise _unauthorized("this server needs an API key: send the header Authorization: Bearer oly_...")
        scope = SCOPES.get(request.endpoint)
        if scope is None or not principal.may(scope):
            raise ApiError(403, f"this key lacks the scope {scope or 'for this'}", code="insufficient_scope")
        g.principal = principal
        return None

    def authenticate(self, bearer: str | None) -> Principal | None:
        """The principal of this request, from its key, its cookie, or from being on this machine; else None.

        OpenAI clients always send some key. On this machine one that does not look like ours is ignored; one that
        does must be right.
        """
        if bearer is not None:
            principal = self._keys.verify(bearer)
            if principal is not None:
                return principal
            if looks_like_key(bearer) or not self.is_local():
                raise _unauthorized("this API key is unknown, expired or revoked")
        principal = self._from_cookie()
        if principal is None and self.is_local():
            return LOCAL
        return principal

    def is_local(self) -> bool:
        """True when nobody but this machine can have sent the request."""
        forwarded = any(name in request.headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"))
        direct = not forwarded and self._settings.trusted_proxies == 0
        return direct and self._settings.is_loopback and _is_loopback(request.remote_addr)

    # -- browser sessions -------------------------------------------------------------------------------------

    def sign_in(self, key: str, response: Response) -> None:
        """Put a session for ``key`` into ``response``. Raises ``ApiError`` 401, or 429 after ten tries a minute."""
        self._count_attempt(request.remote_addr or "")
        principal = self._keys.verify(key.strip())
        if principal is None:
            raise _unauthorized("this API key is unknown, expired or revoked")
        response.set_cookie(
            COOKIE,
            self._serializer().dumps(principal.id),
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="Lax",
            secure=request.is_secure,
        )

    def _from_cookie(self) -> Principal | None:
        cookie = request.cookies.get(COOKIE)
        if not cookie:
            return None
        try:
            key_id = self._serializer().loads(cookie, max_age=COOKIE_SECONDS)
        except BadSignature:
            return None
        return self._keys.by_id(key_id) if isinstance(key_id, str) else None

    @staticmethod
    def _serializer() -> URLSafeTimedSerializer:
        secret: bytes = current_app.extensions["olympus"].cookie_secret
        if not secret:
            raise ApiError(503, "the server is starting", code="not_ready", retry_after=2)
        return URLSafeTimedSerializer(secret, salt="session", signer_kwargs={"digest_method": hashlib.sha256})

    def _count_attempt(self, address: str, limit: int = 10, window: float = 60.0) -> None:
        now = time.monotonic()
        with self._attempts_lock:
            if len(self._attempts) > 10_000:
                self._attempts.clear()
            recent = self._attempts.setdefault(address, deque())
            while recent and now - recent[0] > window:
                recent.popleft()
            if len(recent) >= limit:
                raise ApiError(429, "too many attempts to sign in; wait a minute", retry_after=window)
            recent.append(now)

    # -- other sites ------------------------------------------------------------------------------------------

    def _check_host(self) -> None:
        """A page on another name that resolves to this address must not get in as 'this machine'."""
        host = _hostname(request.host)
        wide_open = self._settings.host in ("0.0.0.0", "::") and _is_address(host)
        if host not in self._hosts and not wide_open:
            raise ApiError(
                421,
                f"this server does not answer for the host {host!r}; if that is its name, add it to "
                "OLYMPUS_SERVER__ALLOWED_HOSTS",
                code="misdirected_request",
            )

    def _check_origin(self) -> None:
        if request.method in SAFE_METHODS:
            return
        site = request.headers.get("Sec-Fetch-Site")
        if site is not None:
            if site in ("same-origin", "none"):
                return
            raise ApiError(403, f"refused: the request came from another site ({site})", code="cross_site")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.host}":
            raise ApiError(403, f"refused: the request came from {origin}", code="cross_site")


def install(app: Flask, authenticator: Authenticator) -> None:
    """Check every request of ``app``."""
    app.extensions["olympus.auth"] = authenticator
    app.before_request(authenticator.check)


def current_principal() -> Principal:
    """Who asks; only inside a route that is not open."""
    principal: Any = g.principal
    assert isinstance(principal, Principal)
    return principal


def _bearer() -> str | None:
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" and value.strip() else None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(address: str | None) -> bool:
    if address in LOOPBACK_HOSTS:
        return True
    return address is not None and _is_address(address) and ipaddress.ip_address(address).is_loopback
