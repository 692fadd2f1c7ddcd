"""Operations: is it alive, is it ready, what does it measure, and how is it, for a person."""

from __future__ import annotations

import os
import platform
import threading
import time
import tomllib
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import psutil
from flask import Blueprint, Response, current_app, jsonify
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_LATEST

from olympus.errors import ModelNotReady
from settings import ROOT
from telemetry.metrics import Metrics
from web.auth import requires
from web.context import runtime

blueprint = Blueprint("ops", __name__)

_LIBRARIES = ("flask", "torch", "transformers", "sqlalchemy")


@cache
def application_version() -> str:
    """The version of this checkout, from pyproject.toml."""
    return cast("str", tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


@blueprint.get("/healthz")
def healthz() -> ResponseReturnValue:
    """The process is alive and a thread was free to say so."""
    return jsonify({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> ResponseReturnValue:
    """Whether requests can be served; 503 with the reason of each check otherwise."""
    ready, checks = runtime().readiness()
    body = {"status": "ready" if ready else "not ready", "checks": checks}
    return jsonify(body), 200 if ready else 503


@blueprint.get("/metrics")
@requires("kernels:read")
def metrics() -> ResponseReturnValue:
    """Prometheus' text format."""
    measured: Metrics = current_app.extensions["olympus.metrics"]
    return Response(measured.render(), content_type=CONTENT_TYPE_LATEST)


@blueprint.get("/olympus/status")
@requires("kernels:read")
def status() -> ResponseReturnValue:
    """What a person wants to know."""
    serving = runtime()
    newest = serving.history.page(limit=1, include_deleted=True)
    started = serving.started_at
    return jsonify(
        {
            "version": application_version(),
            "pid": os.getpid(),
            "started_at": started,
            "uptime_s": None if started is None else round(time.time() - started, 1),
            "stopping": serving.stop_event.is_set(),
            "model": asdict(serving.model_state),
            "engine": _engine(),
            "workspace": serving.workbench.status(),
            "kernels": serving.zeus.rows.states(),
            "default_domain": serving.settings.kernels.default_domain,
            "history": {"count": serving.history.count(), "newest_id": newest[0].id if newest else 0},
            "admission": serving.admission.counts(),
            "process": _process(),
            "versions": library_versions(_LIBRARIES),
        }
    )


@cache
def library_versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Of Python and ``libraries``; each is read from a file, and none changes while the process lives."""
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def _engine() -> dict[str, Any] | None:
    """The engine's queue and totals, or None while there is none."""
    try:
        return asdict(runtime().engine.stats())
    except ModelNotReady:
        return None


def _process() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "rss_bytes": process.memory_info().rss,
        "threads": threading.active_count(),
        "cpu_seconds": round(sum(process.cpu_times()[:2]), 1),
    }
