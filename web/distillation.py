"""Distillation over HTTP: runs, what their training measured, and what the schedule waits for.

Progress is told live on ``GET /olympus/stream?topics=distillation``.
"""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from werkzeug.routing import BaseConverter

from web.auth import requires
from web.context import principal, runtime
from web.jsonio import parse_body, parse_query
from web.schemas import DistillBody, OutlookQuery, RunMetricsQuery, RunsQuery

blueprint = Blueprint("distillation", __name__, url_prefix="/olympus/distillation")


class RunId(BaseConverter):
    """A run's id; nothing else reaches the database or the disk."""

    regex = r"run-[0-9a-f]{12}"


@blueprint.get("/runs")
@requires("cartridges:read")
def runs() -> ResponseReturnValue:
    """Runs, newest first."""
    query = parse_query(RunsQuery)
    return jsonify({"runs": runtime().distillery.page(query.domain, query.limit)})


@blueprint.post("/runs")
@requires("cartridges:write")
def begin() -> ResponseReturnValue:
    """Distil a domain's history now."""
    body = parse_body(DistillBody)
    domain = body.domain or runtime().settings.kernels.default_domain
    made = runtime().distillery.begin(domain, preset=body.preset, overrides=body.config, actor=principal().id)
    return jsonify(made), 201


@blueprint.get("/runs/<run:run_id>")
@requires("cartridges:read")
def run(run_id: str) -> ResponseReturnValue:
    """One run: its state, how far it is, and what it found."""
    return jsonify(runtime().distillery.run(run_id))


@blueprint.get("/runs/<run:run_id>/metrics")
@requires("cartridges:read")
def metrics(run_id: str) -> ResponseReturnValue:
    """What the training of a run measured, one object per line of its log; ``next`` continues."""
    query = parse_query(RunMetricsQuery)
    return jsonify(runtime().distillery.metrics(run_id, query.since))


@blueprint.post("/runs/<run:run_id>/cancel")
@requires("cartridges:write")
def cancel(run_id: str) -> ResponseReturnValue:
    """Ask a run to end."""
    return jsonify(runtime().distillery.cancel(run_id, actor=principal().id))


@blueprint.get("/schedule")
@requires("cartridges:read")
def schedule() -> ResponseReturnValue:
    """When the schedule looks next, and what each domain waits for."""
    return jsonify(runtime().distillery.schedule())


@blueprint.get("/outlook")
@requires("cartridges:read")
def outlook() -> ResponseReturnValue:
    """What would be done for one domain now, with the numbers of every trigger; nothing is started."""
    query = parse_query(OutlookQuery)
    return jsonify(runtime().distillery.outlook(query.domain or runtime().settings.kernels.default_domain))
