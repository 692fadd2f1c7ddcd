"""``/olympus/kernels``: spawn, watch, ask, feed and steer the M8 kernels. Each view is one call of ``Zeus``."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from olympus.requests import ExperienceBatch, QueryRequest, SpawnRequest
from olympus.zeus import Zeus
from web.auth import current_principal
from web.errors import read_body, read_query
from web.schemas import EmptyBody, MetricsQuery

blueprint = Blueprint("kernels", __name__, url_prefix="/olympus/kernels")


def _zeus() -> Zeus:
    zeus: Zeus = current_app.extensions["olympus"].zeus
    return zeus


@blueprint.get("")
def index() -> Response:
    """All kernels, one line each."""
    return jsonify({"kernels": _zeus().kernels()})


@blueprint.post("/spawn")
def spawn() -> tuple[Response, int]:
    """Make a kernel; it begins to train as soon as there is enough to learn from."""
    return jsonify(_zeus().spawn(read_body(SpawnRequest, optional=True), actor=current_principal().id)), 201


@blueprint.get("/<kernel_id>/status")
def status(kernel_id: str) -> Response:
    """Where it stands: losses against their baselines, Phi, convergence with reasons."""
    return jsonify(_zeus().status(kernel_id))


@blueprint.post("/<kernel_id>/query")
def query(kernel_id: str) -> Response:
    """Ask it: free text, or a ranking of candidates."""
    return jsonify(_zeus().query(kernel_id, read_body(QueryRequest)))


@blueprint.get("/<kernel_id>/checkpoints")
def checkpoints(kernel_id: str) -> Response:
    """Its checkpoints, each with the rules that keep it."""
    return jsonify(_zeus().checkpoints(kernel_id))


@blueprint.get("/<kernel_id>/metrics")
def metrics(kernel_id: str) -> Response:
    """What was measured, as columns, at most ``max_points`` rows."""
    asked = read_query(MetricsQuery)
    return jsonify(_zeus().metrics(kernel_id, asked.since, asked.max_points))


@blueprint.post("/<kernel_id>/experiences")
def experiences(kernel_id: str) -> tuple[Response, int]:
    """Feed it. The experiences are in the history when this answers."""
    return jsonify(_zeus().feed(kernel_id, read_body(ExperienceBatch).experiences)), 201


@blueprint.post("/<kernel_id>/<any(pause, resume, stop, checkpoint):action>")
def act(kernel_id: str, action: str) -> Response:
    """Pause, resume or stop training, or write a checkpoint now."""
    read_body(EmptyBody, optional=True)
    zeus = _zeus()
    actions = {"pause": zeus.pause, "resume": zeus.resume, "stop": zeus.stop, "checkpoint": zeus.checkpoint_now}
    return jsonify(actions[action](kernel_id))


@blueprint.post("/<kernel_id>/checkpoints/<name>/restore")
def restore(kernel_id: str, name: str) -> Response:
    """Go back to a checkpoint."""
    read_body(EmptyBody, optional=True)
    return jsonify(_zeus().restore(kernel_id, name))


@blueprint.post("/<kernel_id>/checkpoints/<name>/pin")
def pin(kernel_id: str, name: str) -> Response:
    """Keep a checkpoint whatever the rules say."""
    read_body(EmptyBody, optional=True)
    return jsonify(_zeus().pin(kernel_id, name, True))


@blueprint.post("/<kernel_id>/checkpoints/<name>/unpin")
def unpin(kernel_id: str, name: str) -> Response:
    """Leave a checkpoint to the rules again."""
    read_body(EmptyBody, optional=True)
    return jsonify(_zeus().pin(kernel_id, name, False))


@blueprint.delete("/<kernel_id>")
def delete(kernel_id: str) -> Response:
    """End a kernel and remove its checkpoints. What it learned from stays in the history."""
    return jsonify(_zeus().delete(kernel_id, actor=current_principal().id))
