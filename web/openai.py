"""The OpenAI API: models, chat completions and completions. How an answer goes out is in ``answering.py``."""

from __future__ import annotations

from typing import Any

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
from web.openai_wire import Wire, embedding_object, model_object

blueprint = Blueprint("openai", __name__, url_prefix="/v1")


@blueprint.get("/models")
@requires("chat")
def models() -> ResponseReturnValue:
    """The models that can be asked: the loaded one, and those that only embed."""
    return jsonify({"object": "list", "data": _models()})


@blueprint.get("/models/<path:model_id>")
@requires("chat")
def model(model_id: str) -> ResponseReturnValue:
    """One model."""
    serving = runtime()
    if serving.model_state.stage != "disabled" and serving.chat.model().answers_to(model_id):
        model_id = serving.chat.model().id
    listed = _models()
    found = next((item for item in listed if item["id"] == model_id), None)
    if found is None:
        there = " and ".join(repr(item["id"]) for item in listed) or "none"
        raise ApiError(404, "model_not_found", f"the model {model_id!r} does not exist here; there is {there}")
    return jsonify(found)


def _models() -> list[dict[str, Any]]:
    serving = runtime()
    created = int(serving.started_at or 0)
    served = [] if serving.model_state.stage == "disabled" else [model_object(serving.chat.model(), created)]
    return [*served, *(embedding_object(name, created) for name in serving.embeddings.own_models)]


@blueprint.post("/chat/completions")
@requires("chat")
def chat_completions() -> ResponseReturnValue:
    """Answer a conversation."""
    body = parse_body(ChatBody)
    return answer(body.to_request, lambda run: Wire(run.model, with_usage=body.include_usage), stream=body.stream)


@blueprint.post("/completions")
@requires("chat")
def completions() -> ResponseReturnValue:
    """Go on with a text."""
    body = parse_body(CompletionBody)
    return answer(
        body.to_request, lambda run: CompletionWire(run.model, with_usage=body.include_usage), stream=body.stream
    )
