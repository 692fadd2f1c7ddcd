"""Fifty kernels with 100,000 points each in a real Chromium: is the overview quick, and is comparing six?

The browser's own long-task observer (tasks above 50 ms) and its clock measure; nothing is injected into the pages but
that. *Usable*: every kernel is on the page, the chart is drawn, and no long task is under way. Bytes of the first load
are those that Chromium received for the document, its scripts, styles and pictures, with an empty cache.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dashboard_parts.world import fill, keep_training, served
from benchmarks.kernel_parts.common import MissingData, Options
from tests.support.server import Server

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
)
COMPARED = 6
ASSETS = ("Document", "Script", "Stylesheet", "Image", "Font")
WATCH = """
window.watched = {tasks: [], usable: null};
new PerformanceObserver((list) => {
  for (const {startTime, duration} of list.getEntries()) window.watched.tasks.push([startTime, duration]);
}).observe({type: 'longtask', buffered: true});
const look = () => {
  const {count, chart} = window.watched.wanted ?? {};
  const rows = document.querySelectorAll('#kernel-table tbody tr').length;
  if (count && rows >= count && document.querySelector(chart)) window.watched.usable = performance.now();
  else requestAnimationFrame(look);
};
window.watched.wanted = {count: COUNT, chart: location.pathname === '/' ? '.sky a .body' : '#compare-chart canvas'};
requestAnimationFrame(look);
"""


@dataclass
class Load:
    """One load of a page. Milliseconds since the navigation, and bytes."""

    usable: float
    longest_task: float
    asset_bytes: int
    data_bytes: int
    requests: int


@dataclass
class Measured:
    """Everything that ``measure`` found. ``longest``: ms of the longest task while the pages were used."""

    kernels: int
    points: int
    loads: dict[str, list[Load]] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)
    most_points: int = 0
    metric_requests: int = 0
    with_since: int = 0


class Tab:
    """A fresh tab of Chromium that counts what it receives."""

    def __init__(self, context: Any, server: Server, kernels: int):
        self.page = context.new_page()
        self.page.set_viewport_size({"width": 1440, "height": 900})
        self.page.add_init_script(WATCH.replace("COUNT", str(kernels)))
        self.server = server
        self._answers: list[Any] = []  # of the metrics route
        self.page.on("response", lambda told: self._answers.append(told) if "/metrics?" in told.url else None)
        self._kinds: dict[str, str] = {}
        self._bytes = {"assets": 0, "data": 0}
        self._requests = 0
        client = context.new_cdp_session(self.page)
        client.send("Network.enable")
        client.send("Network.setCacheDisabled", {"cacheDisabled": True})
        client.on("Network.responseReceived", lambda event: self._kinds.update({event["requestId"]: event["type"]}))
        client.on("Network.loadingFinished", self._finished)

    def _finished(self, event: dict[str, Any]) -> None:
        kind = self._kinds.get(event["requestId"], "")
        self._bytes["assets" if kind in ASSETS else "data"] += int(event["encodedDataLength"])
        self._requests += 1

    def metrics(self) -> list[tuple[bool, int]]:
        """(asked with since, rows) of each answer so far; to be asked when nothing is timed any more.

        An answer that the page did not wait for has no body.
        """
        from playwright.sync_api import Error

        found = []
        for answer in self._answers:
            with contextlib.suppress(Error):
                found.append(("since=" in answer.url, len(answer.json()["step"])))
        return found

    def load(self, path: str, seconds: float = 60.0) -> Load:
        """Open a page and wait until it is usable and quiet."""
        self._bytes, self._requests = {"assets": 0, "data": 0}, 0
        self.page.goto(self.server.url + path)
        end = time.monotonic() + seconds
        while self.page.evaluate("window.watched.usable") is None:
            if time.monotonic() > end:
                raise AssertionError(f"{path} was not usable within {seconds} s")
            self.page.wait_for_timeout(20)
        self.page.wait_for_timeout(700)
        watched = self.page.evaluate("window.watched")
        usable = max(
            [watched["usable"], *(start + spent for start, spent in watched["tasks"] if start < watched["usable"])]
        )
        return Load(usable, longest(watched["tasks"]), self._bytes["assets"], self._bytes["data"], self._requests)

    def forget_tasks(self) -> None:
        """Count long tasks from now on."""
        self.page.evaluate("window.watched.tasks.length = 0")

    def longest_task(self) -> float:
        """Of those since ``forget_tasks``, in milliseconds; 0 when none took 50."""
        self.page.wait_for_timeout(500)
        return longest(self.page.evaluate("window.watched.tasks"))

    def pan_and_zoom(self, rounds: int) -> None:
        """Drag to zoom in, move with Shift, turn the wheel with Ctrl, press the buttons, and look at all again."""
        page, mouse = self.page, self.page.mouse
        page.locator("#compare-chart").scroll_into_view_if_needed()
        box = page.locator("#compare-chart .u-over").bounding_box()
        middle = box["y"] + box["height"] / 2

        def drag(start: float, end: float) -> None:
            mouse.move(box["x"] + start * box["width"], middle)
            mouse.down()
            mouse.move(box["x"] + end * box["width"], middle, steps=30)
            mouse.up()

        for _ in range(rounds):
            drag(0.3, 0.6)
            page.wait_for_timeout(400)  # the finer rows arrive
            page.keyboard.down("Shift")
            drag(0.8, 0.2)
            page.keyboard.up("Shift")
            page.keyboard.down("Control")
            for turn in (-100, -100, -100, 100, 100):
                mouse.wheel(0, turn)
                page.wait_for_timeout(30)
            page.keyboard.up("Control")
            page.locator("#view-later").click()
            page.locator("#view-wider").click()
            page.wait_for_timeout(400)
            page.locator("#view-all").click()
            page.wait_for_timeout(300)


def longest(tasks: list[list[float]]) -> float:
    return max((spent for _, spent in tasks), default=0.0)


def measure(folder: Path, *, kernels: int, points: int, training: int, loads: int, rounds: int, seed: int) -> Measured:
    """Fill a data directory, serve it, and use the pages."""
    if not Path(CHROMIUM).exists():
        raise MissingData(f"there is no Chromium at {CHROMIUM}")
    import playwright.sync_api as playwright_api

    ids = fill(folder / "data", kernels, points, seed)
    found = Measured(kernels, points)
    with served(folder / "data") as server, playwright_api.sync_playwright() as playwright:
        keep_training(server, training)
        with tempfile.TemporaryDirectory() as profile:
            context = playwright.chromium.launch_persistent_context(
                profile, executable_path=CHROMIUM, headless=True, args=list(FLAGS)
            )
            chosen = ",".join(ids[:: max(1, kernels // COMPARED)][:COMPARED])
            for name, path in (("overview", "/"), ("compare", f"/kernels?compare={chosen}")):
                for _ in range(loads):
                    tab = Tab(context, server, kernels)
                    found.loads.setdefault(name, []).append(tab.load(path))
                    if len(found.loads[name]) == loads:
                        _use(tab, name, rounds, found)
                    metrics = tab.metrics()
                    tab.page.close()
                    found.metric_requests += len(metrics)
                    found.with_since += sum(since for since, _ in metrics)
                    found.most_points = max([found.most_points, *(rows for _, rows in metrics)])
            context.close()
    return found


def _use(tab: Tab, name: str, rounds: int, found: Measured) -> None:
    tab.forget_tasks()
    if name == "compare":
        tab.pan_and_zoom(rounds)
    else:
        for place in range(20 * rounds):  # the reader looks around while numbers arrive
            tab.page.mouse.move(200 + 40 * (place % 15), 500)
            tab.page.mouse.wheel(0, 120 if place % 20 < 10 else -120)
            tab.page.wait_for_timeout(100)
    found.longest[name] = tab.longest_task()


def run(options: Options) -> str:
    quick = options.quick
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder),
            kernels=8 if quick else 50,
            points=3_000 if quick else 100_000,
            training=1 if quick else 3,
            loads=1 if quick else 5,
            rounds=1 if quick else 4,
            seed=options.seeds[0],
        )
    return report(found)


def report(found: Measured) -> str:
    lines = [
        f"{found.kernels} kernels with {found.points:,} points each; medians of {len(found.loads['overview'])} loads "
        "with an empty cache.",
        "",
        "| | overview | compare |",
        "|---|---|---|",
    ]
    pages = [found.loads["overview"], found.loads["compare"]]

    def row(name: str, told: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(told)} |")

    row(
        "usable after, s (worst)",
        [
            f"{statistics.median(x.usable for x in page) / 1000:.2f} ({max(x.usable for x in page) / 1000:.2f})"
            for page in pages
        ],
    )
    row(
        "first load, KB as received", [f"{statistics.median(x.asset_bytes for x in page) / 1000:.0f}" for page in pages]
    )
    row("data beside it, KB", [f"{statistics.median(x.data_bytes for x in page) / 1000:.0f}" for page in pages])
    row("longest task while loading, ms", [f"{statistics.median(x.longest_task for x in page):.0f}" for page in pages])
    row("longest task while used, ms", [f"{found.longest[name]:.0f}" for name in ("overview", "compare")])
    lines += [
        "",
        f"Metrics: {found.metric_requests} requests, {found.with_since} of them for what is new or nearer; at most "
        f"{found.most_points:,} points in an answer.",
        "A task of 0 ms means that none took 50 ms.",
    ]
    return "\n".join(lines)
