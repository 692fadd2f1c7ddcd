"""System, scheduler, settings and audit log in a real browser, every journey by keyboard alone. In file order."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.conftest import Dashboard, Watched

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

PORTS = {"Athens": "Piraeus", "Rome": "Ostia", "Sparta": "Gytheio", "Corinth": "Lechaion"}
ERRANDS = ["where is my parcel?", "my card was charged twice", "I cannot sign in", "the invoice is wrong"]


@pytest.fixture(scope="module", autouse=True)
def lived_through(server: Dashboard) -> None:
    """Two domains with a history, keys, a kernel, and what people did with all that."""
    ours = {"Origin": server.url}
    for city, port in PORTS.items():
        body = {"domain": "travel", "observation": f"Which port lies next to {city}?", "action": port}
        server.post("/olympus/history", {**body, "session_id": "voyage"})
    known = [
        server.post("/olympus/history", {"domain": "errands", "observation": text, "action": "noted"})
        for text in ERRANDS
    ]
    server.post(f"/olympus/history/{known[0]['id']}/correct", {"action": "delivery"})
    server.json("DELETE", f"/olympus/history/{known[1]['id']}", headers=ours)
    for name, scopes in (("laptop of Grace", ["admin"]), ("nightly report", ["history:read", "cartridges:read"])):
        server.post("/olympus/keys", {"name": name, "scopes": scopes, "expires_in_days": 90})
    lost = server.post("/olympus/keys", {"name": "lost phone", "scopes": ["chat", "kernels:read"]})
    server.json("POST", f"/olympus/keys/{lost['id']}/revoke", headers=ours)
    kernel = server.post("/olympus/kernels/spawn", {"domain": "errands", "train": False})["kernel"]["kernel_id"]
    server.json("POST", f"/olympus/kernels/{kernel}/stop", headers=ours)
    run = server.post("/olympus/distillation/runs", {"domain": "errands"})
    server.client.post(f"/olympus/distillation/runs/{run['id']}/cancel", headers=ours)  # it may have ended by itself
    question = {"messages": [{"role": "user", "content": "Which port lies next to Athens?"}], "max_tokens": 32}
    server.json("POST", "/v1/chat/completions", json=question, headers=ours)


def test_pictures(watched: Watched) -> None:
    for name, seen in (
        ("system", "#spark-cpu .spark-line"),
        ("scheduler", ".domain"),
        ("settings", ".config-section[open] .config-table"),
        ("audit", "#audit-table tbody tr:nth-child(5)"),
    ):
        page = watched.open(f"/{name}", height=900)
        page.locator(seen).first.wait_for()
        watched.until_live()
        page.wait_for_timeout(500)
        watched.save(name)
    page = watched.open("/system", width=360, height=740, scheme="dark")
    page.locator("#spark-cpu .spark-line").wait_for()
    watched.until_live()
    watched.save("system-360-dark")


def _press(watched: Watched, selector: str, key: str = "Enter") -> None:
    """Reach ``selector`` with the Tab key and press ``key`` there."""
    watched.tab_to(selector)
    watched.page.keyboard.press(key)


def _confirm(watched: Watched, action: str) -> None:
    """Say yes in the dialog, which begins on its safe side."""
    page = watched.page
    page.locator("dialog[open]").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"
    watched.tab_to("dialog[open] button[value=yes]")
    assert page.evaluate("document.activeElement.textContent") == action
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for(state="detached")


def _with_key(server: Dashboard, key: str, path: str = "/olympus/kernels") -> int:
    return int(server.client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code)


def test_a_key_is_made_used_revoked_and_refused(watched: Watched) -> None:
    page = watched.open("/settings")
    page.locator("#key-scopes label").first.wait_for()
    assert page.locator("#keys-you").inner_text().startswith("You need none")
    watched.tab_to("#key-name")
    page.keyboard.type("notebook of Ada")
    _press(watched, "#key-scopes input[value='kernels:read']", "Space")
    _press(watched, "#key-form button[type=submit]")
    page.locator("#key-made").wait_for()
    key = page.locator("#made-key").inner_text()
    assert re.fullmatch(r"oly_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key)
    assert _with_key(watched.server, key) == 200
    assert _with_key(watched.server, key, "/olympus/keys") == 403, "it has the scopes that were chosen, no others"

    _press(watched, "#made-done")
    assert page.evaluate("document.activeElement.id") == "key-name"
    assert key not in page.content()
    row = page.locator("#keys-table tbody tr", has_text="notebook of Ada")
    row.get_by_text("active").wait_for()
    assert row.locator(".scope-list li").all_inner_texts() == ["chat", "kernels:read"]
    page.reload()
    row.wait_for()
    assert key not in page.content(), "it is shown once"

    _press(watched, "[aria-label='Revoke notebook of Ada']")
    assert "cannot be taken back" in page.locator("dialog[open]").inner_text()
    _confirm(watched, "Revoke")
    row.get_by_text("revoked").wait_for()
    assert _with_key(watched.server, key) == 401


def test_a_key_needs_a_scope(watched: Watched) -> None:
    page = watched.open("/settings")
    page.locator("#key-scopes label").first.wait_for()
    watched.tab_to("#key-name")
    page.keyboard.type("nobody")
    _press(watched, "#key-scopes input[value='chat']", "Space")
    _press(watched, "#key-form button[type=submit]")
    page.locator("#key-error").get_by_text("Choose at least one scope").wait_for()
    assert page.locator("#keys-table tbody tr", has_text="nobody").count() == 0


def test_the_configuration_says_where_each_value_comes_from(watched: Watched) -> None:
    page = watched.open("/settings")
    page.locator(".config-section[open] .config-table").wait_for()
    watched.tab_to("#configuration-q")
    page.keyboard.type("server.port")
    port = page.locator(".config-table tbody tr").first
    assert "environment PORT" in port.inner_text()
    assert str(watched.server.port) in port.inner_text()
    page.keyboard.press("Control+A")
    page.keyboard.type("nothing like it")
    page.get_by_text("No setting fits.").wait_for()
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    watched.tab_to("#configuration-form input[type=radio]")
    page.keyboard.press("ArrowRight")
    watched.until("[...document.querySelectorAll('.config-table tbody tr')].every((row) => row.dataset.set === 'true')")
    assert page.locator(".config-table tbody tr").count() >= 3


def test_jobs_are_run_at_once_and_say_how_it_went(watched: Watched) -> None:
    page = watched.open("/scheduler")
    job = page.locator(".job[data-key=coverage]")
    job.wait_for()
    watched.until_live()
    assert "It is called every minute" in job.locator(".job-clock").inner_text()
    _press(watched, ".job[data-key=coverage] button")
    page.locator(".toast").get_by_text("Look for badly served domains").wait_for()  # first: it goes away by itself
    job.locator(".outcomes").get_by_text("by hand, on this machine").first.wait_for()
    watched.until("document.activeElement.closest('.job')?.dataset.key === 'coverage'")

    domain = page.locator(".domain", has=page.locator("h3", has_text=re.compile("^travel$")))
    assert domain.locator(".conditions > li").count() == 5
    _press(watched, "[aria-label='Distil travel now']")
    assert "gives way to chats" in page.locator("dialog[open]").inner_text()
    _confirm(watched, "Distil")
    row = page.locator("#outcomes-table tr[data-key^=run-]", has_text="travel")
    row.wait_for()
    assert "hand" in row.inner_text()
    path = f"/olympus/distillation/runs/{row.get_attribute('data-key')}/cancel"
    watched.server.client.post(path, headers={"Origin": watched.server.url})  # it may have ended by itself
    row.get_by_text(re.compile("^(cancelled|skipped|rejected)$")).wait_for(timeout=120_000)  # told by the stream
    domain.get_by_text(re.compile("^last: ")).wait_for()


def test_the_system_is_live(watched: Watched) -> None:
    page = watched.open("/system")
    page.locator("#spark-cpu .spark-line").wait_for()
    watched.until_live()
    watched.until("document.querySelector('#spark-memory .spark-line').getAttribute('d').length > 10")
    before = page.locator("#spark-memory .spark-line").get_attribute("d")
    assert re.search(r"with [\d.]+ [MG]B of memory", page.locator("#system-lede").inner_text())
    assert page.locator("#queues > li").count() == 7
    assert "of 64" in page.locator("#queues").get_by_text("Event streams open").locator("xpath=..").inner_text()
    assert "Database" in page.locator("#disk-facts").inner_text()
    assert "smollm2-135m-instruct" in page.locator("#model-facts").inner_text()
    assert page.locator("#threads-table").get_by_text("engine", exact=True).count() == 1
    _press(watched, "#load-twin summary")
    page.locator("#load-table tbody tr").first.wait_for()
    line = f"document.querySelector('#spark-memory .spark-line').getAttribute('d') !== '{before}'"
    watched.until(line, 60)  # a sample came by the stream; nothing was reloaded


def test_the_audit_log_is_filtered_and_turned(watched: Watched) -> None:
    for _ in range(30):
        watched.server.json("POST", "/olympus/scheduler/coverage/run", headers={"Origin": watched.server.url})
    page = watched.open("/audit")
    lines = page.locator("#audit-table tbody tr")
    page.locator("#audit-count").get_by_text("1 to 25").wait_for()
    assert "ran a job at once" in lines.first.inner_text()
    assert "this machine" in lines.first.inner_text()
    _press(watched, "#audit-older")
    page.locator("#audit-count").get_by_text(re.compile("^26 to ")).wait_for()
    _press(watched, "#audit-newer")
    page.locator("#audit-count").get_by_text("1 to 25").wait_for()

    page.reload()
    page.locator("#audit-count").get_by_text("1 to 25").wait_for()
    watched.tab_to("#audit-action")
    page.keyboard.type("keys, all")
    watched.until("location.search.includes('action=key')")
    watched.until(
        "[...document.querySelectorAll('#audit-table tbody th code')].every((e) => e.textContent.startsWith('key.'))"
    )
    assert "revoked a key" in lines.first.inner_text()
    target = re.search(r"\b[0-9a-f]{8}\b", lines.first.locator("[data-label='To what']").inner_text())
    assert target is not None
    watched.tab_to("#audit-target")
    page.keyboard.type(target.group())
    page.keyboard.press("Enter")
    watched.until("document.querySelectorAll('#audit-table tbody tr').length === 2")
    assert "made a key" in lines.nth(1).inner_text()
    assert "notebook of Ada" in lines.nth(1).inner_text()
    page.go_back()
    watched.until("!location.search.includes('target=')")


def test_who_may_not_see_it_is_told_so(watched: Watched) -> None:
    problem = {"status": 403, "content_type": "application/problem+json", "body": '{"detail": "this key lacks admin"}'}
    watched.page.route("**/olympus/keys", lambda route: route.fulfill(**problem))
    watched.page.route("**/olympus/audit?*", lambda route: route.fulfill(**problem))
    watched.expected.append("403")  # the browser's own line
    for path in ("/settings", "/audit"):
        page = watched.open(path)
        page.locator("#page-error").get_by_text("administrators only").wait_for()
    assert page.locator("nav a[aria-current=page]").inner_text() == "Audit log"


@pytest.mark.parametrize("path", ["/system", "/scheduler", "/settings", "/audit"])
def test_frame_and_barriers(watched: Watched, axe: str, path: str) -> None:
    page = watched.open(path)
    watched.until_live()
    _show_all(page, path)
    watched.check_everywhere(axe)


def _show_all(page: Any, path: str) -> None:
    """What is folded or asked first, open."""
    if path == "/system":
        page.locator("#spark-cpu .spark-line").wait_for()
        page.locator("#load-twin summary").click()
    elif path == "/scheduler":
        page.locator(".domain").first.wait_for()
        page.locator("#outcomes-table tbody tr").first.wait_for()
    elif path == "/settings":
        page.locator(".config-section[open] .config-table").wait_for()
        page.fill("#key-name", "picture")
        page.locator("#key-form button[type=submit]").click()
        page.locator("#key-made").wait_for()
    else:
        page.locator("#audit-table tbody tr").nth(5).wait_for()
