"""The OpenAPI document is that of the code, is complete, and is what clients are served."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from flask import Flask
from flask.testing import FlaskClient

from settings import ROOT, load_settings
from tests.unit.web.conftest import ask
from web.app import create_app
from web.openapi import document


@pytest.fixture(scope="module")
def told(served: Flask) -> dict[str, Any]:
    return document(served)


def test_the_committed_document_is_that_of_the_code() -> None:
    made = document(create_app(load_settings(environ={})))
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(made)), "run: python -m cli.main openapi > docs/openapi.json"


def test_it_is_served_to_whoever_has_a_key(client: FlaskClient, guarded: Flask, key: Any, told: dict[str, Any]) -> None:
    assert client.get("/openapi.json").json == json.loads(json.dumps(told))
    assert guarded.test_client().get("/openapi.json").status_code == 401
    assert guarded.test_client().get("/openapi.json", headers=key("chat")).status_code == 200


def test_every_route_but_pages_is_in_it(served: Flask, told: dict[str, Any]) -> None:
    routes = set()
    for rule in served.url_map.iter_rules():
        if rule.endpoint.partition(".")[0] not in ("pages", "static"):
            path = re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule)
            routes |= {(path, method.lower()) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    assert {(path, method) for path, methods in told["paths"].items() for method in methods} == routes
    operations = [operation for methods in told["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["summary"] for operation in operations)


def test_what_a_view_parses_is_what_it_takes(told: dict[str, Any]) -> None:
    def body(path: str) -> str:
        content = told["paths"][path]["post"]["requestBody"]["content"]
        return str(content["application/json"]["schema"]["$ref"]).rsplit("/", 1)[-1]

    assert body("/v1/chat/completions") == body("/custom/cartridge/chat/completions") == "ChatBody"
    assert body("/v1/responses") == "ResponseBody"
    assert body("/olympus/kernels/spawn") == "SpawnRequest"
    promote = told["paths"]["/olympus/cartridges/{cartridge_id}/promote"]["post"]
    assert promote["requestBody"]["required"] is False
    upload = told["paths"]["/olympus/history/import"]["post"]["requestBody"]["content"]
    assert "application/x-ndjson" in upload
    names = [item["name"] for item in told["paths"]["/olympus/history"]["get"]["parameters"]]
    assert names == ["domain", "session", "before", "limit"]
    assert "201" in told["paths"]["/olympus/kernels/spawn"]["post"]["responses"]
    assert set(told["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}


def test_schemas_are_valid_and_answers_fit_them(client: FlaskClient, told: dict[str, Any]) -> None:
    for schema in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert r"\z" not in json.dumps(told)

    def check(name: str, instance: Any) -> None:
        whole = {"$ref": f"#/components/schemas/{name}", "components": told["components"]}
        jsonschema.validate(instance, whole, cls=jsonschema.Draft202012Validator)

    check("ChatBody", ask(logit_bias={"5": 1.5}, stop=["x"], workspace=True))
    check("ChatCompletion", client.post("/v1/chat/completions", json=ask()).json)
    check("ResponseShown", client.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2}).json)
    check("OpenAIError", client.post("/v1/chat/completions", json={}).json)
    check("ProblemDetails", client.get("/olympus/history?limit=0").json)
    with pytest.raises(jsonschema.ValidationError):
        check("ChatBody", ask(temprature=1))


@pytest.mark.parametrize("path", ["/olympus/history", "/olympus/sessions", "/olympus/memory/search"])
def test_a_query_holds_no_nul(client: FlaskClient, path: str) -> None:
    refused = client.get(path, query_string={"domain": "a\x00b"})
    assert refused.status_code == 422
    assert refused.json["errors"][0]["field"] == "domain"
