"""One ``authenticate(request)`` for every route, deny by default.

A request acts as the key in its ``Authorization: Bearer`` header, or as the key that its session cookie names, or,
only on this machine, as the person who started the server. "On this machine" means all of: the server listens on
loopback, the connection comes from loopback, and no proxy stands in between (a forwarding header says that one does;
with ``trusted_proxies`` the address that they report counts instead).

OpenAI clients insist on sending some key. Where none is needed, one that does not begin with ``oly_`` is therefore
ignored; one that does is meant for us, and refused when it is wrong.

Each view declares its scope with ``requires``; ``OPEN`` lists the few routes that need none. A view with neither
cannot be registered.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast
from urllib.parse import urlencode

from flask import Flask, Request, Response, g, redirect, request
from werkzeug.wrappers import Response as WerkzeugResponse

from olympus.access import KEY_PREFIX, LOCAL, SCOPES, KeyStore, Principal
from settings import ServerSettings
from web.errors import ApiError
from web.origin import SAFE_METHODS, HostGuard, check_cross_site
from web.sessions import SessionCookies

#: Routes that answer without authentication. Probes say nothing but whether the server works.
PROBES = frozenset({"ops.healthz", "ops.readyz", "tokasaurus.ping"})
OPEN = PROBES | {"static", "pages.login", "pages.sign_in"}
#: For views that any authenticated principal may use: the pages, whose data needs scopes of its own.
ANY = "any"
_FORWARDED = ("X-Forwarded-For", "Forwarded", "X-Real-IP")
_SCOPE = "olympus_scope"

View = TypeVar("View", bound=Callable[..., object])


def requires(scope: str) -> Callable[[View], View]:
    """Declare that a view needs ``scope``."""
    assert scope in SCOPES or scope == ANY, scope

    def mark(view: View) -> View:
        setattr(view, _SCOPE, scope)
        return view

    return mark


def scope_of(view: Callable[..., object]) -> str | None:
    """What ``requires`` declared; None for open routes."""
    return getattr(view, _SCOPE, None)


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A principal, and what proved it."""

    principal: Principal
    by: Literal["key", "session", "machine"]


class Authenticator:
    """Finds out who asks."""

    def __init__(self, server: ServerSettings, keys: KeyStore, cookies: SessionCookies):
        self._server, self._keys, self.cookies = server, keys, cookies

    def authenticate(self, request: Request) -> Authenticated:
        """Who makes ``request``; raises 401."""
        local = self._is_this_machine(request)
        key = bearer(request)
        if key is not None:
            principal = self._keys.verify(key)
            if principal is not None:
                return Authenticated(principal, "key")
            if key.startswith(KEY_PREFIX) or not local:
                raise unauthorized("invalid_api_key", "the API key is wrong, expired or revoked")
        session = self.cookies.read(request)
        if session is not None and (principal := self._keys.find(session)) is not None:
            return Authenticated(principal, "session")
        if local:
            return Authenticated(LOCAL, "machine")
        raise unauthorized("missing_api_key", "send an API key: Authorization: Bearer oly_...")

    def still_allows(self, principal: Principal, scope: str) -> bool:
        """True while ``principal`` may act: asked again and again by streams, which outlive their authentication."""
        now = self._keys.find(principal.id)
        return now is not None and now.allows(scope)

    def _is_this_machine(self, request: Request) -> bool:
        if not self._server.is_loopback or not _is_loopback(request.remote_addr or ""):
            return False
        forwarded = any(name in request.headers for name in _FORWARDED)
        # Behind a proxy the peer is always this machine; only what the proxy reports tells who asks.
        return "X-Forwarded-For" in request.headers if self._server.trusted_proxies else not forwarded


def bearer(request: Request) -> str | None:
    """The token of an ``Authorization: Bearer`` header; any other scheme counts as none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def unauthorized(code: str, detail: str) -> ApiError:
    """The 401 of all routes."""
    return ApiError(401, code, detail, headers=[("WWW-Authenticate", 'Bearer realm="olympus"')])


def require(scope: str) -> None:
    """Raise 403 unless the current request's principal has ``scope``."""
    if not cast("Principal", g.principal).allows(scope):
        raise ApiError(403, "insufficient_scope", f"this key lacks the scope {scope}; ask for one that has it")


def install(app: Flask, authenticator: Authenticator, hosts: HostGuard) -> None:
    """Guard every route of ``app``."""

    @app.before_request
    def guard() -> Response | WerkzeugResponse | None:
        endpoint = request.endpoint
        if endpoint in OPEN:
            if endpoint not in PROBES:  # load balancers ask by address or by names of their own
                hosts.check(request)
            check_cross_site(request)
            return None
        try:
            found = authenticator.authenticate(request)
        except ApiError:
            if request.blueprint == "pages":
                return _to_login()
            raise
        g.principal = found.principal
        if found.by != "key":
            hosts.check(request)
        check_cross_site(request)
        if endpoint is not None:  # otherwise routing answers 404 or 405 next
            scope = getattr(app.view_functions[endpoint], _SCOPE)
            if scope != ANY:
                require(scope)
        return None


def check_every_view_is_guarded(app: Flask) -> None:
    """Programmer errors, found when the application is made: a view without a scope, an open route that is gone."""
    for endpoint, view in app.view_functions.items():
        assert endpoint in OPEN or hasattr(view, _SCOPE), f"{endpoint} declares no scope; decorate it with requires()"
    assert set(app.view_functions) >= OPEN, f"no such routes: {OPEN - set(app.view_functions)}"


def _to_login() -> WerkzeugResponse:
    if request.method not in SAFE_METHODS:
        return redirect("/login", 303)
    wanted = request.full_path.rstrip("?")
    return redirect("/login?" + urlencode({"next": wanted}), 303)


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
