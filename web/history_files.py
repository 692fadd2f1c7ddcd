"""The history as a file of JSON lines: download it, upload one. The format is ``memory.snapshots``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flask import Blueprint, Response, jsonify, request
from flask.typing import ResponseReturnValue

from memory.snapshots import export_snapshot, import_snapshot
from storage.files import PARTIAL_PREFIX
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError
from web.jsonio import parse_query, read_body
from web.schemas import HistoryExportQuery, HistoryImportQuery

blueprint = Blueprint("history_files", __name__, url_prefix="/olympus/history")

MIMETYPE = "application/x-ndjson"
_ACCEPTED = frozenset(
    {MIMETYPE, "application/jsonl", "application/json-lines", "application/octet-stream", "text/plain"}
)
_BAD_SHOWN = 100


@blueprint.get("/export")
@requires("history:read")
def export() -> ResponseReturnValue:
    """A domain, or everything, oldest first."""
    query = parse_query(HistoryExportQuery)
    serving = runtime()
    with tempfile.TemporaryDirectory(dir=serving.settings.data_dir, prefix=PARTIAL_PREFIX) as folder:
        path = Path(folder, "history.jsonl")
        export_snapshot(serving.history, path, domain=query.domain, rich=query.format == "rich")
        size, handle = path.stat().st_size, path.open("rb")  # what is open stays readable when the folder is gone
    name = f"memory_{query.domain or 'all'}.jsonl"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Length": str(size),
        "Cache-Control": "no-store",
    }
    return Response(_blocks(handle), mimetype=MIMETYPE, headers=headers)


@blueprint.post("/import")
@requires("history:write")
def import_history() -> ResponseReturnValue:
    """Append what the body, such a file, holds and the history does not."""
    query = parse_query(HistoryImportQuery)
    if request.mimetype not in _ACCEPTED:
        given = request.headers.get("Content-Type", "nothing")[:80]
        raise ApiError(
            415, "unsupported_media_type", f"send the file itself with Content-Type: {MIMETYPE}, not {given}"
        )
    serving = runtime()
    request.max_content_length = serving.settings.memory.import_max_bytes
    domain = query.domain or serving.settings.kernels.default_domain
    with tempfile.TemporaryDirectory(dir=serving.settings.data_dir, prefix=PARTIAL_PREFIX) as folder:
        path = Path(folder, "history.jsonl")
        path.write_bytes(read_body())
        report = import_snapshot(serving.history, path, domain=domain)
    counts = {"imported": report.imported, "known": report.known, "deleted": report.deleted}
    serving.audit.note(principal().id, "history.import", domain, {**counts, "bad_lines": len(report.bad)})
    bad = [{"line": line, "reason": reason} for line, reason in report.bad[:_BAD_SHOWN]]
    return jsonify({**counts, "bad_lines": len(report.bad), "bad": bad})


def _blocks(handle: IO[bytes]) -> Iterator[bytes]:
    with handle:
        while block := handle.read(1 << 16):
            yield block
