"""Tokasaurus' cartridge API: the same answers as ``/v1/chat/completions``, at the places where its clients ask.

Its README says ``/v1/cartridge/chat/completions``, its code routes ``/custom/cartridge/chat/completions``: both are
here. Requests and answers are those of ``web.openai``; cartridges, the packed fingerprint and the tag in a system
message work on the plain route, too. Not here: ``/v1/cartridge/completions`` (this server completes no bare text),
batches, whose answers are pickles, and cartridges from hubs.
"""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from web.auth import requires
from web.chat_schemas import ChatBody
from web.jsonio import parse_body
from web.openai import answer

blueprint = Blueprint("tokasaurus", __name__)


@blueprint.post("/v1/cartridge/chat/completions")
@blueprint.post("/custom/cartridge/chat/completions")
@requires("chat")
def cartridge_chat_completions() -> ResponseReturnValue:
    """Answer a conversation with cartridges."""
    return answer(parse_body(ChatBody))


@blueprint.get("/ping")
def ping() -> ResponseReturnValue:
    """The server answers."""
    return jsonify({"message": "pong"})
