"""Two hundred random schemas over HTTP, in both dialects: every answer is whole and validates."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
from flask.testing import FlaskClient

from tests.unit.web.conftest import ask
from tests.unit.workspace.test_constraints import random_schema

SCHEMAS = 200
TRIES = 6  # a random model may write the digits of a number for very long; another seed does not


def test_every_answer_to_200_random_schemas_validates(client: FlaskClient) -> None:
    draw = random.Random(20261128)
    for number in range(SCHEMAS):
        schema = random_schema(draw)
        for seed in range(TRIES):
            text = answer(client, schema, seed=1000 * number + seed, responses=number % 2 == 1)
            if text is not None:
                break
        else:
            raise AssertionError(f"no answer to {schema} came to its end")
        jsonschema.validate(json.loads(text), schema)


def answer(client: FlaskClient, schema: dict[str, Any], *, seed: int, responses: bool) -> str | None:
    """The text; None where ``max_tokens`` cut it off, which the answer then says."""
    asked: dict[str, Any] = {"temperature": 1.5, "seed": seed, "store": False}
    if responses:
        shape = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
        body = {"input": "hi", "max_output_tokens": 150, "text": {"format": shape}, **asked}
        made = client.post("/v1/responses", json=body).json
        (message,) = made["output"]
        return str(message["content"][0]["text"]) if made["status"] == "completed" else None
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    (choice,) = client.post("/v1/chat/completions", json=ask(max_tokens=150, response_format=shape) | asked).json[
        "choices"
    ]
    return str(choice["message"]["content"]) if choice["finish_reason"] == "stop" else None
