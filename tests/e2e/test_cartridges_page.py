"""The page of the cartridges in a real browser: distil, watch, decide, ask. A tiny model's server, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Dashboard, Watched

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

WORDS = ["parcel", "letter", "card", "refund", "password", "login"]
FORMS = ["where is my {}?", "I need help with the {}", "the {} is wrong", "I lost my {}"]
LABELS = {"parcel": "post", "letter": "post", "card": "bank", "refund": "bank", "password": "door", "login": "door"}
EXPERIENCES = [(form.format(word), LABELS[word]) for word in WORDS for form in FORMS]


@pytest.fixture
def server(tiny_server: Dashboard) -> Dashboard:
    return tiny_server


def _live_through(server: Dashboard, domain: str = "support") -> None:
    for observation, action in EXPERIENCES:
        body = {"domain": domain, "observation": observation, "action": action, "feedback": "Correct!", "score": 1}
        server.post("/olympus/history", body)


def _note_metrics(response: Any, fetched: list[tuple[int, int]]) -> None:
    if since := re.search(r"/metrics\?since=(\d+)", response.url):
        fetched.append((int(since[1]), response.json()["next"]))


def _bring(server: Dashboard, known: str, domain: str) -> str:
    """A candidate of ``domain``: the cartridge ``known`` out and in again."""
    file = server.client.get(f"/olympus/cartridges/{known}/export").content
    headers = {"Content-Type": "application/zip", "Origin": server.url}
    path = f"/olympus/cartridges/import?domain={domain}"
    made: dict[str, Any] = server.json("POST", path, 201, content=file, headers=headers)
    return str(made["id"])


def _confirm(page: Any, action: str, reason: str | None = None) -> None:
    dialog = page.locator("dialog[open]")
    if reason is not None:
        dialog.locator("input").fill(reason)
    dialog.get_by_role("button", name=action, exact=True).click()
    dialog.wait_for(state="detached")


def _row(page: Any, cartridge: str) -> Any:
    return page.locator(f"#lineage-table tr[data-key='{cartridge}']")


def test_an_empty_page_explains_itself(watched: Watched) -> None:
    page = watched.open("/cartridges")
    page.locator("#first-steps").wait_for()
    assert page.locator(".steps > li").count() == 3
    assert page.locator("#distil-start").is_disabled()
    assert "Nothing has been lived through" in page.locator("#distil-domain-hint").inner_text()
    assert not page.locator("#domain-view").is_visible()
    assert page.locator("nav a[aria-current=page]").inner_text() == "Cartridges"


def test_distil_watch_and_ask(watched: Watched) -> None:
    page = watched.open("/cartridges")
    watched.until_live()
    _live_through(watched.server)  # the page hears of it and offers the domain
    watched.until("document.getElementById('distil-domain').value === 'support'")
    fetched: list[tuple[int, int]] = []  # where each request for metrics began, and where its answer ended
    page.on("response", lambda response: _note_metrics(response, fetched))
    page.get_by_role("button", name="Distil", exact=True).click()
    assert "gives way to chats" in page.locator("dialog[open]").inner_text()
    _confirm(page, "Distil")
    page.locator("#run-state").get_by_text(re.compile("queued|running")).wait_for()
    page.locator("#run-chart canvas").wait_for(timeout=120_000)
    page.locator("#run-state").get_by_text("promoted").wait_for(timeout=120_000)

    assert page.locator("#run-stages li[data-is=done]").count() == 4
    assert "support_v0001 passed" in page.locator("#run-verdict .notice").inner_text()
    assert "right answers cost" in page.locator(".gate-words").inner_text()
    arms = page.locator(".arms-table tbody tr")
    assert [row.get_attribute("data-arm") for row in arms.all()] == ["cartridge", "long_prompt", "memoryless"]
    assert "16 slots" in arms.first.inner_text()
    plots = page.locator(".plots .plot")
    assert [plot.locator("strong").inner_text() for plot in plots.all()][-1] == "Attended tokens"
    assert all(plot.locator(".plot-reference").count() == 3 for plot in plots.all()), "against the long prompt"
    assert "The long prompt" in plots.first.get_attribute("aria-label")
    compared = page.locator(".gate-plot")
    assert compared.count() == 3
    assert "Allowed is below 0" in compared.last.inner_text()
    assert "of training left" not in page.locator("#run-detail").inner_text()
    watched.until(
        "/Best on what is held out: [\\d.]+ at step \\d+/.test(document.getElementById('run-summary').textContent)"
    )
    for _ in range(300):  # the answers are told to this process a moment after the page has them
        if fetched and fetched[-1][1] > 0:
            break
        page.wait_for_timeout(100)
    began, ended = [first for first, _ in fetched], [last for _, last in fetched]
    assert began == [0, *ended[:-1]], "each request goes on where the last one ended"
    assert ended[-1] > 0
    page.locator("#run-twin summary").click()
    page.locator("#run-table tbody tr").nth(20).wait_for()

    _row(page, "support_v0001").get_by_text("serving").wait_for()
    learned = _row(page, "support_v0001").locator("[data-label='Learned from'] a")
    assert learned.get_attribute("href") == "/memory?cartridge=support_v0001"
    assert "support_v0001" in page.locator("#serving-table").inner_text()
    assert page.locator("#triggers li").count() == 5
    page.fill("#try-question", "where is my parcel?")
    page.get_by_role("button", name="Ask with and without").click()
    page.locator(".try-answers article").nth(1).get_by_text("written in").wait_for()
    with_it, without = page.locator(".try-answers article").all()
    assert "and 16 slots" in with_it.inner_text()
    assert "slots" not in without.inner_text()
    assert with_it.locator(".try-text").inner_text() != without.locator(".try-text").inner_text()

    page.get_by_role("link", name="Chat with it").click()
    page.wait_for_url("**/chat?*")
    page.locator(".parameters summary").click()
    assert page.input_value("#domain") == "support"
    assert page.input_value("#cartridge") == "of the domain"
    page.fill("#max-tokens", "8")
    page.fill("#prompt", "where is my letter?")
    page.keyboard.press("Enter")
    page.locator(".turn-foot").get_by_text("remembered with support_v0001").wait_for(timeout=60_000)


def test_decisions_ask_first_and_are_told_live(watched: Watched, tmp_path: Path) -> None:
    better = _bring(watched.server, "support_v0001", "support")
    worse = _bring(watched.server, "support_v0001", "support")
    page = watched.open("/cartridges?domain=support")
    watched.until_live()
    page.get_by_role("button", name=f"Reject {worse}").click()
    page.locator("dialog[open]").get_by_role("button", name="Reject", exact=True).click()
    assert page.locator("dialog[open]").count() == 1, "a reason is needed"
    _confirm(page, "Reject", "forgets the letters")
    _row(page, worse).get_by_text("forgets the letters").wait_for()

    page.get_by_role("button", name=f"Promote {better}").click()
    page.locator("dialog[open]").get_by_role("button", name="Cancel").click()
    assert _row(page, better).get_attribute("data-state") == "candidate"
    page.get_by_role("button", name=f"Promote {better}").click()
    _confirm(page, "Promote", "by hand")
    page.locator("#domain-state").get_by_text(better).wait_for()
    page.locator("#domain-actions").get_by_role("button", name="Roll back").click()
    _confirm(page, "Roll back")
    page.locator("#domain-state").get_by_text("support_v0001").wait_for()

    page.get_by_role("button", name=f"Delete {worse}").click()
    _confirm(page, "Delete")
    _row(page, worse).get_by_text("its numbers are gone").wait_for()
    # Somebody else retires it: the page hears of that.
    watched.server.json("POST", "/olympus/cartridges/support_v0001/retire", headers={"Origin": watched.server.url})
    page.locator("#domain-state").get_by_text("nothing serves").wait_for()
    page.get_by_role("button", name="Promote support_v0001").click()
    _confirm(page, "Promote")
    page.locator("#domain-state").get_by_text("support_v0001").wait_for()

    row = _row(page, "support_v0001")
    row.locator("summary").click()
    for name, start in (("ours", b"PK"), ("PEFT", b"PK"), ("Tokasaurus", b"PK")):
        with page.expect_download() as download:
            row.get_by_role("link", name=name).click()
        saved = tmp_path / name
        download.value.save_as(saved)
        assert saved.read_bytes().startswith(start), name


def test_a_run_can_be_cancelled(watched: Watched) -> None:
    long = {"training": {"max_steps": 100_000, "early_stop_patience": 0}}
    made = watched.server.post("/olympus/distillation/runs", {"domain": "support", "config": long})
    page = watched.open(f"/cartridges?domain=support&run={made['id']}")
    page.locator("#run-stages li[data-is=current]").get_by_text("Train").wait_for(timeout=60_000)
    watched.until("/about .+ of training left/.test(document.getElementById('run-detail').textContent)")
    assert 0 < int(page.locator("#run-meter").get_attribute("aria-valuenow")) < 100
    page.locator("#run-cancel").click()
    _confirm(page, "Cancel the run")
    page.locator("#run-state").get_by_text("cancelled").wait_for(timeout=60_000)
    page.locator("#runs a").nth(1).click()  # the run before, without loading the page again
    page.locator("#run-state").get_by_text("promoted").wait_for()
    assert made["id"] not in watched.address()
    page.go_back()
    page.locator("#run-state").get_by_text("cancelled").wait_for()


def test_by_keyboard(watched: Watched) -> None:
    page = watched.open("/cartridges?domain=support")
    page.locator("#distil-presets label").first.wait_for()  # until then nothing is known, and the form is empty
    watched.until("!document.getElementById('distil-start').disabled")
    page.focus("#distil-domain")
    for _ in range(2):  # the presets are one stop
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "distil-start"
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "distil-start"
    page.focus("#serving-table a")
    page.keyboard.press("Enter")
    page.locator("#domain-title").wait_for()


def test_frame_and_barriers(watched: Watched, axe: str) -> None:
    page = watched.open("/cartridges?domain=support")
    watched.until_live()
    page.locator("#lineage-table tbody th").first.wait_for()
    page.locator("#runs a").last.click()
    page.locator("#run-chart canvas").wait_for()
    page.locator("#run-twin summary").click()
    watched.check_everywhere(axe)
    page.get_by_role("button", name="Retire support_v0001").click()
    page.locator("dialog[open]").wait_for()
    watched.settle()
    watched.check_barriers(axe)
    page.keyboard.press("Escape")
