"""The audit log, the effective settings and the timetable over HTTP."""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from olympus.audit import AuditFilter
from settings import setting_paths
from web.admin_schemas import AuditPage, AuditQuery, JobRun, SchedulerShown, SettingShown, SettingsShown
from web.auth import ANY, require, requires
from web.context import principal, runtime
from web.jsonio import parse_query

blueprint = Blueprint("administration", __name__, url_prefix="/olympus")


@blueprint.get("/audit")
@requires("admin")
def audit() -> ResponseReturnValue:
    """Who did what."""
    query = parse_query(AuditQuery)
    log = runtime().audit
    which = AuditFilter(query.actor, query.action, query.target, query.since, query.until)
    entries = log.page(which, query.before, query.limit)
    following = entries[-1]["id"] if len(entries) == query.limit else None
    page = AuditPage.model_validate({"entries": entries, "next_before": following, **log.choices()})
    return jsonify(page.model_dump(mode="json"))


@blueprint.get("/settings")
@requires("admin")
def settings() -> ResponseReturnValue:
    """Every key of the configuration, what it is now, and who says so."""
    used = runtime().settings
    masked = used.masked()
    told = [
        SettingShown(
            path=path,
            value=_value(masked, path),
            default=_plain(default),
            origin=used.origin(path) or "default",
            description=description,
        )
        for path, description, default in setting_paths()
    ]
    return jsonify(SettingsShown(settings=tuple(told)).model_dump(mode="json"))


@blueprint.get("/scheduler")
@requires("kernels:read")
def scheduler() -> ResponseReturnValue:
    """What the server does by itself: when next, and how it went."""
    shown = SchedulerShown.model_validate({"now": time.time(), "jobs": runtime().timetable.describe()})
    return jsonify(shown.model_dump(mode="json"))


@blueprint.post("/scheduler/<job_id>/run")
@requires(ANY)
def run_job(job_id: str) -> ResponseReturnValue:
    """Do a job now; it needs the scope that the job names."""
    timetable, who = runtime().timetable, principal()
    require(timetable.scope_of(job_id))
    outcome = timetable.perform(job_id, who.id)
    assert outcome is not None, "only the schedule is sent away"
    detail = {"result": outcome.result, "told": outcome.told[:500]}
    runtime().audit.note(who.id, "scheduler.run", job_id, detail)
    run = JobRun.model_validate({"id": job_id, "outcome": outcome}, from_attributes=True)
    return jsonify(run.model_dump(mode="json"))


def _value(tree: dict[str, Any], path: str) -> Any:
    found: Any = tree
    for name in path.split("."):
        found = found[name]
    return found


def _plain(default: Any) -> Any:
    """A default as ``Settings.masked`` would show it."""
    return list(default) if isinstance(default, tuple) else default if _is_json(default) else str(default)


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)
