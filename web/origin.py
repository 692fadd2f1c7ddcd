"""Requests that a web page of somebody else makes in the name of the person at the browser: refused.

Two attacks reach a server on this machine from any page that is open in a browser:

- DNS rebinding: the attacker's name suddenly means 127.0.0.1. Such requests carry the attacker's name in ``Host``, so
  only known names are served. An address in ``Host`` is fine: a page cannot rebind an address.
- Cross-site requests (CSRF): forms and ``fetch`` without reading the answer. Browsers say where a request comes from
  in ``Sec-Fetch-Site``, older ones in ``Origin``. Programs send neither and are not affected.

The second is Filippo Valsorda's algorithm (https://words.filippo.io/csrf/), as in Go's ``CrossOriginProtection`` and
simonw/datasette's ``csrf.py``. There are no tokens and no list of methods to forget one on.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from flask import Request

from settings import LOOPBACK_HOSTS, ServerSettings
from web.errors import ApiError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class HostGuard:
    """Knows the names under which this server may be asked."""

    def __init__(self, server: ServerSettings, environ: Mapping[str, str] | None = None):
        replit = (os.environ if environ is None else environ).get("REPLIT_DOMAINS", "")
        names = {*LOOPBACK_HOSTS, server.host, *server.allowed_hosts, *replit.split(",")}
        self.names = frozenset(name.strip().lower().rstrip(".") for name in names if name.strip())

    def check(self, request: Request) -> None:
        """Raise 421 when the request was meant for somebody else."""
        name = host_name(request.environ.get("HTTP_HOST", ""))
        if name in self.names or _is_address(name):
            return
        raise ApiError(
            421,
            "misdirected_request",
            f"this server does not answer to the name {name[:253]!r}; if it should, add the name to "
            f'OLYMPUS_SERVER__ALLOWED_HOSTS (as a list: ["name"]), or send an API key as a Bearer token',
        )


def host_name(header: str) -> str:
    """The name in a ``Host`` header, lower case, without port, brackets and final dot."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_cross_site(request: Request) -> None:
    """Raise 403 when another site's page makes a request that may change something."""
    if request.method in SAFE_METHODS:
        return
    if _has_bearer(request) and "Cookie" not in request.headers:
        return  # a page cannot add this header without our consent (CORS), and nothing ambient came along
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        if site in ("same-origin", "none"):
            return
        raise _forbidden(f"Sec-Fetch-Site is {site[:40]!r}, and only 'same-origin' and 'none' may change anything")
    origin = request.headers.get("Origin")
    if origin is None or _same_origin(origin, request):
        return
    raise _forbidden(f"the Origin {origin[:253]!r} is not this server's own")


def _has_bearer(request: Request) -> bool:
    return request.headers.get("Authorization", "").partition(" ")[0].lower() == "bearer"


def _same_origin(origin: str, request: Request) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme == request.scheme and parts.netloc.lower() == request.environ.get("HTTP_HOST", "").lower()


def _forbidden(reason: str) -> ApiError:
    return ApiError(403, "cross_site_request", f"the request comes from another site: {reason}")
