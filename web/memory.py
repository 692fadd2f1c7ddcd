"""The episodic memory over HTTP: search it, and see where it stands."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from memory.catalog import Filters
from web.auth import requires
from web.context import runtime
from web.jsonio import parse_query
from web.schemas import MemoryQuery

if TYPE_CHECKING:  # it brings torch
    from memory.episodic import Found

blueprint = Blueprint("memory", __name__, url_prefix="/olympus/memory")


@blueprint.get("/search")
@requires("history:read")
def search() -> ResponseReturnValue:
    """Experiences that a question brings to mind, best first, with what each ranking says of them."""
    query = parse_query(MemoryQuery)
    memory = runtime().memory
    filters = Filters(query.domain, query.session, None, query.since, query.until, query.min_score)
    found = memory.search(query.q, filters, query.limit)
    status = memory.status()
    by_meaning = status["embedding"]["state"] == "ready" and status["index"] is not None
    return jsonify({"results": [_shown(item) for item in found], "meaning": by_meaning, "complete": status["complete"]})


@blueprint.get("/status")
@requires("history:read")
def status() -> ResponseReturnValue:
    """What is held, and where the embedding stands."""
    return jsonify(runtime().memory.status())


def _shown(found: Found) -> dict[str, Any]:
    parts = {"words": found.words, "meaning": found.meaning}
    return {
        **asdict(found.experience),
        "score": round(found.score, 6),
        "judged": found.experience.score,
        "parts": {name: None if part is None else asdict(part) for name, part in parts.items()},
        "snippet": found.snippet,
    }
