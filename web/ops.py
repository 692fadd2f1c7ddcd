"""Health, readiness, metrics, and the one-page truth for people."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from olympus.runtime import Runtime

blueprint = Blueprint("ops", __name__)


def _runtime() -> Runtime:
    runtime: Runtime = current_app.extensions["olympus"]
    return runtime


@blueprint.get("/healthz")
def healthz() -> Response:
    """The process is alive and answers."""
    return jsonify({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> tuple[Response, int]:
    """Whether requests can be served, with each check."""
    ready, checks = _runtime().readiness()
    return jsonify({"status": "ready" if ready else "not ready", "checks": checks}), 200 if ready else 503


@blueprint.get("/metrics")
def metrics() -> Response:
    """Prometheus text."""
    numbers = _runtime().metrics
    return Response(numbers.render(), content_type=numbers.content_type)


@blueprint.get("/olympus/status")
def status() -> Response:
    """What a person wants to know."""
    return jsonify(_runtime().status())
