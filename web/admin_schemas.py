"""What the administrator's routes take and give: keys, the audit log, settings, the timetable, the system."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from olympus.access import SCOPES
from web.body import ID_LIMIT, Body


def _known_scope(scope: str) -> str:
    if scope not in SCOPES:
        raise PydanticCustomError("value_error", "must be one of {known}", {"known": ", ".join(SCOPES)})
    return scope


Scope = Annotated[str, AfterValidator(_known_scope), WithJsonSchema({"type": "string", "enum": list(SCOPES)})]
_Label = Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00]*\z")]
_Moment = Annotated[float, Field(ge=0, le=1e11, description="UTC seconds since the epoch")]


class KeyBody(Body):
    """``POST /olympus/keys``: without ``expires_in_days`` the key is good until it is revoked."""

    name: Annotated[
        str,
        StringConstraints(min_length=1, max_length=100, strip_whitespace=True, pattern=r"^[^\x00]*[^\s\x00][^\x00]*\z"),
    ]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=len(SCOPES))]
    expires_in_days: Annotated[float, Field(gt=0, le=3650)] | None = None


class KeyShown(BaseModel):
    """A key as it is listed: never its secret."""

    id: str
    name: str
    scopes: tuple[str, ...]
    state: Literal["active", "expired", "revoked"]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None


class KeyMade(KeyShown):
    """``POST /olympus/keys`` answers so, this once."""

    key: str


class Asker(BaseModel):
    """Who a request acts as."""

    id: str
    name: str
    scopes: tuple[str, ...]


class KeysShown(BaseModel):
    """``GET /olympus/keys``: ``you`` is who asks, ``scopes`` are all that exist."""

    keys: tuple[KeyShown, ...]
    you: Asker
    scopes: tuple[str, ...]


class AuditQuery(Body):
    """``GET /olympus/audit``. ``action`` may be a family (``key`` means ``key.*``), ``target`` a part of one."""

    actor: _Label | None = None
    action: _Label | None = None
    target: _Label | None = None
    since: _Moment | None = None
    until: _Moment | None = None
    before: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class AuditEntry(BaseModel):
    """One line: ``actor`` is a key's id or a part of the server, ``actor_name`` how people call it."""

    id: int
    at: float
    actor: str
    actor_name: str | None
    action: str
    target: str
    detail: dict[str, Any]


class AuditActor(BaseModel):
    """Somebody who acted."""

    actor: str
    name: str | None
    entries: int


class AuditAction(BaseModel):
    """Something that was done."""

    action: str
    entries: int


class AuditPage(BaseModel):
    """``GET /olympus/audit``: newest first; ``next_before`` continues."""

    entries: tuple[AuditEntry, ...]
    next_before: int | None
    actors: tuple[AuditActor, ...]
    actions: tuple[AuditAction, ...]


class SettingShown(BaseModel):
    """One key of the configuration. A secret's value is ``**********`` where it is set."""

    path: str
    value: Any
    default: Any
    origin: str
    description: str


class SettingsShown(BaseModel):
    """``GET /olympus/settings``."""

    settings: tuple[SettingShown, ...]


class OutcomeShown(BaseModel):
    """How a job went, ``times`` times in a row; the newest time at ``began_at``."""

    by: str
    began_at: float
    seconds: float
    result: Literal["done", "nothing", "failed", "missed"]
    told: str
    times: int


class JobShown(BaseModel):
    """Something that the server does by itself. ``off``: why it does not."""

    id: str
    title: str
    about: str
    every_seconds: float
    scope: str
    next_at: float | None
    off: str | None
    at_work: bool
    outcomes: tuple[OutcomeShown, ...]


class SchedulerShown(BaseModel):
    """``GET /olympus/scheduler``; ``now`` is the server's clock."""

    now: float
    jobs: tuple[JobShown, ...]


class JobRun(BaseModel):
    """``POST /olympus/scheduler/<job_id>/run``."""

    id: str
    outcome: OutcomeShown


class ThreadGroup(BaseModel):
    """Threads of one name."""

    name: str
    threads: int
    cpu_seconds: float


class SystemShown(BaseModel):
    """``GET /olympus/system``. ``series``: columns of equal length, a sample every five seconds, of the last hour."""

    version: str
    versions: dict[str, str]
    pid: int
    started_at: float | None
    now: float
    machine: dict[str, Any]
    process: dict[str, Any]
    threads: tuple[ThreadGroup, ...]
    queues: dict[str, Any]
    disk: dict[str, Any]
    database: dict[str, Any]
    model: dict[str, Any]
    engine: dict[str, Any] | None
    workspace: dict[str, Any]
    series: dict[str, tuple[float, ...]]


#: What the views answer, by endpoint, for the OpenAPI document.
ADMIN_ANSWERS: dict[str, type[BaseModel]] = {
    "keys.keys": KeysShown,
    "keys.create": KeyMade,
    "keys.revoke": KeyShown,
    "administration.audit": AuditPage,
    "administration.settings": SettingsShown,
    "administration.scheduler": SchedulerShown,
    "administration.run_job": JobRun,
    "system.system": SystemShown,
}
