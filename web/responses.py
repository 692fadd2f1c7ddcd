"""OpenAI's Responses API: answers that are stored, read again, gone on from, and deleted.

A response is an exchange like a chat's; the chat service answers it, the history stores it, ``answering.py`` sends it.
Not here: background runs (and so no cancelling), conversations, and tools other than functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from memory.history import Record
from olympus.chat_record import from_record
from olympus.chat_responses import ResponseNotFound, answered, asked, find_response, hex_of, item_message
from olympus.chat_run import ChatRun
from olympus.chat_types import ChatFinished
from web.answering import answer
from web.auth import requires
from web.context import principal, runtime
from web.errors import ApiError, FieldError
from web.jsonio import parse_body, parse_query
from web.response_items import Message, to_items
from web.response_schemas import ItemsQuery, ResponseBody, RetrieveQuery
from web.response_wire import ResponseWire
from workspace.errors import RequestError

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

blueprint = Blueprint("responses", __name__, url_prefix="/v1")


@blueprint.post("/responses")
@requires("chat")
def create() -> ResponseReturnValue:
    """Answer, and store the answer as a response."""
    body = parse_body(ResponseBody)
    engine = runtime().settings.engine
    options: dict[str, Any] = {
        "resolve": _referenced,
        "defaults": {"temperature": engine.temperature, "top_p": engine.top_p},
    }
    if body.previous_response_id is not None:
        options |= _continued(body.previous_response_id)
    try:
        return answer(partial(body.to_request, **options), _wire, stream=body.stream)
    except RequestError as error:  # what the engine refuses has this dialect's names here
        param = error.param or "messages"
        error.param = _NAMES.get(param, param.replace("].function.", "]."))
        raise


@blueprint.get("/responses/<response_id>")
@requires("chat")
def retrieve(response_id: str) -> ResponseReturnValue:
    """A stored response."""
    parse_query(RetrieveQuery)
    record = _found(response_id)
    wire = ResponseWire(record.meta["model"], hex_of(response_id), record.meta["response"]["fields"])
    finished = from_record(record)[-1]
    assert isinstance(finished, ChatFinished)
    return jsonify(wire.completion(finished, None))


@blueprint.delete("/responses/<response_id>")
@requires("chat")
def delete(response_id: str) -> ResponseReturnValue:
    """Forget a response: its exchange leaves the history."""
    runtime().forget(experience_id=_found(response_id).id, actor=principal().id)
    return jsonify({"id": response_id, "object": "response", "deleted": True})


@blueprint.get("/responses/<response_id>/input_items")
@requires("chat")
def input_items(response_id: str) -> ResponseReturnValue:
    """What a response answered: its input and what came before it, without the instructions."""
    query = parse_query(ItemsQuery)
    items = to_items(asked(_found(response_id)), hex_of(response_id))
    if query.order == "desc":
        items.reverse()
    begin = 0
    if query.after is not None:
        begin = next((place for place, item in enumerate(items, 1) if item["id"] == query.after), 0)
        if not begin:
            raise ApiError(404, "item_not_found", f"there is no input item {query.after!r} in this response")
    page = items[begin : begin + query.limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    more = begin + query.limit < len(items)
    return jsonify({"object": "list", "data": page, **ends, "has_more": more})


def _wire(run: ChatRun) -> ResponseWire:
    return ResponseWire(run.model.id, run.response.id, run.response.fields)


def _found(response_id: str) -> Record:
    return find_response(runtime().history, response_id, principal().id)


def _continued(response_id: str) -> dict[str, Any]:
    """What a request that goes on from a response begins with."""
    try:
        record = _found(response_id)
    except ResponseNotFound as error:
        raise _refused("previous_response_id", str(error), "previous_response_not_found") from None
    earlier = [*asked(record), answered(record, hex_of(response_id))]
    return {"earlier": earlier, "session": record.session_id, "domain": record.domain}


def _referenced(item_id: str) -> Message | None:
    try:
        return item_message(runtime().history, item_id, principal().id)
    except ResponseNotFound as error:
        raise _refused("input", str(error)) from None


def _refused(field: str, detail: str, code: str = "invalid_value") -> ApiError:
    return ApiError(422, code, f"{field}: {detail}", errors=[FieldError(field, detail, code)])
