"""What was learned from what, over HTTP: what a cartridge was trained on, and what forgetting would reach."""

from __future__ import annotations

from typing import Annotated

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from pydantic import Field

from web.auth import require, requires
from web.body import ID_LIMIT, Body
from web.context import runtime
from web.history import shown
from web.jsonio import parse_query
from web.schemas import ForgetQuery

blueprint = Blueprint("forgetting", __name__, url_prefix="/olympus")


class TaughtQuery(Body):
    """``GET /olympus/cartridges/<id>/experiences``."""

    before: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50


@blueprint.get("/history/forgetting")
@requires("history:read")
def forgetting() -> ResponseReturnValue:
    """What ``DELETE /olympus/history`` with the same query would reach; nothing is deleted."""
    query = parse_query(ForgetQuery)
    return jsonify(runtime().forgetting.preview(session_id=query.session, domain=query.domain))


@blueprint.get("/cartridges/<cartridge:cartridge_id>/experiences")
@requires("cartridges:read")
def taught(cartridge_id: str) -> ResponseReturnValue:
    """What a cartridge was trained on; ``next_before`` continues. The texts need the right to read the history."""
    require("history:read")
    query = parse_query(TaughtQuery)
    runtime().cartridges.get(cartridge_id)
    records, total, forgotten = runtime().forgetting.taught(cartridge_id, query.before, query.limit)
    following = records[-1].id if len(records) == query.limit else None
    return jsonify(
        {
            "cartridge": cartridge_id,
            "total": total,
            "forgotten": forgotten,
            "experiences": [shown(record) for record in records],
            "next_before": following,
        }
    )
