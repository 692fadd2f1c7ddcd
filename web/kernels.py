"""Kernels over HTTP. Each view is one call of Zeus, who decides everything."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from werkzeug.routing import BaseConverter

from olympus.requests import ExperienceBatch, QueryRequest, SpawnRequest
from web.auth import require, requires
from web.context import principal, runtime
from web.jsonio import parse_body, parse_query
from web.schemas import DiffQuery, MetricsQuery

blueprint = Blueprint("kernels", __name__, url_prefix="/olympus/kernels")


class KernelId(BaseConverter):
    """A kernel's id: a name, a hyphen, six hex digits; nothing else reaches Zeus, the database or the disk."""

    regex = r"[a-z0-9][a-z0-9-]{0,72}-[0-9a-f]{6}"


class CheckpointName(BaseConverter):
    """A checkpoint's name."""

    regex = r"step-[0-9]{8}"


@blueprint.get("")
@requires("kernels:read")
def kernels() -> ResponseReturnValue:
    """All kernels, one line each."""
    return jsonify({"kernels": runtime().zeus.kernels()})


@blueprint.post("/spawn")
@requires("kernels:write")
def spawn() -> ResponseReturnValue:
    """Make a kernel and put it in line for training."""
    body = parse_body(SpawnRequest)
    return jsonify(runtime().zeus.spawn(body, actor=principal().id)), 201


@blueprint.get("/<kernel:kernel_id>/status")
@requires("kernels:read")
def status(kernel_id: str) -> ResponseReturnValue:
    """Everything about one kernel."""
    return jsonify(runtime().zeus.status(kernel_id))


@blueprint.post("/<kernel:kernel_id>/query")
@requires("kernels:read")
def query(kernel_id: str) -> ResponseReturnValue:
    """Ask a kernel; with ``learn`` the question is written down, which needs the right to write."""
    body = parse_body(QueryRequest)
    if body.learn:
        require("kernels:write")
    return jsonify(runtime().zeus.query(kernel_id, body))


@blueprint.get("/<kernel:kernel_id>/checkpoints")
@requires("kernels:read")
def checkpoints(kernel_id: str) -> ResponseReturnValue:
    """A kernel's checkpoints and what keeps each."""
    return jsonify(runtime().zeus.checkpoints(kernel_id))


@blueprint.get("/<kernel:kernel_id>/checkpoints/<checkpoint:name>/diff")
@requires("kernels:read")
def checkpoint_diff(kernel_id: str, name: str) -> ResponseReturnValue:
    """What changed since another checkpoint."""
    return jsonify(runtime().zeus.compare_checkpoints(kernel_id, parse_query(DiffQuery).base, name))


@blueprint.get("/<kernel:kernel_id>/metrics")
@requires("kernels:read")
def metrics(kernel_id: str) -> ResponseReturnValue:
    """What was measured, as columns."""
    query = parse_query(MetricsQuery)
    zeus = runtime().zeus
    return jsonify(zeus.metrics(kernel_id, query.since, query.max_points, columns=query.columns, spread=query.spread))


@blueprint.post("/<kernel:kernel_id>/experiences")
@requires("kernels:write")
def experiences(kernel_id: str) -> ResponseReturnValue:
    """Write experiences into the history for a kernel's domain."""
    body = parse_body(ExperienceBatch)
    return jsonify(runtime().zeus.feed(kernel_id, body.experiences)), 201


@blueprint.post("/<kernel:kernel_id>/pause")
@requires("kernels:write")
def pause(kernel_id: str) -> ResponseReturnValue:
    """Stop training until ``resume``."""
    return jsonify(runtime().kernel_desk.pause(kernel_id, actor=principal().id))


@blueprint.post("/<kernel:kernel_id>/resume")
@requires("kernels:write")
def resume(kernel_id: str) -> ResponseReturnValue:
    """Train on."""
    return jsonify(runtime().kernel_desk.resume(kernel_id, actor=principal().id))


@blueprint.post("/<kernel:kernel_id>/stop")
@requires("kernels:write")
def stop(kernel_id: str) -> ResponseReturnValue:
    """End training."""
    return jsonify(runtime().kernel_desk.stop(kernel_id, actor=principal().id))


@blueprint.post("/<kernel:kernel_id>/checkpoint")
@requires("kernels:write")
def checkpoint(kernel_id: str) -> ResponseReturnValue:
    """Save a training kernel now."""
    return jsonify(runtime().kernel_desk.checkpoint_now(kernel_id, actor=principal().id)), 201


@blueprint.post("/<kernel:kernel_id>/checkpoints/<checkpoint:name>/restore")
@requires("kernels:write")
def restore(kernel_id: str, name: str) -> ResponseReturnValue:
    """Go back to a checkpoint's weights."""
    return jsonify(runtime().kernel_desk.restore(kernel_id, name, actor=principal().id))


@blueprint.post("/<kernel:kernel_id>/checkpoints/<checkpoint:name>/pin")
@requires("kernels:write")
def pin(kernel_id: str, name: str) -> ResponseReturnValue:
    """Keep a checkpoint for ever."""
    return jsonify(_pinned(kernel_id, name, True))


@blueprint.post("/<kernel:kernel_id>/checkpoints/<checkpoint:name>/unpin")
@requires("kernels:write")
def unpin(kernel_id: str, name: str) -> ResponseReturnValue:
    """Let retention decide again."""
    return jsonify(_pinned(kernel_id, name, False))


def _pinned(kernel_id: str, name: str, pinned: bool) -> dict[str, Any]:
    return runtime().kernel_desk.pin(kernel_id, name, pinned, actor=principal().id)


@blueprint.delete("/<kernel:kernel_id>/checkpoints/<checkpoint:name>")
@requires("kernels:write")
def delete_checkpoint(kernel_id: str, name: str) -> ResponseReturnValue:
    """Remove a checkpoint that nothing needs."""
    return jsonify(runtime().kernel_desk.delete_checkpoint(kernel_id, name, actor=principal().id))


@blueprint.delete("/<kernel:kernel_id>")
@requires("kernels:write")
def delete(kernel_id: str) -> ResponseReturnValue:
    """End a kernel for good; the history keeps what was lived."""
    return jsonify(runtime().zeus.delete(kernel_id, actor=principal().id))
