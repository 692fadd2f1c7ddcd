"""API keys over HTTP: make, list, revoke. A key is told once, in the answer that made it."""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue
from werkzeug.routing import BaseConverter

from olympus.access import SCOPES, Principal
from web.admin_schemas import Asker, KeyBody, KeyMade, KeyShown, KeysShown
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError
from web.jsonio import parse_body

blueprint = Blueprint("keys", __name__, url_prefix="/olympus/keys")


class KeyId(BaseConverter):
    """A key's id; nothing else reaches the database."""

    regex = r"[0-9a-f]{8}"


@blueprint.get("")
@requires("admin")
def keys() -> ResponseReturnValue:
    """All keys, oldest first, and who asks."""
    shown = KeysShown(keys=_all(), you=_asker(principal()), scopes=SCOPES)
    return jsonify(shown.model_dump(mode="json"))


@blueprint.post("")
@requires("admin")
def create() -> ResponseReturnValue:
    """Make a key."""
    body = parse_body(KeyBody)
    lifetime = None if body.expires_in_days is None else 86_400 * body.expires_in_days
    key_id, key = runtime().keys.create(body.name, body.scopes, lifetime, actor=principal().id)
    made = KeyMade(key=key, **_one(key_id).model_dump())
    response = jsonify(made.model_dump(mode="json"))
    response.headers["Cache-Control"] = "no-store"
    return response, 201


@blueprint.post("/<key:key_id>/revoke")
@requires("admin")
def revoke(key_id: str) -> ResponseReturnValue:
    """Make a key invalid at once, also for sessions and streams that began with it."""
    if not runtime().keys.revoke(key_id, actor=principal().id):
        raise ApiError(404, "key_not_found", f"no key that could be revoked has the id {key_id}")
    return jsonify(_one(key_id).model_dump(mode="json"))


def _all() -> tuple[KeyShown, ...]:
    return tuple(KeyShown(**row) for row in runtime().keys.list())


def _one(key_id: str) -> KeyShown:
    return next(key for key in _all() if key.id == key_id)


def _asker(who: Principal) -> Asker:
    return Asker(id=who.id, name=who.name, scopes=tuple(scope for scope in SCOPES if scope in who.scopes))
