"""``/olympus/history``: read, judge and delete what was lived through."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from memory.history import History, Record
from web.errors import ApiError, read_body, read_query
from web.schemas import FeedbackBody, HistoryQuery, HistorySelection

blueprint = Blueprint("history", __name__, url_prefix="/olympus")


def _history() -> History:
    history: History = current_app.extensions["olympus"].history
    return history


def _shown(record: Record) -> dict[str, Any]:
    return asdict(record)


@blueprint.get("/history")
def page() -> Response:
    """The newest experiences, newest first; ``before`` an id for the next page."""
    asked = read_query(HistoryQuery)
    records = _history().page(domain=asked.domain, session_id=asked.session, before=asked.before, limit=asked.limit)
    return jsonify({"experiences": [_shown(record) for record in records]})


@blueprint.delete("/history/<int:experience_id>")
def delete_one(experience_id: int) -> Response:
    """Forget one experience: its text is gone at once, the learners drop it."""
    if not _history().delete(experience_id=experience_id):
        raise _unknown(experience_id)
    return jsonify({"deleted": 1})


@blueprint.delete("/history")
def delete_many() -> Response:
    """Forget a session or a domain."""
    asked = read_query(HistorySelection)
    return jsonify({"deleted": _history().delete(session_id=asked.session, domain=asked.domain)})


@blueprint.post("/history/<int:experience_id>/feedback")
def feedback(experience_id: int) -> Response:
    """Say what came of it: a text, a score from -1 (wrong) to 1 (right), or both."""
    body = read_body(FeedbackBody)
    record = _history().give_feedback(experience_id, body.feedback, body.score)
    if record is None:
        raise _unknown(experience_id)
    return jsonify(_shown(record))


@blueprint.get("/sessions")
def sessions() -> Response:
    """The conversations, most recently used first."""
    return jsonify({"sessions": _history().sessions()})


def _unknown(experience_id: int) -> ApiError:
    return ApiError(404, f"there is no experience {experience_id}, or it was deleted", code="not_found")
