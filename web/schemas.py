"""What clients may send to the routes that have no model of their own in ``olympus.requests`` or ``chat_schemas``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from olympus.metrics_store import COLUMNS
from olympus.requests import MAX_TEXT, Name, Text
from web.body import ID_LIMIT, Body, Session, without_nul

_ANY_COLUMN = f"({'|'.join(COLUMNS)})"
_SOME_COLUMNS = f"^{_ANY_COLUMN}(,{_ANY_COLUMN})*$"


class HistoryQuery(Body):
    """``GET /olympus/history``."""

    domain: Annotated[str, StringConstraints(max_length=64)] | None = None
    session: Annotated[str, StringConstraints(max_length=128)] | None = None
    before: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class ForgetQuery(Body):
    """``DELETE /olympus/history``."""

    domain: Annotated[str, StringConstraints(max_length=64)] | None = None
    session: Annotated[str, StringConstraints(max_length=128)] | None = None


class SessionsQuery(Body):
    """``GET /olympus/sessions``."""

    limit: Annotated[int, Field(ge=1, le=500)] = 100


class ExperienceBody(Body):
    """``POST /olympus/history``: something that an agent elsewhere lived through. An action may be empty text."""

    observation: Text
    action: Annotated[str, StringConstraints(max_length=MAX_TEXT), AfterValidator(without_nul)]
    domain: Name | None = None
    feedback: Text | None = None
    score: Annotated[float, Field(ge=-1, le=1)] | None = None
    session_id: Session | None = None
    episode_id: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*\z")] | None = None
    request_id: Session | None = None
    meta: Annotated[dict[str, Any], Field(default_factory=dict, max_length=32)]


class FeedbackBody(Body):
    """``POST /olympus/history/<id>/feedback``: a score from -1 to 1, a text, or both."""

    score: Annotated[float, Field(ge=-1, le=1)] | None = None
    feedback: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackBody:
        if self.score is None and self.feedback is None:
            raise PydanticCustomError("value_error", "give a score, a feedback text, or both")
        return self


class CorrectBody(Body):
    """``POST /olympus/history/<id>/correct``: the observation, the action, or both, as they should have been."""

    observation: Text | None = None
    action: Text | None = None
    feedback: Text | None = None
    score: Annotated[float, Field(ge=-1, le=1)] | None = 1.0

    @model_validator(mode="after")
    def _says_something(self) -> CorrectBody:
        if self.observation is None and self.action is None:
            raise PydanticCustomError("value_error", "give an observation, an action, or both")
        return self


class HistoryExportQuery(Body):
    """``GET /olympus/history/export``."""

    domain: Name | None = None
    format: Literal["rich", "plain"] = "rich"


class HistoryImportQuery(Body):
    """``POST /olympus/history/import``: the domain of lines that name none."""

    domain: Name | None = None


class MemoryQuery(Body):
    """``GET /olympus/memory/search``. Times are UTC seconds since the epoch, as in ``created_at``."""

    q: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    domain: Annotated[str, StringConstraints(max_length=64)] | None = None
    session: Annotated[str, StringConstraints(max_length=128)] | None = None
    since: float | None = None
    until: float | None = None
    min_score: Annotated[float, Field(ge=-1, le=1)] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 10


def _measured_columns(names: Any) -> Any:
    if not isinstance(names, str):
        return names
    wanted = tuple(dict.fromkeys(names.split(",")))
    if not set(wanted) <= set(COLUMNS):
        known = ", ".join(COLUMNS)
        raise PydanticCustomError("value_error", "must be some of {known}, with commas between them", {"known": known})
    return wanted


class MetricsQuery(Body):
    """``GET /olympus/kernels/<id>/metrics``: ``columns`` separated by commas; without it, all."""

    since: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None
    max_points: Annotated[int, Field(ge=1, le=10_000)] = 2000
    columns: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(_measured_columns),
        WithJsonSchema({"type": "string", "pattern": _SOME_COLUMNS}),
    ] = None
    spread: bool = False


class DiffQuery(Body):
    """``GET /olympus/kernels/<id>/checkpoints/<name>/diff``: the checkpoint to look back to."""

    base: Annotated[str, StringConstraints(pattern=r"^step-[0-9]{8}\z")]


class ProposalsQuery(Body):
    """``GET /olympus/proposals``."""

    limit: Annotated[int, Field(ge=1, le=500)] = 50


class DistillBody(Body):
    """``POST /olympus/distillation/runs``: a preset and single values on top of it."""

    domain: Name | None = None
    preset: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}\z")] | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class RunsQuery(Body):
    """``GET /olympus/distillation/runs``."""

    domain: Annotated[str, StringConstraints(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class RunMetricsQuery(Body):
    """``GET /olympus/distillation/runs/<id>/metrics``: lines after the first ``since``."""

    since: Annotated[int, Field(ge=0, le=ID_LIMIT)] = 0


class OutlookQuery(Body):
    """``GET /olympus/distillation/outlook``."""

    domain: Name | None = None


class StreamQuery(Body):
    """``GET /olympus/stream``: topics separated by commas; none means all."""

    topics: Annotated[str, StringConstraints(max_length=500)] = ""
    last_event_id: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None


class KernelStreamQuery(Body):
    """``GET /olympus/kernels/<id>/events``."""

    last_event_id: Annotated[int, Field(ge=0, le=ID_LIMIT)] | None = None
