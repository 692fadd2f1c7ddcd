"""The page of the memory in a real browser: search, browse, judge, correct, delete, files. A tiny model's server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Dashboard, Watched

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PORTS = {"Athens": "Piraeus", "Rome": "Ostia", "Paris": "Le Havre", "Sparta": "Gytheio", "Corinth": "Lechaion"}
SMALL_RUN = {
    "training": {"max_steps": 2, "warmup_steps": 1, "evaluate_every": 2},
    "data": {"eval_share": 0.2},
    "gate": {"min_rows": 1},
}


@pytest.fixture
def server(tiny_server: Dashboard) -> Dashboard:
    return tiny_server


@pytest.fixture(scope="session")
def ports(tiny_server: Dashboard) -> dict[str, int]:
    """Ids of the experiences of the domain ``ports``, by city; one answer is wrong, and a cartridge learned it all."""
    known = {}
    for city, port in PORTS.items():
        action = "Antwerp" if city == "Rome" else port
        body = {"domain": "ports", "observation": f"Which port lies next to {city}?", "action": action}
        body |= {"session_id": "voyage", "feedback": "Correct!"}
        known[city] = tiny_server.post("/olympus/history", body)["id"]
    run = tiny_server.post("/olympus/distillation/runs", {"domain": "ports", "config": SMALL_RUN})
    path = f"/olympus/distillation/runs/{run['id']}"
    tiny_server.wait_until(lambda: "cartridge" in tiny_server.get(path)["progress"], 120, "a cartridge of ports")
    tiny_server.wait_until(lambda: tiny_server.get(path)["finished_at"] is not None, 120, "the end of the run")
    _until_found(tiny_server, "Corinth")
    return known


def _until_found(server: Dashboard, word: str) -> None:
    """The search follows the history in a thread of its own, and the page asks it once."""
    path = f"/olympus/memory/search?q={word}"
    server.wait_until(lambda: bool(server.get(path)["results"]), 60, f"{word} in the search")


def _lines(page: Any) -> list[str]:
    return [line.inner_text() for line in page.locator("#experiences .said").all()]


def _results(page: Any, count: int) -> None:
    page.locator("#browse-count").get_by_text(re.compile(f"^{count} found")).wait_for()


def test_search_judge_correct_delete(watched: Watched, ports: dict[str, int]) -> None:
    page = watched.open("/memory")
    watched.until_live()
    page.fill("#search-q", "which port is near Rome")
    page.keyboard.press("Enter")
    watched.until("/found, by words/.test(document.getElementById('browse-count').textContent)")
    assert "Rome" in _lines(page)[0]
    assert "best by words" in page.locator(".found-by").first.inner_text()
    page.locator(".experience").first.click()
    page.locator("#inspect-body .told-text").first.wait_for()
    assert page.locator("#inspect-id").inner_text() == f"#{ports['Rome']}"
    page.locator(".learners").get_by_text("ports_v0001").wait_for()
    assert f"id={ports['Rome']}" in watched.address()

    page.locator(".judge-form label", has_text="Bad").click()
    page.fill("#judge-text", "Incorrect! The correct answer is Ostia.")
    page.get_by_role("button", name="Save the judgement").click()
    page.locator("#inspect-body .told-text", has_text="Incorrect!").wait_for()
    told = watched.server.get(f"/olympus/history/{ports['Rome']}")
    assert (told["score"], told["feedback"]) == (-1, "Incorrect! The correct answer is Ostia.")

    page.locator(".correct-box summary").click()
    assert "ports_v0001 learned from it and becomes stale" in page.locator(".correct-box .hint").inner_text()
    page.get_by_role("button", name="Put it right").click()
    page.get_by_text("Nothing is different yet.").wait_for()
    page.fill("#correct-action", "Ostia")
    page.get_by_role("button", name="Put it right").click()
    page.get_by_text("ports_v0001 is stale now").wait_for()  # first: this message goes away by itself
    page.locator("#inspect-body").get_by_text(f"#{ports['Rome']}, which was forgotten").wait_for()
    assert "Ostia" in page.locator("#inspect-body .told-text").nth(1).inner_text()
    assert watched.server.get("/olympus/cartridges/ports_v0001")["stale"]

    new = int(page.locator("#inspect-id").inner_text().removeprefix("#"))
    page.get_by_role("button", name="Delete").click()
    assert "No cartridge learned from it" in page.locator("dialog[open]").inner_text()
    page.locator("dialog[open]").get_by_role("button", name="Cancel").click()
    assert watched.server.get(f"/olympus/history/{new}")["action"] == "Ostia"
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog[open]").get_by_role("button", name="Delete").click()
    page.get_by_text("It was deleted.").wait_for()
    assert watched.server.json("GET", f"/olympus/history/{new}", 404)["code"] == "experience_not_found"
    watched.until("![...document.querySelectorAll('#experiences .said')].some((e) => e.textContent.includes('Rome'))")


def test_what_is_asked_while_the_page_loads_is_not_lost(watched: Watched, ports: dict[str, int]) -> None:
    held: list[Any] = []
    free: list[bool] = []
    watched.page.route("**/olympus/history/domains", lambda route: route.continue_() if free else held.append(route))
    page = watched.open("/memory")
    page.fill("#search-q", "Athens")
    page.keyboard.press("Enter")
    page.locator("#browse-count").get_by_text("found, by words").wait_for()
    free.append(True)
    for route in held:
        route.continue_()
    watched.until("[...document.getElementById('search-domain').options].some((o) => o.value === 'ports')")
    page.wait_for_timeout(500)
    assert page.input_value("#search-q") == "Athens"
    assert "found, by words" in page.locator("#browse-count").inner_text()
    assert "q=Athens" in watched.address()


def test_deleting_says_which_cartridges_become_stale(watched: Watched, ports: dict[str, int]) -> None:
    page = watched.open(f"/memory?id={ports['Athens']}")
    page.locator(".learners").get_by_text("ports_v0001").wait_for()
    page.get_by_role("button", name="Delete").click()
    said = page.locator("dialog[open]").inner_text()
    assert re.search("learned from it and becomes? stale|are stale already", said)
    page.keyboard.press("Escape")
    watched.expected.append("404")  # the browser's own line
    watched.open("/memory?id=999999999")
    page.get_by_text("#999999999 does not exist, or it was deleted.").wait_for()


def test_browse_by_domain_and_page(watched: Watched) -> None:
    numbers = range(40)
    for number in numbers:
        body = {
            "domain": "numbers",
            "observation": f"number {number}",
            "action": "noted",
            "session_id": f"s{number % 2}",
        }
        watched.server.post("/olympus/history", body)
    page = watched.open("/memory")
    watched.until("[...document.getElementById('search-domain').options].some((o) => o.value === 'numbers')")
    page.select_option("#search-domain", "numbers")
    page.locator("#browse-count").get_by_text("1 to 15 of 40").wait_for()
    assert _lines(page)[0] == "number 39"
    page.get_by_role("button", name="Older").click()
    page.locator("#browse-count").get_by_text("16 to 30 of 40").wait_for()
    page.get_by_role("button", name="Older").click()
    page.locator("#browse-count").get_by_text("31 to 40 of 40").wait_for()
    assert page.get_by_role("button", name="Older").is_disabled()
    page.get_by_role("button", name="Newer").click()
    page.locator("#browse-count").get_by_text("16 to 30 of 40").wait_for()
    page.select_option("#search-session", "s1")
    page.locator("#browse-count").get_by_text(re.compile("^1 to 15,")).wait_for()
    assert all(int(line.split()[1]) % 2 == 1 for line in _lines(page))
    assert "domain=numbers" in watched.address()
    assert "session=s1" in watched.address()
    page.reload()
    page.locator("#browse-count").get_by_text(re.compile("^1 to 15,")).wait_for()
    watched.until_live()
    page.select_option("#search-session", "")
    body = {"domain": "numbers", "observation": "number 40", "action": "noted"}
    watched.server.post("/olympus/history", body)
    watched.until("document.querySelector('#experiences .said')?.textContent === 'number 40'")  # by the stream alone


def test_without_the_episodic_memory_it_says_so_and_browses(watched: Watched, ports: dict[str, int]) -> None:
    problem = {"status": 409, "code": "memory_disabled", "detail": "the episodic memory is switched off"}
    answer = {"status": 409, "content_type": "application/problem+json", "body": json.dumps(problem)}
    watched.page.route("**/olympus/memory/*", lambda route: route.fulfill(**answer))
    watched.expected.append("409")  # the browser's own line
    page = watched.open("/memory?domain=ports")
    page.get_by_text("The search is switched off on this server").wait_for()
    page.fill("#search-q", "Athens")
    page.keyboard.press("Enter")
    page.locator("#browse-notice").get_by_text("Search is switched off").wait_for()
    page.locator("#experiences .said").nth(2).wait_for()


def test_what_a_cartridge_was_trained_on(watched: Watched, ports: dict[str, int]) -> None:
    page = watched.open("/memory?cartridge=ports_v0001")
    page.locator("#browse-count").get_by_text("that it was trained on").wait_for()
    shown = {int(line.inner_text().split()[0].removeprefix("#")) for line in page.locator(".about").all()}
    assert shown <= set(ports.values())
    assert ports["Rome"] not in shown, "it was corrected, so it is forgotten"
    page.locator("#browse-notice").get_by_text("forgotten since: it is stale").wait_for()
    assert page.locator("#search-domain").is_disabled()
    page.focus("#search-cartridge")
    page.keyboard.press("Home")  # any or none
    watched.until("!document.getElementById('search-domain').disabled && !location.search.includes('cartridge')")


def test_forgetting_a_conversation_says_first_what_it_reaches(watched: Watched, ports: dict[str, int]) -> None:
    for number in range(3):
        body = {"domain": "gossip", "observation": f"rumour {number}", "action": "noted", "session_id": "tavern"}
        watched.server.post("/olympus/history", body)
    page = watched.open("/memory")
    watched.until("[...document.getElementById('forget-domain').options].some((o) => o.value === 'ports')")
    assert page.locator("#forget-start").is_disabled()
    page.select_option("#forget-domain", "ports")
    preview = page.locator("#forget-preview")
    preview.get_by_text("would be gone for good").wait_for()
    assert re.search(r"ports_v0001 learned from \d of them, of \d in all; stale already", preview.inner_text())

    watched.tab_to("#forget-domain")
    page.keyboard.type("gossip")
    page.locator("#forget-start").get_by_text("Forget 3 experiences").wait_for()
    preview.get_by_text("No cartridge learned from them.").wait_for()
    watched.tab_to("#forget-start")
    page.keyboard.press("Enter")
    assert "the domain gossip" in page.locator("dialog[open]").inner_text()
    watched.tab_to("dialog[open] button[value=yes]")
    page.keyboard.press("Enter")
    page.get_by_text("3 experiences were forgotten.").wait_for()
    assert watched.server.get("/olympus/history?domain=gossip")["experiences"] == []
    line = watched.server.get("/olympus/audit?action=history.delete&limit=1")["entries"][0]
    assert line["detail"] == {"domain": "gossip", "count": 3}
    watched.until("document.activeElement.id === 'forget-domain'")


def test_out_as_a_file_and_in_again(watched: Watched, ports: dict[str, int], tmp_path: Path) -> None:
    page = watched.open("/memory")
    watched.until("[...document.getElementById('export-domain').options].some((o) => o.value === 'ports')")
    page.select_option("#export-domain", "ports")
    with page.expect_download() as download:
        page.locator("#export-link").click()
    file = tmp_path / "ports.jsonl"
    download.value.save_as(file)
    assert download.value.suggested_filename == "memory_ports.jsonl"
    assert "Piraeus" in file.read_text()
    file.write_text(file.read_text().replace("Sparta", "Mistras") + "not a line\n")
    page.set_input_files("#import-file", str(file))
    page.get_by_role("button", name="Import").click()
    told = page.locator("#import-result")
    told.get_by_text("1 experience was added").wait_for()
    assert "known already" in told.inner_text()
    assert "1 that cannot be used" in told.inner_text()
    assert re.search(r"Line \d+: ", told.inner_text())
    _until_found(watched.server, "Mistras")
    page.fill("#search-q", "Mistras")
    page.keyboard.press("Enter")
    watched.until("document.querySelector('#experiences .said')?.textContent.includes('Mistras')")


def test_by_keyboard(watched: Watched, ports: dict[str, int]) -> None:
    page = watched.open("/memory?domain=ports")
    page.locator(".experience").first.wait_for()
    page.focus("#search-q")
    page.keyboard.type("Athens")
    page.keyboard.press("Enter")
    watched.until("document.getElementById('browse-count').textContent.includes('found')")
    for _ in range(6):  # search, four filters, the first experience
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#inspect-body").wait_for()
    watched.until("document.activeElement.id === 'inspector'")
    assert page.locator(".experience[aria-pressed=true]").count() == 1


def test_frame_and_barriers(watched: Watched, ports: dict[str, int], axe: str) -> None:
    page = watched.open(f"/memory?domain=ports&id={ports['Athens']}", height=1060)
    watched.until_live()
    page.wait_for_timeout(500)
    watched.save("memory")
    page.locator(".correct-box summary").click()
    watched.check_everywhere(axe)
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog[open]").wait_for()
    watched.settle()
    watched.check_barriers(axe)
    page.keyboard.press("Escape")
