"""The dashboard's pages. They hold no data: their scripts fetch it from the same API as everybody else."""

from __future__ import annotations

from urllib.parse import urlsplit

import structlog
from flask import Blueprint, current_app, redirect, render_template, request
from flask.typing import ResponseReturnValue

from web.auth import ANY, Authenticator, requires
from web.context import principal, runtime
from web.errors import ApiError
from web.ops import application_version
from web.sessions import LoginLimiter

log = structlog.get_logger(__name__)

blueprint = Blueprint("pages", __name__)


@blueprint.app_context_processor
def _for_templates() -> dict[str, object]:
    return {"version": application_version()}


@blueprint.get("/")
@requires(ANY)
def overview() -> ResponseReturnValue:
    """What the server is doing."""
    return render_template("overview.html", page="overview")


@blueprint.get("/chat")
@requires(ANY)
def chat() -> ResponseReturnValue:
    """Talk to the model."""
    return render_template("chat.html", page="chat")


@blueprint.get("/kernels")
@requires(ANY)
def kernels() -> ResponseReturnValue:
    """All kernels, and the form that spawns one."""
    return render_template("kernels.html", page="kernels")


@blueprint.get("/kernels/<kernel:kernel_id>")
@requires(ANY)
def kernel(kernel_id: str) -> ResponseReturnValue:
    """One kernel, live. Whether it exists is for its script to find out and say."""
    return render_template("kernel.html", page="kernel", kernel_id=kernel_id)


@blueprint.get("/cartridges")
@requires(ANY)
def cartridges() -> ResponseReturnValue:
    """What serves each domain, and how it is distilled."""
    return render_template("cartridges.html", page="cartridges")


@blueprint.get("/memory")
@requires(ANY)
def memory() -> ResponseReturnValue:
    """What was lived through: search, correct, forget."""
    return render_template("memory.html", page="memory")


@blueprint.get("/system")
@requires(ANY)
def system() -> ResponseReturnValue:
    """What the process uses, live."""
    return render_template("system.html", page="system")


@blueprint.get("/scheduler")
@requires(ANY)
def scheduler() -> ResponseReturnValue:
    """What happens by itself, and when."""
    return render_template("scheduler.html", page="scheduler")


@blueprint.get("/settings")
@requires(ANY)
def settings() -> ResponseReturnValue:
    """Keys, and the configuration in use."""
    return render_template("settings.html", page="settings")


@blueprint.get("/audit")
@requires(ANY)
def audit() -> ResponseReturnValue:
    """Who did what."""
    return render_template("audit.html", page="audit")


@blueprint.get("/login")
def login() -> ResponseReturnValue:
    """The sign-in form."""
    return render_template("login.html", page="login", next=_destination(request.args.get("next")))


@blueprint.post("/login")
def sign_in() -> ResponseReturnValue:
    """Exchange a key for a session cookie."""
    limiter: LoginLimiter = current_app.extensions["olympus.logins"]
    destination = _destination(request.form.get("next"))
    wait = limiter.wait(request.remote_addr or "")
    if wait > 0:
        raise ApiError(429, "too_many_attempts", "too many sign-ins from this address; wait a moment", retry_after=wait)
    found = runtime().keys.verify(request.form.get("key", "").strip())
    if found is None:
        log.warning("sign-in refused", address=request.remote_addr)
        error = "This key is wrong, expired or revoked."
        return render_template("login.html", page="login", next=destination, error=error), 401
    response = redirect(destination or "/", 303)
    _authenticator().cookies.write(request, response, found.id)
    runtime().audit.note(found.id, "session.begin", found.id)
    log.info("signed in", key_id=found.id)
    return response


@blueprint.post("/logout")
@requires(ANY)
def logout() -> ResponseReturnValue:
    """End this browser's session."""
    response = redirect("/login", 303)
    _authenticator().cookies.clear(request, response)
    runtime().audit.note(principal().id, "session.end", principal().id)
    log.info("signed out", key_id=principal().id)
    return response


def _authenticator() -> Authenticator:
    found: Authenticator = current_app.extensions["olympus.authenticator"]
    return found


def _destination(wanted: str | None) -> str | None:
    """Where to go after signing in: a path on this server, never an address that merely looks like one."""
    if not wanted or not wanted.startswith("/") or wanted.startswith("//") or len(wanted) > 2000:
        return None
    if "\\" in wanted or any(ord(letter) < 0x20 for letter in wanted):
        return None
    parts = urlsplit(wanted)
    return None if parts.scheme or parts.netloc else wanted
