"""A real server (`python app.py`, empty data directory, packaged model) and a real Chromium for the browser tests.

Without Chromium these tests are skipped, unless OLYMPUS_TEST_REQUIRE_ALL=1, which makes that a failure.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from settings import ROOT
from tests.support.server import Server

#: A whole distillation in seconds, and one that the tiny model passes: high learning rate, no mercy.
TINY_PRESET = """
teacher: {model: "engine:", max_tokens: 8, max_prompt_tokens: 256}
data: {targets: feedback, eval_share: 0.6}
training: {slots: 16, learning_rate: 0.3, clip_norm: 10.0, warmup_steps: 2, max_steps: 24, rows: 8, max_tokens: 64,
           evaluate_every: 4, save_every: 12, min_watched: 1}
gate: {min_rows: 3, max_rows: 4}
"""

CHROMIUM = os.environ.get("OLYMPUS_TEST_CHROMIUM", "/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY_WITHIN = 240.0
IMAGES = ROOT / "docs" / "images"
LARGEST_IMAGE = 300_000
WIDTHS = (360, 768, 1440)


class Dashboard(Server):
    """The real server, with the short calls that the browser tests make beside the page."""

    def get(self, path: str) -> Any:
        return self.json("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self.json("POST", path, 201, json=body, headers={"Origin": self.url})

    def wait_until(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended while waiting for {what}:\n{self.log}")
            if ready():
                return
            time.sleep(0.25)
        pytest.fail(f"{what} did not happen in {seconds:.0f} s:\n{self.log}")


@pytest.fixture(scope="session")
def server(smollm2: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """`python app.py` on a free port; the packaged model comes from the cache shared by all tests."""
    running = Dashboard(tmp_path_factory.mktemp("olympus"))
    try:
        running.wait_ready(READY_WITHIN)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """The same server with a tiny random model, for pages that need a whole distillation; words alone are searched."""
    from tests.support.tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    preset = folder / "tiny.yaml"
    preset.write_text(TINY_PRESET)
    environ = {
        "OLYMPUS_MODEL__NAME": str(save_tiny_model(folder / "tiny-llama")),
        "OLYMPUS_MODEL__THREADS": "1",
        "OLYMPUS_MEMORY__EPISODIC__EMBEDDING": "none",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_DISTILLATION__PRESET": str(preset),
    }
    running = Dashboard(folder / "data", environ)
    try:
        running.wait_ready(READY_WITHIN)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def axe(skip_or_fail: Callable[[str], NoReturn]) -> str:
    """The source of axe-core, which looks for barriers in a page."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        skip_or_fail("axe-core is not installed (axe-playwright-python)")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def browser(skip_or_fail: Callable[[str], NoReturn]) -> Iterator[Any]:
    """One Chromium with an empty profile; every test gets its own context from `page`."""
    if not Path(CHROMIUM).exists():
        skip_or_fail(f"there is no Chromium at {CHROMIUM}; set OLYMPUS_TEST_CHROMIUM")
    import playwright.sync_api as playwright_api

    with playwright_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=list(FLAGS)
        )
        yield context
        context.close()


