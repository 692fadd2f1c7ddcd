"""Kernels as files: download one, upload one. The format is ``olympus.kernel_archive``."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request
from flask.typing import ResponseReturnValue

from olympus.requests import ExportRequest, ImportRequest
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError
from web.jsonio import parse_query, read_body

blueprint = Blueprint("kernel_files", __name__, url_prefix="/olympus/kernels")

MIMETYPE = "application/zip"
_ACCEPTED = frozenset({MIMETYPE, "application/x-zip-compressed", "application/octet-stream"})


@blueprint.get("/<kernel:kernel_id>/export")
@requires("kernels:read")
def export(kernel_id: str) -> ResponseReturnValue:
    """A kernel as one file."""
    query = parse_query(ExportRequest)
    file = runtime().zeus.export(kernel_id, query.checkpoint, training=query.include == "training")
    headers = {"Content-Disposition": f'attachment; filename="{file.name}"', "Cache-Control": "no-store"}
    return Response(file.content, mimetype=MIMETYPE, headers=headers)


@blueprint.post("/import")
@requires("kernels:write")
def import_kernel() -> ResponseReturnValue:
    """Make a kernel from such a file, which is the body; name and domain stand in the query."""
    query = parse_query(ImportRequest)
    if request.mimetype not in _ACCEPTED:
        given = request.headers.get("Content-Type", "nothing")[:80]
        raise ApiError(
            415, "unsupported_media_type", f"send the file itself with Content-Type: {MIMETYPE}, not {given}"
        )
    serving = runtime()
    request.max_content_length = serving.settings.kernels.import_max_bytes
    return jsonify(serving.zeus.import_kernel(read_body(), query, actor=principal().id)), 201
