"""The dashboard's pages. They are almost empty: all data is fetched from the JSON API by the page's own modules."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, make_response, redirect, render_template, request
from werkzeug.wrappers import Response as BaseResponse

from web.auth import COOKIE, Authenticator
from web.errors import ApiError

blueprint = Blueprint("pages", __name__)


@blueprint.get("/")
def overview() -> str:
    """What it is, whether it is healthy, what happened lately."""
    return render_template("overview.html", page="overview")


@blueprint.get("/chat")
def chat() -> str:
    """Talk to the model."""
    return render_template("chat.html", page="chat")


@blueprint.get("/kernels")
def kernels() -> str:
    """All kernels, and the form that spawns one."""
    return render_template("kernels.html", page="kernels")


@blueprint.get("/kernels/<kernel_id>")
def kernel(kernel_id: str) -> str:
    """One kernel."""
    if current_app.extensions["olympus"].zeus.exists(kernel_id):
        return render_template("kernel.html", page="kernel", kernel_id=kernel_id)
    raise ApiError(404, f"there is no kernel {kernel_id}; it may have been deleted", code="kernel_not_found")


@blueprint.get("/login")
def login() -> str:
    """Ask for a key."""
    return render_template("login.html", page="login", next=_next(request.args.get("next")))


@blueprint.post("/login")
def sign_in() -> BaseResponse:
    """Exchange a key for a session cookie."""
    authenticator: Authenticator = current_app.extensions["olympus.auth"]
    target = _next(request.form.get("next"))
    response = redirect(target, 303)
    assert isinstance(response, Response)
    try:
        authenticator.sign_in(request.form.get("key", ""), response)
    except ApiError as error:
        page = render_template("login.html", page="login", next=target, error=str(error))
        return make_response(page, error.status, error.headers)
    return response


@blueprint.post("/logout")
def sign_out() -> BaseResponse:
    """End the browser's session."""
    response = redirect("/login", 303)
    response.delete_cookie(COOKIE)
    return response


def _next(target: str | None) -> str:
    """Only a path of this server; ``//host`` and ``/\\host`` would lead elsewhere."""
    if target and target.startswith("/") and not target.startswith(("//", "/\\")) and "\n" not in target:
        return target
    return "/"