@dataclass
class Watched:
    """A page, and everything it did that it must not do."""

    page: Any
    server: Dashboard
    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  #: parts of complaints that are the point of a test

    def open(self, path: str, width: int = 1440, height: int = 900, scheme: str = "light") -> Any:
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme, reduced_motion="no-preference")
        self.page.goto(self.server.url + path)
        return self.page

    def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until ``expression`` is true in the page.

        Not ``wait_for_function``: that evaluates text inside the page, which our Content-Security-Policy forbids.
        """
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            if time.monotonic() > end:
                pytest.fail(f"not true within {seconds:.0f} s: {expression}")
            self.page.wait_for_timeout(100)

    def address(self) -> str:
        """Path and query as the page has them: ``page.url`` follows a moment after ``pushState``."""
        told: str = self.page.evaluate("location.pathname + location.search")
        return told

    def settle(self) -> None:
        """Let what was just changed be drawn, and colours that fade come to their end."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.until(
            "document.getAnimations().every((one) => !(one instanceof CSSTransition) || one.playState !== 'running')"
        )

    def until_live(self) -> None:
        self.until("document.getElementById('live-badge').dataset.state === 'live'")

    def check_frame(self, width: int) -> None:
        """Nothing is wider than the window, and whatever is pressed is at least 24 x 24 px (WCAG 2.2, 2.5.8)."""
        assert self._too_wide(width) == []
        small = self.page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, textarea, summary, nav a')]
              .map((e) => [e, e.getBoundingClientRect()])
              .filter(([e, r]) => r.width > 0 && r.height > 0 && (r.width < 24 || r.height < 24) && e.type !== 'radio')
              .map(([e, r]) => `${e.tagName} ${e.id || e.textContent.trim()} ${r.width}x${r.height}`)"""
        )
        assert small == []

    def _too_wide(self, width: int) -> list[str]:
        """What reaches out of the window; tables may, as long as they scroll by themselves."""
        found: list[str] = self.page.evaluate(
            """(width) => document.documentElement.scrollWidth <= width ? [] : [...document.querySelectorAll('body *')]
              .filter((e) => e.getBoundingClientRect().right > width)
              .map((e) => `${e.tagName} ${e.id} ${e.className} ${e.getBoundingClientRect().right}`)""",
            width,
        )
        return found

    def check_barriers(self, axe: str) -> None:
        """No serious or critical violation of WCAG 2.2 AA that axe-core can see."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(axe)
        found = self.page.evaluate(
            """() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})
              .then(({violations}) => violations.filter((v) => ['serious', 'critical'].includes(v.impact))
                .map((v) => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html).join(' | ')}`))"""
        )
        assert found == []

    def check_everywhere(self, axe: str) -> None:
        """Frame and barriers of the page as it stands, on a phone, a tablet and a desk, light and dark."""
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                self.page.set_viewport_size({"width": width, "height": 900})
                self.page.emulate_media(color_scheme=scheme)
                self.settle()
                for _ in range(300):  # charts follow in a later frame
                    if not self._too_wide(width):
                        break
                    self.page.wait_for_timeout(100)
                self.check_frame(width)
                self.check_barriers(axe)

    def save(self, name: str) -> None:
        """The window as a picture in docs/images."""
        IMAGES.mkdir(parents=True, exist_ok=True)
        path = IMAGES / f"{name}.png"
        self.page.screenshot(path=str(path))
        assert path.stat().st_size < LARGEST_IMAGE

    def tab_to(self, selector: str, key: str = "Tab", most: int = 80) -> None:
        """Move the focus with the keyboard alone until it is on ``selector``, once that is there and not disabled."""
        self.page.locator(f"{selector}:not(:disabled)").first.wait_for(state="attached")
        for _ in range(most):
            self.page.keyboard.press(key)
            if self.page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
                return
        pytest.fail(f"{selector} cannot be reached within {most} times {key}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.server.url + "/", "data:", "blob:")):
            self.complaints.append(f"request to another origin: {request.url}")


@pytest.fixture
def watched(browser: Any, server: Dashboard) -> Iterator[Watched]:
    """A fresh tab; when the test ends, it must have had no error, no CSP violation and no request elsewhere."""
    browser.clear_cookies()
    page = browser.new_page()
    watch = Watched(page, server)
    page.on("console", lambda message: _console(watch, message))
    page.on("pageerror", lambda error: watch.complaints.append(f"uncaught: {error}"))
    page.on("request", watch._request)
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation',"
        " (e) => console.error('CSP: ' + e.violatedDirective + ' ' + e.blockedURI))"
    )
    yield watch
    page.close()
    assert [told for told in watch.complaints if not any(part in told for part in watch.expected)] == []


def _console(watch: Watched, message: Any) -> None:
    if message.type in ("error", "warning"):
        watch.complaints.append(f"console {message.type}: {message.text}")
