"""docs/api.md knows every route, scope and field, and its examples are taken by the server (after datasette)."""

from __future__ import annotations

import json
import re

import pytest
from flask import Flask
from flask.testing import FlaskClient

from memory.cartridges.archive import pack
from memory.cartridges.cartridge import make_cartridge
from olympus.access import SCOPES
from olympus.requests import QueryRequest, SpawnRequest
from settings import ROOT
from tests.unit.olympus.kernel_world import archive_bytes
from tests.unit.web.conftest import MakeRuntime
from web.app import create_app
from web.auth import OPEN
from web.chat_schemas import ChatBody
from web.completion_schemas import CompletionBody
from web.embeddings import EmbeddingsBody
from web.response_schemas import ResponseBody
from web.stream import TOPICS
from workspace.prefix import prefix_of_tokens

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_route_is_documented_and_every_documented_route_exists(served: Flask) -> None:
    routes = set()
    for rule in served.url_map.iter_rules():
        path = re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"<\1>", rule.rule)
        routes |= {f"{method} {path}" for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    documented = set(re.findall(r"(?:^### |`)((?:GET|POST|PUT|PATCH|DELETE) /[^\s`]*)", PAGE, re.MULTILINE))
    assert routes - documented == set(), "missing in docs/api.md"
    assert documented - routes == set(), "documented, but there is no such route"


def test_every_endpoint_has_an_example() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) > 25
    assert [part.splitlines()[0] for part in sections if not re.search(r"^    curl ", part, re.MULTILINE)] == []


@pytest.mark.parametrize("model", [ChatBody, CompletionBody, EmbeddingsBody, ResponseBody, SpawnRequest, QueryRequest])
def test_every_field_is_documented(model: type[ChatBody]) -> None:
    known = {name for name in model.model_fields if name not in ("function_call", "olympus")}
    assert [name for name in known if not re.search(rf"`{name}[`.]", PAGE)] == []


def test_scopes_topics_and_open_routes_are_documented() -> None:
    assert [scope for scope in SCOPES if f"`{scope}`" not in PAGE] == []
    assert [topic for topic in TOPICS if f"`{topic}`" not in PAGE] == []
    marked = re.findall(r" Open(?:\.| \|)$", PAGE, re.MULTILINE)
    assert len(marked) == len(OPEN) - 1, "GET and POST /login share a line, each other open route has one"


def test_the_examples_are_taken(make_runtime: MakeRuntime) -> None:
    """Each curl command of the page, sent to a server: nothing is refused for its form."""
    runtime = make_runtime(model=True)
    client = create_app(runtime=runtime).test_client()
    loaded = runtime.engine.loaded
    cartridge = make_cartridge(loaded, prefix_of_tokens(loaded, list(range(2, 18))), domain="support")
    runtime.cartridges.promote(runtime.cartridges.register(cartridge).id)
    files = {
        "kernels": archive_bytes(),
        "cartridges": pack(cartridge, "native"),
        "history": b'{"type": "Observation", "content": "a"}',
    }
    spawned = client.post("/olympus/kernels/spawn", json={"domain": "support", "train": False})
    commands = re.findall(r"^    curl (.*(?:\\\n.*|\n      .*)*)", PAGE, re.MULTILINE)
    assert len(commands) > 25
    for command in commands:
        text = re.sub(r"\\?\n\s+", " ", command).replace("$ID", spawned.json["kernel"]["kernel_id"])
        text = text.replace("smollm2-135m-instruct", "tiny-llama")
        assert _send(client, text, files) not in (400, 405, 415, 421, 422, 500), text


def _send(client: FlaskClient, command: str, files: dict[str, bytes]) -> int:
    path = re.search(r'\$URL([^\s"]*)', command)
    body = re.search(r"-d '(.*)'", command)
    method = re.search(r"-X (\w+)", command)
    assert path is not None, command
    data = {} if body is None else {"json": json.loads(body.group(1))}
    if "--data-binary" in command:
        kind = path.group(1).split("/")[2]
        mimetype = re.search(r"Content-Type: ([\w/-]+)", command)
        assert mimetype is not None, command
        data, method = {"data": files[kind], "content_type": mimetype.group(1)}, re.search("(POST)", "POST")
    if "-c jar" in command:
        data, method = {"data": {"key": "x"}}, re.search("(POST)", "POST")
    chosen = method.group(1) if method else ("POST" if body else "GET")
    response = client.open(path.group(1), method=chosen, **data)
    status = response.status_code
    response.close()
    return status
