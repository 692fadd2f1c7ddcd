"""``response_format``: JSON objects and schemas over HTTP, streamed and not, cut off, refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from tests.unit.web.conftest import ask, events

PATH = "/v1/chat/completions"
SHIP = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "masts": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["name", "masts"],
    "additionalProperties": False,
}


def shaped(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "ship", "schema": schema, **fields}}


def test_an_answer_fits_its_schema_whole_and_streamed(client: FlaskClient, runtime: Runtime) -> None:
    body = ask(max_tokens=200, temperature=1.0, seed=3, n=3, response_format=shaped(SHIP, strict=True, description="d"))
    whole = client.post(PATH, json=body).json
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    for choice, text in zip(whole["choices"], texts, strict=True):
        ship = json.loads(text)
        assert (choice["finish_reason"], set(ship)) == ("stop", {"name", "masts"})
        assert 1 <= ship["masts"] <= 5
        assert len(ship["name"]) <= 8
    told = dict.fromkeys(range(3), "")
    for entry in events(client.post(PATH, json=body | {"stream": True}).text)[:-1]:
        for choice in entry["data"]["choices"]:
            told[choice["index"]] += choice["delta"].get("content", "")
    assert list(told.values()) == texts


def test_any_object(client: FlaskClient) -> None:
    for seed in range(4):
        body = ask(max_tokens=60, temperature=1.0, seed=seed, response_format={"type": "json_object"})
        (choice,) = client.post(PATH, json=body).json["choices"]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_what_is_cut_off_says_length(client: FlaskClient) -> None:
    (choice,) = client.post(PATH, json=ask(max_tokens=3, response_format=shaped(SHIP))).json["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("format_", "param", "message"),
    [
        (shaped({"not": {}}), "response_format", 'Unimplemented keys: ["not"]'),
        (shaped({"type": "string", "format": "colour"}), "response_format", "Unknown format: colour"),
        (shaped(SHIP) | {"type": "json_object"}, "response_format", "only with it"),
        ({"type": "json_schema"}, "response_format", "json_schema goes with"),
        ({"type": "xml"}, "response_format.type", "'json_object'"),
        ({"type": "json_schema", "json_schema": {"name": "a b"}}, "response_format.json_schema.name", "pattern"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": []}},
            "response_format.json_schema.schema",
            "be an object",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, format_: dict[str, Any], param: str, message: str
) -> None:
    response = client.post(PATH, json=ask(response_format=format_))
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_it_says_where_it_ends_itself(client: FlaskClient) -> None:
    response = client.post(PATH, json=ask(response_format=shaped(SHIP), ignore_eos=True))
    assert (response.status_code, response.json["error"]["param"]) == (400, "ignore_eos")


def test_another_schema_is_another_request(client: FlaskClient) -> None:
    headers = {"Idempotency-Key": "schemas"}
    client.post(PATH, json=ask(response_format=shaped(SHIP)), headers=headers)
    other = client.post(PATH, json=ask(response_format={"type": "json_object"}), headers=headers)
    assert other.json["error"]["code"] == "idempotency_key_reused"
