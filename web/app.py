"""``create_app``: the Flask application, put together and not started.

Pure: no thread, no lock, no model, no file. The runtime that it is given, or makes, is started by the process that
serves (configs/gunicorn.conf.py) and is found in ``app.extensions["olympus"]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from olympus.errors import ModelNotReady
from settings import ROOT, Settings, load_settings
from telemetry.metrics import EngineTotals, Metrics, Sources
from web import (
    administration,
    auth,
    cartridges,
    distillation,
    embeddings,
    errors,
    forgetting,
    headers,
    history,
    history_files,
    kernel_files,
    kernels,
    keys,
    memory,
    openai,
    openapi,
    ops,
    pages,
    pantheon,
    responses,
    stream,
    system,
    tokasaurus,
)
from web.assets import Assets
from web.jsonio import JsonProvider
from web.origin import HostGuard
from web.sessions import LoginLimiter, SessionCookies
from web.unread import SkipUnread

if TYPE_CHECKING:  # imported below only when none is given: it brings torch
    from olympus.runtime import Runtime


def create_app(settings: Settings | None = None, runtime: Runtime | None = None) -> Flask:
    """The application around ``runtime``, or around a new one made from ``settings`` (by default the process's)."""
    if runtime is None:
        from olympus.runtime import Runtime

        runtime = Runtime(settings or load_settings())
    server = runtime.settings.server
    app = Flask("web", root_path=str(ROOT), static_folder="static", template_folder="templates")
    app.json = JsonProvider(app)
    app.config["MAX_CONTENT_LENGTH"] = server.max_body_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = min(server.max_body_bytes, 64 << 10)
    app.url_map.converters.update(
        kernel=kernels.KernelId,
        checkpoint=kernels.CheckpointName,
        run=distillation.RunId,
        cartridge=cartridges.CartridgeId,
        key=keys.KeyId,
    )
    if server.trusted_proxies > 0:
        hops = server.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]
    app.wsgi_app = SkipUnread(app.wsgi_app, server.max_body_bytes)  # type: ignore[method-assign]
    _install(app, runtime)
    kept = (kernels, kernel_files, pantheon, history, history_files, memory, cartridges, distillation)
    admin = (keys, administration, system, forgetting)
    for module in (*admin, ops, openapi, openai, responses, embeddings, tokasaurus, *kept, stream, pages):
        app.register_blueprint(module.blueprint)
    auth.check_every_view_is_guarded(app)
    return app


def _install(app: Flask, runtime: Runtime) -> None:
    """The hooks around all views, in the order in which they run, and what views find in ``app.extensions``."""
    assets = Assets(ROOT / "static")
    metrics = _metrics(runtime)
    cookies = SessionCookies(lambda: runtime.cookie_secret)
    authenticator = auth.Authenticator(runtime.settings.server, runtime.keys, cookies)
    app.extensions["olympus"] = runtime
    app.extensions["olympus.metrics"] = metrics
    app.extensions["olympus.authenticator"] = authenticator
    app.extensions["olympus.logins"] = LoginLimiter()
    app.jinja_env.globals["static_url"] = assets.url
    app.jinja_env.globals["module_imports"] = assets.imports
    headers.install(app, metrics, assets)
    auth.install(app, authenticator, HostGuard(runtime.settings.server))
    errors.install(app)


def _metrics(runtime: Runtime) -> Metrics:
    def engine() -> EngineTotals | None:
        try:
            return runtime.engine.stats()
        except ModelNotReady:
            return None

    metrics = Metrics(
        Sources(
            kernels=lambda: runtime.zeus.kernels(),
            checkpoint_bytes=lambda: runtime.zeus.checkpoint_store.total_bytes(),
            admission=runtime.admission.counts,
            engine=engine,
            experiences=lambda: runtime.history.count(),
        )
    )
    runtime.database.observe_writes(metrics.observe_write)
    return metrics
