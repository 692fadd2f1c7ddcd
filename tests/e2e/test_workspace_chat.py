"""The chat with the workspace in a real browser: with and without side by side, inside an answer, attached memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.conftest import Watched

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"


@pytest.fixture
def chat(watched: Watched) -> Any:
    """The chat with short answers, the likeliest token each."""
    page = watched.open("/chat")
    page.locator(".parameters summary").click()
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "24")
    page.locator(".parameters summary").click()
    yield page
    page.evaluate("sessionStorage.clear()")


def _ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def test_the_same_prompt_with_and_without(watched: Watched, chat: Any) -> None:
    before = watched.server.get("/olympus/status")["history"]["count"]
    chat.locator("#compare").check()
    assert chat.is_checked("#workspace"), "something has to differ"
    assert "Asked twice" in chat.locator("#becomes").inner_text()
    _ask(chat, QUESTION)
    chat.locator(".pair-table").wait_for(timeout=120_000)
    sides = chat.locator(".pair .turn").all()
    assert all("Paris" in side.locator(".turn-body").inner_text() for side in sides)
    assert "became experience" in sides[0].inner_text()
    assert "not written down" in sides[1].inner_text()
    assert watched.server.get("/olympus/status")["history"]["count"] == before + 1
    rows = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in chat.locator(".pair-table tbody tr").all()
    }
    assert {"Prompt tokens", "First token after", "Tokens per second", "Virtual tokens, all layers"} <= rows.keys()
    assert int(rows["Virtual tokens, all layers"][0]) > 0
    assert rows["Virtual tokens, all layers"][1] == "0"
    sentence = chat.locator(".pair-sentence").inner_text()
    difference = int(rows["Prompt tokens"][1]) - int(rows["Prompt tokens"][0])
    assert (str(abs(difference)) if difference else "No prompt token saved") in sentence

    chat.locator(".inside summary").first.click()
    strip = chat.locator(".strip")
    tokens = int(strip.get_attribute("aria-valuemax"))
    assert tokens >= 5
    layers = watched.server.get("/olympus/status")["workspace"]["layers"]
    shown = chat.locator(".bar-table").first.locator("tbody th").all_inner_texts()
    assert shown == [str(layer) for layer in layers]
    assert chat.locator(".bar-table").nth(1).locator("tbody tr").count() == 8
    chat.locator(".trace .twin summary").click()
    chat.locator(".trace tbody tr").nth(tokens - 1).wait_for()
    assert chat.locator(".trace tbody tr").count() == tokens
    words = "".join(chat.locator(".trace tbody th").all_inner_texts())
    assert "Paris" in words

    chat.get_by_role("button", name="Answer again").click()  # both sides again, in place of the last ones
    chat.locator(".pair-table").wait_for(timeout=120_000)
    assert chat.locator(".pair").count() == 1


def test_by_keyboard(watched: Watched, chat: Any) -> None:
    chat.focus("#prompt")
    watched.tab_to("#compare")
    chat.keyboard.press("Space")
    watched.tab_to("#prompt", key="Shift+Tab")
    chat.keyboard.type("Say hello.")
    chat.keyboard.press("Enter")
    chat.locator(".pair-table").wait_for(timeout=120_000)
    watched.tab_to(".inside > summary", key="Shift+Tab")
    chat.keyboard.press("Enter")
    watched.tab_to(".strip")
    chat.keyboard.press("Home")
    first = chat.locator(".strip").get_attribute("aria-valuetext")
    chat.keyboard.press("ArrowRight")
    assert chat.locator(".strip").get_attribute("aria-valuenow") == "2"
    assert chat.locator(".strip").get_attribute("aria-valuetext") != first
    assert re.search(r"2\. .+entropy [\d.]+", chat.locator(".strip-told").inner_text())


def test_attached_memory_is_in_the_prompt(watched: Watched, chat: Any) -> None:
    body = {"domain": "general", "observation": "What is the harbour master called?", "action": "He is called Theron."}
    known = watched.server.post("/olympus/history", body)["id"]
    # The search follows the history in a thread of its own, and the dialog asks it once.
    found = "/olympus/memory/search?q=harbour+master"
    watched.server.wait_until(
        lambda: known in [item["id"] for item in watched.server.get(found)["results"]], 60, "the answer in the search"
    )
    chat.get_by_role("button", name="Attach memory").click()
    chat.fill("#attach-query", "harbour master")
    chat.keyboard.press("Enter")
    chat.get_by_role("button", name=f"Attach #{known}").click()
    chat.get_by_role("button", name="Done").click()
    assert f"#{known}" in chat.locator("#attached").inner_text()
    chat.locator("#compare").check()
    with chat.expect_request("**/v1/chat/completions") as asked:
        _ask(chat, "What is the harbour master called?")
    system = asked.value.post_data_json["messages"][0]
    assert system["role"] == "system"
    assert "Theron" in system["content"]
    chat.locator(".pair-table").wait_for(timeout=120_000)
    assert "with one attachment" in chat.locator(".pair").get_attribute("aria-label")
    assert re.search(r"\d+ prompt tokens more", chat.locator(".pair-sentence").inner_text())
    chat.get_by_role("button", name=f"Detach #{known}").click()
    assert chat.locator("#attached").is_hidden()


def test_stop_ends_both(watched: Watched, chat: Any) -> None:
    chat.locator(".parameters summary").click()
    chat.fill("#max-tokens", "400")
    chat.locator(".parameters summary").click()
    chat.locator("#compare").check()
    _ask(chat, "Tell a very long story about a ship and its crew, with many chapters.")
    watched.until("document.querySelector('.pair .turn-body')?.textContent.length > 10", 60)
    chat.keyboard.press("Escape")
    chat.locator("#send").wait_for(timeout=60_000)
    assert "stopped by you" in chat.locator(".pair .turn").first.inner_text()
    assert "stopped before the first word" in chat.locator(".pair .turn").nth(1).inner_text()


def test_a_conversation_can_be_deleted(watched: Watched, chat: Any) -> None:
    _ask(chat, "Remember nothing of this.")
    chat.locator(".became").wait_for(timeout=120_000)
    session = watched.address().split("session=")[1]
    chat.locator("#forget-chat").click()
    chat.locator("dialog[open]").get_by_role("button", name="Delete").click()
    chat.get_by_text("1 experience was deleted.").wait_for()
    assert "session=" not in watched.address()
    assert session not in [item["id"] for item in watched.server.get("/olympus/sessions")["sessions"]]


def test_frame_and_barriers(watched: Watched, chat: Any, axe: str) -> None:
    chat.locator("#compare").check()
    _ask(chat, QUESTION)
    chat.locator(".pair-table").wait_for(timeout=120_000)
    chat.locator(".inside summary").first.click()
    chat.locator(".trace .twin summary").click()
    watched.check_everywhere(axe)
    chat.get_by_role("button", name="Attach memory").click()
    chat.fill("#attach-query", "capital")
    chat.keyboard.press("Enter")
    chat.locator("#attach-results li").first.wait_for()
    watched.check_everywhere(axe)


def test_picture(watched: Watched, chat: Any) -> None:
    chat.locator(".parameters summary").click()
    chat.fill("#max-tokens", "90")
    chat.fill("#temperature", "")  # always the likeliest token makes a small model repeat itself
    chat.fill("#domain", "tour")  # where nothing was said yet that could come to mind
    chat.locator(".parameters summary").click()
    chat.locator("#compare").check()
    chat.set_viewport_size({"width": 1440, "height": 1280})
    _ask(chat, "Write four sentences about a lighthouse and its keeper.")
    chat.locator(".pair-table").wait_for(timeout=120_000)
    chat.locator(".inside summary").first.click()
    chat.wait_for_timeout(700)
    chat.locator("#transcript").evaluate("(box) => { box.scrollTop = 0; }")
    chat.wait_for_timeout(200)
    watched.save("chat-compare")
