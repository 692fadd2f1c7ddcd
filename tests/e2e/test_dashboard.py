"""The dashboard in a real browser on the real server: what each page is for, and that it stays in its frame.

Also takes the screenshots of docs/images/. Tests run in file order and share one server: first light (an empty
installation), then a chat, then a kernel, then the pictures of all that.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from playwright.sync_api import TimeoutError

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]
# Enough held-out bytes that Phi can be measured (1,280 state pairs), few enough to learn in seconds.
TOPICS = {
    "delivery": ["parcel", "package", "letter", "shipment", "courier", "box", "order", "delivery", "crate"],
    "payment": ["invoice", "card", "refund", "bill", "receipt", "charge", "fee", "transfer", "balance"],
    "account": ["password", "login", "profile", "username", "email", "settings", "photo", "address", "phone"],
}
FORMS = [
    "where is my {}?",
    "I need help with the {}, please",
    "the {} is wrong, can you look at it?",
    "I lost my {} yesterday",
    "a question about a {}",
    "who can see my {}?",
    "why did the {} change?",
    "how do I cancel the {}?",
    "is my {} safe with you?",
    "nobody answers me about the {}",
    "can I have a second {}?",
    "what happened to the {} of my wife?",
]
PAIRS = [f"{form.format(word)} => {topic}" for topic, words in TOPICS.items() for word in words for form in FORMS]


def _kernel_path(server: Any) -> str:
    kernel = next(item for item in server.get("/olympus/kernels")["kernels"] if item["domain"] == "support")
    return f"/kernels/{kernel['kernel_id']}"


def test_overview_explains_an_empty_installation(watched):
    page = watched.open("/")
    page.locator("#first-steps").wait_for()
    watched.until("document.getElementById('bulletin-title').textContent.includes('is ready')")
    assert page.locator(".steps > li").count() == 3
    assert watched.server.url in page.locator("#curl-command").inner_text()
    watched.until_live()
    page.locator("#checks li").nth(2).wait_for()
    assert page.locator("h1").count() == 1
    assert page.locator("main, header, footer, nav").count() == 4
    page.wait_for_timeout(800)
    watched.save("first-run")


def test_chat_streams_an_answer_that_becomes_an_experience(watched):
    page = watched.open("/chat")
    page.locator(".parameters summary").click()
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "48")
    page.locator(".parameters summary").click()
    page.evaluate(
        """() => {
          window.lengths = [];
          new MutationObserver(() => {
            const body = document.querySelector('.turn[data-role=assistant] .turn-body');
            if (body) window.lengths.push(body.textContent.length);
          }).observe(document.getElementById('transcript'), {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.fill("#prompt", "What is the capital of France?")
    page.keyboard.press("Enter")
    answer = page.locator(".turn[data-role=assistant]")
    answer.locator(".became").wait_for(timeout=90_000)
    assert "Paris" in answer.locator(".turn-body").inner_text()
    # Nothing, some of it, all of it: how much more a browser draws between is a matter of speed.
    assert len(set(page.evaluate("window.lengths"))) > 2, "the answer came in one piece"
    assert re.search(r"[\d.]+ tokens/s", answer.locator(".turn-foot").inner_text())
    number = int(re.search(r"#(\d+)", answer.locator(".became").inner_text()).group(1))
    assert any(item["id"] == number for item in watched.server.get("/olympus/history?limit=5")["experiences"])

    answer.get_by_role("button", name="Good answer").click()
    page.wait_for_selector("[aria-label='Good answer'][aria-pressed=true]")
    page.locator("#sessions a[aria-current]").wait_for()

    page.reload()
    answer.locator(".became").wait_for()
    assert "Paris" in answer.locator(".turn-body").inner_text()
    assert page.locator("[aria-label='Good answer']").get_attribute("aria-pressed") == "true"


def test_stop_ends_an_answer(watched):
    page = watched.open("/chat")
    turns = "document.querySelectorAll('.turn[data-role=assistant] .turn-body')"
    for asked in range(1, 5):  # a small model may end by itself before anybody can stop it
        page.fill("#prompt", "Tell a very long story about a ship and its crew, with many chapters.")
        page.keyboard.press("Enter")
        watched.until(f"{turns}.length === {asked} && {turns}[{asked - 1}].textContent.length > 10", 60)
        with contextlib.suppress(TimeoutError):
            page.locator("#stop").click(timeout=10_000)
        page.locator("#send").wait_for(timeout=90_000)
        answer = page.locator(".turn[data-role=assistant]").last
        if "stopped by you" in answer.locator(".turn-foot").inner_text():
            break
    written = answer.locator(".turn-body").inner_text()
    page.wait_for_timeout(1000)
    assert answer.locator(".turn-body").inner_text() == written
    assert "stopped by you" in answer.locator(".turn-foot").inner_text()


def test_spawn_a_kernel_and_watch_it_learn(watched):
    page = watched.open("/kernels")
    page.fill("#spawn-domain", "support")
    page.fill("#spawn-name", "apollo")
    page.check("input[name=preset][value=nano]", force=True)
    page.fill("#spawn-data", "\n".join(PAIRS))
    watched.until(f"document.getElementById('spawn-data-count').textContent === '{len(PAIRS)} examples'")
    page.get_by_role("button", name="Spawn").click()
    page.wait_for_url("**/kernels/apollo-*")
    page.locator("#loss-chart canvas").wait_for(timeout=120_000)
    # The page is never reloaded: the step count grows by the stream alone.
    summary = "document.getElementById('loss-summary').textContent"
    steps = f"Number({summary}.match(/over ([\\d,]+) steps/)?.[1].replace(',', '') ?? 0)"
    first = page.evaluate(steps)
    watched.until(f"{steps} > {first + 20}", 120)
    watched.until(f"{summary}.includes('against')", 120)
    conditions = page.locator("#conditions > li")
    conditions.nth(4).wait_for()  # they come with the next look at the state
    assert conditions.count() == 5
    for line in conditions.all():  # each with its mark, its number or why there is none, what it asks for, and why
        assert line.locator(".condition-mark").get_attribute("data-met") in ("true", "false", "null")
        assert line.locator(".condition-number").inner_text().strip()
        assert len(line.locator(".why").inner_text()) > 10
    assert "above 0.7" in conditions.nth(1).inner_text()
    page.locator("#loss-scale").click()
    page.locator("#loss-chart canvas").wait_for()
    page.locator("#loss-scale").click()
    page.locator("#loss-chart + .chart-summary + details summary").click()
    page.locator("#loss-table tbody tr").nth(1).wait_for()

    page.fill("#query-input", "where is my parcel?")
    page.fill("#query-candidates", "delivery\npayment\naccount")
    page.get_by_role("button", name="Ask").click()
    page.locator(".ranked li").nth(2).wait_for(timeout=30_000)


def test_bad_examples_are_refused_with_the_line(watched):
    page = watched.open("/kernels")
    page.fill("#spawn-domain", "broken")
    page.fill("#spawn-data", "good => fine\nthis line has none")
    page.get_by_role("button", name="Spawn").click()
    page.locator("#spawn-error:not([hidden])").wait_for()
    assert "line 2 has no =>" in page.locator("#spawn-error").inner_text()


def test_delete_asks_first(watched):
    made = watched.server.post("/olympus/kernels/spawn", {"name": "hermes", "domain": "short-lived"})
    page = watched.open(f"/kernels/{made['kernel']['kernel_id']}")
    page.get_by_role("button", name="Delete").first.click()
    page.get_by_role("button", name="Keep it").click()
    page.locator("dialog[open]").wait_for(state="detached")
    page.get_by_role("button", name="Delete").first.click()
    page.locator("dialog button[value=delete]").click()
    page.wait_for_url("**/kernels")
    page.locator("#kernel-table tbody th").first.wait_for()
    assert "hermes" not in page.locator("#kernel-table").inner_text()


def test_theme_is_kept_without_a_flash(watched):
    page = watched.open("/")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme-toggle").click()
    page.locator("#theme-toggle").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.goto(watched.server.url + "/kernels", wait_until="commit")
    page.wait_for_selector("body")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("path", ["/", "/chat", "/kernels", "kernel", "/login"])
def test_frame_and_barriers(watched, axe, path):
    watched.open(_kernel_path(watched.server) if path == "kernel" else path)
    if path != "/login":
        watched.until_live()
    watched.page.wait_for_timeout(700)
    watched.check_everywhere(axe)


def test_spawn_by_keyboard_from_the_example(watched):
    page = watched.open("/")
    page.locator("h1").wait_for()
    watched.tab_to("a[href='/kernels']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/kernels")
    page.locator("#spawn-form").wait_for()
    watched.tab_to("#spawn-name")
    page.keyboard.type("artemis")
    watched.tab_to("#spawn-example")
    page.keyboard.press("Enter")
    watched.until("document.getElementById('spawn-data-count').textContent === '324 examples'")
    assert page.input_value("#spawn-domain") == "support"
    watched.tab_to("#spawn-form button[type=submit]")
    page.keyboard.press("Enter")
    page.wait_for_url("**/kernels/artemis-*")
    summary = "document.getElementById('loss-summary').textContent"
    watched.until(f"/over [0-9,]+ steps/.test({summary})", 120)
    watched.tab_to("#query-input")
    page.keyboard.type("where is my parcel?")
    watched.tab_to("#query-candidates")
    page.keyboard.type("delivery\npayment")
    watched.tab_to("#query-form button")
    page.keyboard.press("Enter")
    page.locator(".ranked li").nth(1).wait_for(timeout=30_000)
    watched.tab_to("#kernel-actions button:last-child", key="Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    watched.tab_to("button[value=delete]")
    page.keyboard.press("Enter")
    page.wait_for_url("**/kernels")


def test_an_unknown_kernel_says_so(watched):
    watched.open("/kernels/nobody-000000")
    watched.until("/no such kernel/i.test(document.body.textContent)")
    # The browser itself logs 404 answers; they are the point here.
    watched.expected.append("404")


def _has_learned(server: Any) -> bool:
    kernel = next(item for item in server.get("/olympus/kernels")["kernels"] if item["domain"] == "support")
    measured = None not in (kernel["holdout_loss"], kernel["baseline_loss"])
    return measured and kernel["holdout_loss"] < kernel["baseline_loss"] and kernel["step"] >= 200


@pytest.mark.timeout(900)
def test_screenshots(watched):
    session = next(s for s in watched.server.get("/olympus/sessions")["sessions"] if "capital" in s["title"])
    page = watched.open(f"/chat?session={session['id']}")
    page.locator(".became").first.wait_for()
    page.locator(".parameters summary").click()
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "160")
    page.locator(".parameters summary").click()
    page.fill("#prompt", "Name three things to see there, as a list.")
    page.keyboard.press("Enter")
    page.locator(".became").nth(1).wait_for(timeout=180_000)
    page.wait_for_timeout(500)
    watched.save("chat")
    page = watched.open(f"/chat?session={session['id']}", width=360, height=740)
    page.locator(".became").nth(1).wait_for()
    page.wait_for_timeout(800)
    watched.save("chat-360")

    watched.server.wait_until(lambda: _has_learned(watched.server), 240, "a kernel below its baseline")
    for name, scheme in (("kernel", "light"), ("kernel-dark", "dark")):
        page = watched.open(_kernel_path(watched.server), height=1220, scheme=scheme)
        page.locator("#loss-chart canvas").wait_for()
        page.wait_for_timeout(1500)
        watched.save(name)
    page = watched.open("/", height=1100)
    page.locator("#kernel-table tbody th").first.wait_for()
    page.locator(".sky .trail").first.wait_for(state="attached")
    watched.until_live()
    page.wait_for_timeout(2500)
    watched.save("overview")
    watched.open("/login", height=700).locator("form").wait_for()
    watched.save("login")
