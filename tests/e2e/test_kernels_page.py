"""The list of kernels and the page of one: filter, compare, look closer, checkpoints and what changed, all actions.

Two tiny kernels on the server that all browser tests share; they learn in milliseconds per step.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.conftest import Dashboard, Watched

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

TINY = {"width": 16, "hidden": 16, "heads": 2, "context": 64, "supervision_steps": 1, "ngram_buckets": 0}
LIGHTS = {"red": "stop", "green": "go", "amber": "wait"}
PAIRS = [
    {"observation": f"{colour} light number {number}", "action": action}
    for colour, action in LIGHTS.items()
    for number in range(20)
]


@pytest.fixture(scope="module")
def kernels(server: Dashboard) -> list[str]:
    """Ids of the two kernels, each with two checkpoints, paused."""
    made = []
    for name, width in (("selene", 16), ("helios", 32)):
        body = {
            "name": name,
            "domain": "lights",
            "config": TINY | {"width": width},
            "experiences": PAIRS,
            "preset": "nano",
        }
        made.append(server.post("/olympus/kernels/spawn", body)["kernel"]["kernel_id"])
    for kernel in made:
        path = f"/olympus/kernels/{kernel}"
        for step in (20, 80):
            server.wait_until(lambda path=path, step=step: _step(server, path) >= step, 180, f"step {step} of {path}")
            server.post(f"{path}/checkpoint", {})
        server.json("POST", f"{path}/pause", headers={"Origin": server.url})
    for kernel in made:
        path = f"/olympus/kernels/{kernel}/status"
        server.wait_until(lambda path=path: server.get(path)["state"] == "paused", 60, f"the pause of {path}")
    return made


def _step(server: Dashboard, path: str) -> int:
    step: int = server.get(f"{path}/status")["step"]
    return step


def _names(page: Any) -> list[str]:
    return [link.inner_text() for link in page.locator("#kernel-table tbody th a").all()]


def test_filter_and_order(watched: Watched, kernels: list[str]) -> None:
    page = watched.open("/kernels")
    page.fill("#filter-text", "lights")
    watched.until("document.querySelectorAll('#kernel-table tbody tr').length === 2")
    assert sorted(_names(page)) == ["helios", "selene"]
    assert " of " in page.locator("#kernel-count").inner_text()
    page.select_option("#filter-state", "converged")
    page.get_by_text("No kernel fits.").wait_for()
    page.select_option("#filter-state", "paused")
    page.select_option("#filter-sort", "step")
    assert "q=lights&state=paused&sort=step" in watched.address()
    page.reload()
    watched.until("document.querySelectorAll('#kernel-table tbody tr').length === 2")
    steps = [
        int(cell.inner_text().replace(",", "")) for cell in page.locator("#kernel-table td[data-label=Step]").all()
    ]
    assert steps == sorted(steps, reverse=True)


def test_compare_and_look_closer(watched: Watched, kernels: list[str]) -> None:
    page = watched.open("/kernels?q=lights")
    page.get_by_label("Compare selene").check()
    page.get_by_text("Choose another one").wait_for()
    page.get_by_label("Compare helios").check()
    page.locator("#compare-chart .u-legend", has_text="helios").wait_for()  # the chart of selene alone comes before
    assert "selene" in page.locator("#compare-chart .u-legend").inner_text()
    table = page.locator("#compare-table").inner_text()
    assert "Made differently" in table
    assert "width" in table
    assert ",".join(kernels) in watched.address()
    page.get_by_label("Training loss").check()
    watched.until("document.getElementById('compare-summary').textContent.startsWith('Training loss')")
    assert "show=loss" in watched.address()

    first = page.locator("#compare-chart .u-legend td").first.inner_text()
    with page.expect_request("**/metrics?max_points=2000&since=*"):
        page.locator("#view-closer").click()
    with page.expect_request("**/metrics?max_points=2000&since=*"):
        page.locator("#view-later").click()
    page.locator("#view-all").click()
    page.wait_for_timeout(400)
    assert page.locator("#compare-chart .u-legend td").first.inner_text() == first

    page.reload()  # the address holds the choice
    page.locator("#compare-chart canvas").wait_for()
    assert page.locator("#compare-summary").inner_text().startswith("Training loss")
    page.get_by_role("button", name="Compare nothing").click()
    page.locator("#compare").wait_for(state="hidden")
    assert "compare" not in watched.address()


def test_compare_by_keyboard(watched: Watched, kernels: list[str]) -> None:
    page = watched.open("/kernels")
    page.locator("#kernel-table tbody th").first.wait_for()
    watched.tab_to("#filter-text")
    page.keyboard.type("lights")
    for name in ("selene", "helios"):
        watched.tab_to(f"input[aria-label^='Compare {name}']")
        page.keyboard.press("Space")
        watched.until(f"document.activeElement.getAttribute('aria-label').startsWith('Compare {name}')")
    page.locator("#compare-chart canvas").wait_for()
    watched.tab_to("input[name=quantity]")
    page.keyboard.press("ArrowRight")
    watched.until("document.getElementById('compare-summary').textContent.includes('baseline')")
    watched.tab_to("#view-closer")
    page.keyboard.press("Enter")
    watched.tab_to("#view-all")
    page.keyboard.press("Enter")


def test_checkpoints_and_what_changed(watched: Watched, kernels: list[str]) -> None:
    page = watched.open(f"/kernels/{kernels[0]}")
    page.locator("#diff-form").wait_for()
    page.get_by_role("button", name="Show the difference").click()
    page.locator(".diff-sentence").wait_for()
    assert "the weights moved by" in page.locator(".diff-sentence").inner_text()
    assert page.locator(".diff-tables table").count() == 2
    assert page.locator(".diff-tables code", has_text="blocks.0").count() == 1
    page.fill("#diff-question", "red light number 3")
    page.get_by_role("button", name="Ask both").click()
    page.locator(".diff-answers article").nth(1).get_by_text("confidence").wait_for()
    page.select_option("#diff-base", index=0)
    page.select_option("#diff-other", index=0)
    page.get_by_role("button", name="Show the difference").click()
    page.get_by_text("Choose two different checkpoints.").wait_for()


def test_every_action(watched: Watched, kernels: list[str]) -> None:
    page = watched.open(f"/kernels/{kernels[1]}")
    table = page.locator("#cp-table")
    unpin = table.get_by_role("button", name=re.compile("^Unpin"))
    unpin.last.wait_for()
    pinned = unpin.count()
    unpin.last.click()  # the oldest: no rule keeps it any more
    watched.until(f"document.querySelectorAll('#cp-table [aria-label^=Unpin]').length === {pinned - 1}")
    rows = table.locator("tbody tr").count()
    delete = table.get_by_role("button", name=re.compile("^Delete")).last
    delete.click()
    page.locator("dialog[open]").get_by_role("button", name="Cancel").click()
    delete.click()
    page.locator("dialog[open]").get_by_role("button", name="Delete").click()
    watched.until(f"document.querySelectorAll('#cp-table tbody tr').length === {rows - 1}")
    table.get_by_role("button", name=re.compile("^Restore")).last.click()
    page.locator("dialog[open]").get_by_role("button", name="Restore").click()
    page.get_by_text("restore done").wait_for()
    page.get_by_role("button", name="Resume").click()
    save = page.get_by_role("button", name="Save a checkpoint")
    save.wait_for(timeout=60_000)
    assert page.evaluate("document.activeElement.closest('#kernel-actions') !== null"), "the focus is not lost"
    save.click()
    page.get_by_text("Save a checkpoint: accepted.").wait_for(timeout=60_000)
    page.fill("#feed-data", "blue light => fly")
    page.get_by_role("button", name="Add to the history").click()
    page.get_by_text("1 added to the history").wait_for()
    page.get_by_role("button", name="Stop").click()
    watched.until("document.getElementById('kernel-state').textContent.includes('stopped')", 60)


def test_frame_and_barriers(watched: Watched, kernels: list[str], axe: str) -> None:
    page = watched.open(f"/kernels?q=lights&compare={','.join(kernels)}")
    page.locator("#compare-chart canvas").wait_for()
    watched.check_everywhere(axe)
    page = watched.open(f"/kernels/{kernels[0]}")
    page.get_by_role("button", name="Show the difference").click()
    page.locator(".diff-sentence").wait_for()
    for twin in page.locator(".twin summary").all():
        twin.click()
    watched.check_everywhere(axe)


def test_pictures(watched: Watched, kernels: list[str]) -> None:
    page = watched.open(f"/kernels?compare={','.join(kernels)}&show=loss", height=1060)
    page.locator("#compare-chart canvas").wait_for()
    page.wait_for_timeout(1000)
    watched.save("kernels")
    page.get_by_role("link", name="See 2 side by side").click()
    page.wait_for_timeout(300)
    watched.save("kernels-compare")
    page = watched.open(f"/kernels/{kernels[0]}", scheme="dark", height=1060)
    page.get_by_role("button", name="Show the difference").click()
    page.locator(".diff-sentence").wait_for()
    page.locator("#diff").evaluate("(box) => box.scrollIntoView()")
    page.wait_for_timeout(300)
    watched.save("checkpoints-dark")
