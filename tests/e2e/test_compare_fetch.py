"""The comparison fetches what it shows: the columns of one quantity, and those of another when it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.e2e.conftest import Dashboard, Watched

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

PAIRS = [{"observation": f"red light number {number}", "action": "stop"} for number in range(20)]
TINY = {"width": 16, "hidden": 16, "heads": 2, "context": 64, "supervision_steps": 1, "ngram_buckets": 0}


def _learned(server: Dashboard, name: str) -> str:
    """The id of a kernel that has learned for some steps and stopped."""
    body = {"name": name, "domain": "fetched", "config": TINY, "experiences": PAIRS, "preset": "nano", "force": True}
    kernel = str(server.post("/olympus/kernels/spawn", body)["kernel"]["kernel_id"])
    path = f"/olympus/kernels/{kernel}"
    server.wait_until(lambda: server.get(f"{path}/status")["step"] >= 40, 180, f"steps of {kernel}")
    server.json("POST", f"{path}/stop", headers={"Origin": server.url})
    server.wait_until(lambda: server.get(f"{path}/status")["state"] == "stopped", 60, f"the stop of {kernel}")
    return kernel


@pytest.fixture
def pair(server: Dashboard) -> Iterator[list[str]]:
    """Two kernels, gone again before others take their pictures; made before a page is opened, so gone after it."""
    made = [_learned(server, name) for name in ("castor", "pollux")]
    yield made
    for kernel in made:
        server.json("DELETE", f"/olympus/kernels/{kernel}", headers={"Origin": server.url})


def test_only_the_quantity_that_is_shown_is_fetched(pair: list[str], watched: Watched) -> None:
    asked: list[tuple[str, bool]] = []

    def remember(url: str) -> None:
        if "/metrics?" in url:
            query = parse_qs(urlsplit(url).query)
            asked.append((query["columns"][0], "since" in query))

    watched.page.on("request", lambda request: remember(request.url))
    page = watched.open(f"/kernels?compare={','.join(pair)}&show=loss")
    page.locator("#compare-chart canvas").wait_for()
    assert asked == [("loss", False)] * 2
    labels = page.locator("#compare-chart .u-legend").inner_text()
    assert "castor" in labels
    assert "pollux" in labels
    asked.clear()
    page.locator("#compare-quantity label", has_text="Time per step").click()
    watched.until("document.getElementById('compare-summary').textContent.startsWith('Milliseconds')")
    assert asked == [("step_ms", False)] * 2
    asked.clear()
    with page.expect_request("**/metrics?*since=*"):
        page.locator("#view-closer").click()
    assert set(asked) == {("step_ms", True)}
    with page.expect_request(lambda request: "columns=loss" in request.url and "since=" in request.url):
        page.locator("#compare-quantity label", has_text="Training").click()
    watched.until("document.getElementById('compare-summary').textContent.startsWith('Training')")
    assert ("loss", True) in asked, "known rows are not fetched again, new ones are"
    assert ("loss", False) not in asked
