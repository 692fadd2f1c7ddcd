"""Cartridges over HTTP: see them, decide which one serves, take them in and give them out."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from flask import Blueprint, Response, jsonify, request
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from werkzeug.routing import BaseConverter

from memory.cartridges.ids import MOST_CHARACTERS
from olympus.requests import Name
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError
from web.jsonio import parse_body, parse_query, read_body

blueprint = Blueprint("cartridges", __name__, url_prefix="/olympus/cartridges")

MIMETYPE = "application/zip"
_ID_LIMIT = (1 << 63) - 1
_ACCEPTED = frozenset({MIMETYPE, "application/x-zip-compressed", "application/octet-stream"})

Reason = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*\z")]


Model = TypeVar("Model", bound=BaseModel)


class CartridgeId(BaseConverter):
    """A cartridge's id; nothing else reaches the registry or the disk."""

    regex = rf"(?=.{{1,{MOST_CHARACTERS}}}(?:/|$))[a-z0-9]+(?:_[a-z0-9]+)*_v[0-9]{{4,9}}"


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ListQuery(_Request):
    """``GET /olympus/cartridges``."""

    domain: Annotated[str, StringConstraints(max_length=64)] | None = None
    state: Literal["candidate", "serving", "retired", "rejected"] | None = None
    deleted: bool = False
    experience: Annotated[int, Field(ge=1, le=_ID_LIMIT)] | None = None


class DomainQuery(_Request):
    """``GET /olympus/cartridges/lineage``."""

    domain: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class ExportQuery(_Request):
    """``GET /olympus/cartridges/<id>/export``."""

    format: Literal["native", "tokasaurus", "peft"] = "native"


class ImportQuery(_Request):
    """``POST /olympus/cartridges/import``. ``model`` declares what a file was made for that does not prove it."""

    domain: Name
    model: Annotated[str, StringConstraints(max_length=256)] | None = None


class PromoteBody(_Request):
    """``POST /olympus/cartridges/<id>/promote``. ``force`` also takes a rejected or a stale one."""

    reason: Reason = ""
    force: bool = False


class ReasonBody(_Request):
    """``POST /olympus/cartridges/<id>/retire``."""

    reason: Reason = ""


class RejectBody(_Request):
    """``POST /olympus/cartridges/<id>/reject``."""

    reason: Annotated[Reason, StringConstraints(min_length=1)]


class RollbackBody(_Request):
    """``POST /olympus/cartridges/rollback``."""

    domain: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*\z")]
    reason: Reason = ""


@blueprint.get("")
@requires("cartridges:read")
def cartridges() -> ResponseReturnValue:
    """All cartridges, newest first."""
    query = parse_query(ListQuery)
    rows = runtime().cartridges.list(
        query.domain, state=query.state, deleted=query.deleted, experience=query.experience
    )
    return jsonify({"cartridges": [row.to_json() for row in rows]})


@blueprint.get("/lineage")
@requires("cartridges:read")
def lineage() -> ResponseReturnValue:
    """Every cartridge that a domain ever had."""
    return jsonify(runtime().cartridge_desk.lineage(parse_query(DomainQuery).domain))


@blueprint.get("/<cartridge:cartridge_id>")
@requires("cartridges:read")
def cartridge(cartridge_id: str) -> ResponseReturnValue:
    """Everything about one."""
    return jsonify(runtime().cartridges.get(cartridge_id).to_json())


@blueprint.get("/<cartridge:cartridge_id>/export")
@requires("cartridges:read")
def export(cartridge_id: str) -> ResponseReturnValue:
    """One as a file."""
    file = runtime().cartridge_desk.export(cartridge_id, parse_query(ExportQuery).format)
    headers = {"Content-Disposition": f'attachment; filename="{file.name}"', "Cache-Control": "no-store"}
    return Response(file.content, mimetype=MIMETYPE, headers=headers)


@blueprint.post("/import")
@requires("cartridges:write")
def import_cartridge() -> ResponseReturnValue:
    """Make a candidate of a file, which is the body."""
    query = parse_query(ImportQuery)
    if request.mimetype not in _ACCEPTED:
        given = request.headers.get("Content-Type", "nothing")[:80]
        raise ApiError(
            415, "unsupported_media_type", f"send the file itself with Content-Type: {MIMETYPE}, not {given}"
        )
    serving = runtime()
    request.max_content_length = serving.settings.cartridges.import_max_bytes
    desk = serving.cartridge_desk
    told = desk.take_in(read_body(), domain=query.domain, model=query.model, actor=principal().id)
    return jsonify(told), 201


@blueprint.post("/rollback")
@requires("cartridges:write")
def rollback() -> ResponseReturnValue:
    """Back to the one that served a domain before."""
    body = parse_body(RollbackBody)
    return jsonify(runtime().cartridge_desk.rollback(body.domain, actor=principal().id, reason=body.reason))


@blueprint.post("/<cartridge:cartridge_id>/promote")
@requires("cartridges:write")
def promote(cartridge_id: str) -> ResponseReturnValue:
    """Let it serve its domain from now on."""
    body = _optional(PromoteBody)
    desk = runtime().cartridge_desk
    return jsonify(desk.promote(cartridge_id, actor=principal().id, reason=body.reason, force=body.force))


@blueprint.post("/<cartridge:cartridge_id>/reject")
@requires("cartridges:write")
def reject(cartridge_id: str) -> ResponseReturnValue:
    """A candidate is not good enough."""
    body = parse_body(RejectBody)
    return jsonify(runtime().cartridge_desk.reject(cartridge_id, actor=principal().id, reason=body.reason))


@blueprint.post("/<cartridge:cartridge_id>/retire")
@requires("cartridges:write")
def retire(cartridge_id: str) -> ResponseReturnValue:
    """Let it serve no longer, with nothing in its place."""
    body = _optional(ReasonBody)
    return jsonify(runtime().cartridge_desk.retire(cartridge_id, actor=principal().id, reason=body.reason))


@blueprint.delete("/<cartridge:cartridge_id>")
@requires("cartridges:write")
def delete(cartridge_id: str) -> ResponseReturnValue:
    """Remove its tensors for good."""
    return jsonify(runtime().cartridge_desk.delete(cartridge_id, actor=principal().id))


def _optional(model: type[Model]) -> Model:
    """The JSON body, or the defaults where there is none."""
    return parse_body(model) if request.content_length or request.is_json else model()
