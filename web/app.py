"""The Flask application. ``create_app`` is pure: it wires, and starts nothing."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flask import Flask, url_for
from werkzeug.middleware.proxy_fix import ProxyFix

from olympus.runtime import Runtime
from settings import ROOT, Settings, load_settings
from telemetry import logs
from web import auth, errors, history, kernels, openai, ops, pages, stream, wire


def create_app(settings: Settings | None = None, runtime: Runtime | None = None) -> Flask:
    """An application around ``runtime`` (made from ``settings`` if not given), which is not started here."""
    if runtime is None:
        runtime = Runtime(settings or load_settings())
    settings = runtime.settings
    logs.configure(settings.telemetry)
    app = Flask("olympus", root_path=str(ROOT), template_folder="templates", static_folder="static")
    app.config["MAX_CONTENT_LENGTH"] = settings.server.max_body_bytes
    app.config["SEND_FILE_MAX_AGE_DEFAULT"] = 0
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.extensions["olympus"] = runtime
    proxies = settings.server.trusted_proxies
    if proxies:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=proxies)  # type: ignore[method-assign]
    wire.install(app, settings, runtime.metrics)
    auth.install(app, auth.Authenticator(settings.server, runtime.keys))
    errors.register(app)
    for module in (openai, kernels, history, stream, ops, pages):
        app.register_blueprint(module.blueprint)
    _static_urls(app)
    return app


def _static_urls(app: Flask) -> None:
    """Templates name a static file with its hash, so that browsers may keep it for ever."""
    folder = Path(app.static_folder or "")

    @lru_cache(maxsize=256)
    def content_hash(name: str, _changed: float) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12]

    @app.template_global()
    def static_url(name: str) -> str:
        return url_for("static", filename=name, v=content_hash(name, (folder / name).stat().st_mtime))

    app.jinja_env.globals["version"] = _version()


def _version() -> str:
    try:
        return version("olympus")
    except PackageNotFoundError:
        return "0.1.0"
