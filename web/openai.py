"""The OpenAI API: models, chat completions and completions. How an answer goes out is in ``answering.py``."""

from __future__ import annotations

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from web.answering import answer
from web.auth import requires
from web.chat_schemas import ChatBody
from web.completion_schemas import CompletionBody
from web.completion_wire import CompletionWire
from web.context import runtime
from web.errors import ApiError
from web.jsonio import parse_body
from web.openai_wire import Wire, model_object

blueprint = Blueprint("openai", __name__, url_prefix="/v1")


@blueprint.get("/models")
@requires("chat")
def models() -> ResponseReturnValue:
    """The models that can be asked: the loaded one."""
    serving = runtime()
    if serving.model_state.stage == "disabled":
        return jsonify({"object": "list", "data": []})
    return jsonify({"object": "list", "data": [model_object(serving.chat.model(), int(serving.started_at or 0))]})


@blueprint.get("/models/<path:model_id>")
@requires("chat")
def model(model_id: str) -> ResponseReturnValue:
    """One model."""
    card = runtime().chat.model()
    if not card.answers_to(model_id):
        raise ApiError(404, "model_not_found", f"the model {model_id!r} does not exist here; there is {card.id!r}")
    return jsonify(model_object(card, int(runtime().started_at or 0)))


@blueprint.post("/chat/completions")
@requires("chat")
def chat_completions() -> ResponseReturnValue:
    """Answer a conversation."""
    return answer(parse_body(ChatBody), Wire)


@blueprint.post("/completions")
@requires("chat")
def completions() -> ResponseReturnValue:
    """Go on with a text."""
    return answer(parse_body(CompletionBody), CompletionWire)
