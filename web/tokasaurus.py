"""Tokasaurus' cartridge API: the same answers as ``/v1/chat/completions``, at the places where its clients ask.

Its README says ``/v1/cartridge/chat/completions``, its code routes ``/custom/cartridge/chat/completions``: both are
here, and ``completions`` likewise. Requests and answers are those of ``web.openai``; cartridges, the packed fingerprint
and the tag in a system message work on the plain routes, too. Not here: batches, whose answers are pickles, and
cartridges from hubs.
"""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from web.auth import requires
from web.openai import chat_completions, completions

blueprint = Blueprint("tokasaurus", __name__)


@blueprint.post("/v1/cartridge/chat/completions")
@blueprint.post("/custom/cartridge/chat/completions")
@requires("chat")
def cartridge_chat_completions() -> ResponseReturnValue:
    """Answer a conversation with cartridges."""
    return chat_completions()


@blueprint.post("/v1/cartridge/completions")
@blueprint.post("/custom/cartridge/completions")
@requires("chat")
def cartridge_completions() -> ResponseReturnValue:
    """Go on with a text after cartridges."""
    return completions()


@blueprint.get("/ping")
def ping() -> ResponseReturnValue:
    """The server answers."""
    return jsonify({"message": "pong"})
