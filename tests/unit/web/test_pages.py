"""The dashboard's pages: headers, what they load, who may see them; and the views that exist for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from memory.cartridges.cartridge import make_cartridge
from memory.history import NewExperience
from olympus.runtime import Runtime
from web.headers import SECURITY_HEADERS
from workspace.prefix import prefix_of_tokens

MAIN = ("/", "/chat", "/kernels", "/cartridges", "/memory", "/system")
PAGES = (*MAIN, "/scheduler", "/settings", "/audit")
Key = Callable[..., dict[str, str]]


def _tell(runtime: Runtime, domain: str, observation: str, **fields: Any) -> int:
    item = NewExperience(observation, "noted", domain=domain, source="chat", **fields)
    return runtime.history.append([item])[0].id


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole(client: FlaskClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["Content-Security-Policy"] == SECURITY_HEADERS["Content-Security-Policy"]
    assert page.text.count("<h1") == 1
    assert re.findall(r'<a href="([^"]+)" aria-current="page"', page.text) == [path]
    links = re.findall(r'<nav class="site-nav".*?</nav>', page.text, re.DOTALL)
    assert re.findall(r'href="([^"]+)"', links[0]) == list(MAIN)
    ids = re.findall(r'\sid="([^"]+)"', page.text)
    assert len(ids) == len(set(ids))
    for named in re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', page.text):
        assert set(named.split()) <= set(ids), named
    for address in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        assert client.get(address, buffered=True).status_code == 200


def test_a_page_names_every_module_that_it_will_need(client: FlaskClient) -> None:
    page = client.get("/kernels").text
    named = set(re.findall(r'<link rel="modulepreload" href="/static/(js/[^"]+)">', page))
    assert {"js/compare.js", "js/chart.js", "js/format.js", "js/dom.js", "js/kernel_spawn.js"} <= named
    for module in ("js/kernels.js", *named):
        text = client.get(f"/static/{module}", buffered=True).text
        assert {
            f"js/{name}"
            for name in re.findall(r'from "\./([^"]+)"|^import "\./([^"]+)"', text)
            for name in name
            if name
        } <= named
    assert "modulepreload" not in client.get("/login").text


@pytest.mark.parametrize("path", PAGES)
def test_without_a_key_a_page_asks_for_one(guarded: Flask, key: Key, path: str) -> None:
    answer = guarded.test_client().get(path, headers={"Accept": "text/html"})
    assert answer.status_code in (302, 303)
    assert answer.headers["Location"].startswith("/login")
    assert guarded.test_client().get(path, headers=key("chat")).status_code == 200


def test_domains_of_the_history(client: FlaskClient, runtime: Runtime) -> None:
    first, newest = (_tell(runtime, "rivers", text) for text in ("the Acheron", "the Styx"))
    told = {item["domain"]: item for item in client.get("/olympus/history/domains").json["domains"]}
    assert told["rivers"] == {"domain": "rivers", "experiences": 2, "newest_id": newest}
    client.delete(f"/olympus/history/{first}")
    told = {item["domain"]: item for item in client.get("/olympus/history/domains").json["domains"]}
    assert told["rivers"]["experiences"] == 1


def test_one_experience_whole(client: FlaskClient, runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "the Lethe"}]
    known = _tell(runtime, "rivers", "the Lethe", messages=messages, score=0.5)
    told = client.get(f"/olympus/history/{known}").json
    assert (told["id"], told["observation"], told["score"], told["messages"]) == (known, "the Lethe", 0.5, messages)
    client.delete(f"/olympus/history/{known}")
    for unknown in (known, 10**12):
        answer = client.get(f"/olympus/history/{unknown}")
        assert (answer.status_code, answer.json["code"]) == (404, "experience_not_found")


def test_cartridges_that_learned_from_an_experience(client: FlaskClient, runtime: Runtime) -> None:
    known = _tell(runtime, "lakes", "Stymphalia")
    loaded = runtime.engine.loaded
    made = [
        make_cartridge(loaded, prefix_of_tokens(loaded, [2, 3, 4]), domain="lakes", experience_ids=ids)
        for ids in ([known], [known + 1_000_000], [])
    ]
    row = runtime.cartridges.register(made[0])
    for other in made[1:]:
        runtime.cartridges.register(other)
    found = client.get(f"/olympus/cartridges?experience={known}").json["cartridges"]
    assert [item["id"] for item in found] == [row.id]
    assert client.get(f"/olympus/cartridges?experience={known}&domain=elsewhere").json["cartridges"] == []
    assert client.get("/olympus/cartridges?experience=0").status_code == 422


def test_scopes_of_the_views_of_the_pages(guarded: Flask, key: Key) -> None:
    asking = guarded.test_client()
    for path in ("/olympus/history/domains", "/olympus/history/1"):
        assert asking.get(path, headers=key("chat", "cartridges:read")).status_code == 403
    assert asking.get("/olympus/history/domains", headers=key("history:read")).status_code == 200
    assert asking.get("/olympus/history/1", headers=key("history:read")).status_code == 404
    assert asking.get("/olympus/cartridges?experience=1", headers=key("history:read")).status_code == 403
