"""The history over HTTP: read what was lived through, add to it, judge it, correct it, forget it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from memory.history import NewExperience, Record
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError
from web.jsonio import parse_body, parse_query
from web.schemas import CorrectBody, ExperienceBody, FeedbackBody, ForgetQuery, HistoryQuery, SessionsQuery

blueprint = Blueprint("history", __name__, url_prefix="/olympus")
#: Ids are 64-bit integers in the database; a larger one is a path that does not exist.
_ID = "<int(max=9223372036854775807):experience_id>"


@blueprint.get("/history")
@requires("history:read")
def page() -> ResponseReturnValue:
    """Experiences, newest first. ``next_before`` continues; null at the end."""
    query = parse_query(HistoryQuery)
    found = runtime().history.page(
        domain=query.domain, session_id=query.session, before=query.before, limit=query.limit
    )
    following = found[-1].id if len(found) == query.limit else None
    return jsonify({"experiences": [shown(record) for record in found], "next_before": following})


@blueprint.post("/history")
@requires("history:write")
def append() -> ResponseReturnValue:
    """Write down what an agent elsewhere lived through; a known ``request_id`` is not written again."""
    fields = parse_body(ExperienceBody).model_dump()
    fields["domain"] = fields["domain"] or runtime().settings.kernels.default_domain
    return jsonify(shown(runtime().history.append([NewExperience(source="agent", **fields)])[0])), 201


@blueprint.delete("/history")
@requires("history:write")
def forget() -> ResponseReturnValue:
    """Forget a whole session or domain."""
    query = parse_query(ForgetQuery)
    which = {"session_id": query.session, "domain": query.domain}
    return jsonify({"deleted": runtime().forget(actor=principal().id, **which)})


@blueprint.get("/history/domains")
@requires("history:read")
def domains() -> ResponseReturnValue:
    """What the history is about, with the number of experiences of each domain and its newest id."""
    found = sorted(runtime().history.domains().items())
    told = [{"domain": domain, "experiences": count, "newest_id": newest} for domain, (count, newest) in found]
    return jsonify({"domains": told})


@blueprint.get(f"/history/{_ID}")
@requires("history:read")
def one(experience_id: int) -> ResponseReturnValue:
    """One experience, whole: also the messages that the model was asked with."""
    record = runtime().history.get(experience_id)
    if record is None or record.deleted:
        raise _unknown(experience_id)
    return jsonify({**shown(record), "messages": record.messages})


@blueprint.delete(f"/history/{_ID}")
@requires("history:write")
def forget_one(experience_id: int) -> ResponseReturnValue:
    """Forget one experience."""
    if not runtime().forget(experience_id=experience_id, actor=principal().id):
        raise _unknown(experience_id)
    return jsonify({"deleted": 1})


@blueprint.post(f"/history/{_ID}/feedback")
@requires("history:write")
def feedback(experience_id: int) -> ResponseReturnValue:
    """Judge an experience; kernels learn from the judgement."""
    body = parse_body(FeedbackBody)
    record = runtime().history.give_feedback(experience_id, body.feedback, body.score)
    if record is None:
        raise _unknown(experience_id)
    return jsonify(shown(record))


@blueprint.post(f"/history/{_ID}/correct")
@requires("history:write")
def correct(experience_id: int) -> ResponseReturnValue:
    """Say how it should have been: a new experience takes the old one's place."""
    body = parse_body(CorrectBody)
    record = runtime().correct(experience_id, actor=principal().id, **body.model_dump())
    if record is None:
        raise _unknown(experience_id)
    return jsonify(shown(record)), 201


@blueprint.get("/sessions")
@requires("history:read")
def sessions() -> ResponseReturnValue:
    """Conversations, most recently used first."""
    return jsonify({"sessions": runtime().history.sessions(parse_query(SessionsQuery).limit)})


def _unknown(experience_id: int) -> ApiError:
    return ApiError(404, "experience_not_found", f"there is no experience {experience_id}, or it was deleted")


def shown(record: Record) -> dict[str, Any]:
    """A record without the whole request: 200 of those could be as many megabytes."""
    shown = asdict(record)
    del shown["messages"], shown["deleted"]
    shown["meta"] = {name: value for name, value in record.meta.items() if name != "response"}
    return shown
