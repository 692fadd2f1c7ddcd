"""Many watchers of one live stream, cut off at random: does a resumed one miss or repeat anything, does memory grow?

Each watcher reads ``GET /olympus/stream`` over a socket of its own, closes it in the middle of whatever comes after a
random while, and resumes with ``Last-Event-ID``, as the dashboard does. State changes of kernels must all arrive (the
hub merges nothing but measurements), so at the end every watcher's list of their ids is held against the union of
all. Measurements of training kernels flow beside them. Bounded in watchers and time; it stops by itself.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dashboard_parts.world import keep_training, served
from benchmarks.kernel_parts.common import Options
from tests.support.server import Server

TOPIC = "kernel.state"  # never merged and never dropped
SILENT_AFTER = 20.0  # the server says something every five seconds


@dataclass
class Told:
    """What one watcher heard, over all its connections."""

    begun: int = 0  # id of its first hello
    states: list[int] = field(default_factory=list)
    events: int = 0
    resets: int = 0
    connections: int = 0
    refused: int = 0
    error: str = ""


class Watcher(threading.Thread):
    """One tab. ``patience``: seconds after which it is cut off, drawn between these; None: never."""

    def __init__(self, server: Server, patience: tuple[float, float] | None, seed: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.told = Told()
        self._port, self._patience, self._stop_event = server.port, patience, stop
        self._drawer = random.Random(seed)
        self._last_id: int | None = None

    def run(self) -> None:
        try:
            while not self._stop_event.is_set():
                self._connect()
        except Exception as error:  # the thread's owner reports it
            self.told.error = f"{type(error).__name__}: {error}"

    def _connect(self) -> None:
        until = None if self._patience is None else time.monotonic() + self._drawer.uniform(*self._patience)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SILENT_AFTER)
        headers = {} if self._last_id is None else {"Last-Event-ID": str(self._last_id)}
        try:
            connection.request("GET", f"/olympus/stream?topics={TOPIC},kernel.metric", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                self.told.refused += 1
                time.sleep(0.5)
                return
            self.told.connections += 1
            self._read(response, until)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, until: float | None) -> None:
        name, data, event_id = "message", "", None
        while not self._stop_event.is_set() and (until is None or time.monotonic() < until):
            line = response.readline().decode().rstrip("\r\n")
            if line.startswith("id: "):
                event_id = int(line[4:])
            elif line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data = line[6:]
            elif line == "":
                if response.isclosed():
                    return
                self._take(name, data, event_id)
                name, data, event_id = "message", "", None

    def _take(self, name: str, data: str, event_id: int | None) -> None:
        """A block of the stream; what is taken counts as heard, and only then its id as the last one."""
        if event_id is not None:
            self._last_id = event_id
        if name == "hello":
            self.told.begun = json.loads(data)["last_event_id"]
        elif name == "reset":
            self.told.resets += 1
        elif data:
            self.told.events += 1
            if name == TOPIC:
                assert event_id is not None
                self.told.states.append(event_id)


@dataclass
class Watched:
    """The result of ``watch``."""

    watchers: list[Told]
    rss_mib: list[float]
    seconds: float
    left_open: int

    @property
    def gaps(self) -> int:
        """State changes that somebody missed, counted over all watchers."""
        everything = {event for told in self.watchers for event in told.states}
        return sum(len({e for e in everything if e > told.begun} - set(told.states)) for told in self.watchers)

    @property
    def duplicates(self) -> int:
        """Events that somebody got twice or out of order."""
        return sum(sum(b <= a for a, b in zip(told.states, told.states[1:], strict=False)) for told in self.watchers)

    @property
    def growth_mib(self) -> float:
        """The median of the last quarter above that of the second; the first is the warm-up."""
        quarter = max(1, len(self.rss_mib) // 4)
        return statistics.median(self.rss_mib[-quarter:]) - statistics.median(self.rss_mib[quarter : 2 * quarter])


def watch(server: Server, *, watchers: int, seconds: float, patience: tuple[float, float], seed: int) -> Watched:
    """Let ``watchers`` watch for ``seconds`` while kernels come and go. The first one is never cut off."""
    stop = threading.Event()
    tabs = [Watcher(server, None if n == 0 else patience, seed * 1000 + n, stop) for n in range(watchers)]
    for tab in tabs:
        tab.start()
    rss: list[float] = []
    begun = time.monotonic()
    for number in itertools.count():
        if time.monotonic() - begun >= seconds:
            break
        _come_and_go(server, number)
        status = server.json("GET", "/olympus/status")
        rss.append(status["process"]["rss_bytes"] / 2**20)
        time.sleep(0.2)
    time.sleep(1.0)  # the last change reaches everybody who is connected
    _settle(tabs)
    stop.set()
    for tab in tabs:
        tab.join(SILENT_AFTER + 5)
    spent = time.monotonic() - begun
    return Watched([tab.told for tab in tabs], rss, spent, _left_open(server))


def _left_open(server: Server, seconds: float = 10.0) -> int:
    """Streams that the server still holds once everybody has left; it looks twice a second."""
    end = time.monotonic() + seconds
    while True:
        count: int = server.json("GET", "/olympus/status")["admission"]["streams"]
        if count == 0 or time.monotonic() > end:
            return count
        time.sleep(0.2)


def _come_and_go(server: Server, number: int) -> None:
    """A kernel is spawned without training and deleted again: at least two state changes."""
    body = {"name": f"ghost-{number}", "domain": "ghosts", "train": False, "preset": "nano", "force": True}
    made: dict[str, Any] = server.json("POST", "/olympus/kernels/spawn", 201, json=body)
    server.json("DELETE", f"/olympus/kernels/{made['kernel']['kernel_id']}")


def _settle(tabs: list[Watcher], seconds: float = 10.0) -> None:
    """Wait until everybody has heard what the one that was never cut off has heard; a gap stays one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        newest = max(tabs[0].told.states, default=0)
        if all(max(tab.told.states, default=0) >= newest for tab in tabs):
            return
        time.sleep(0.1)


def run(options: Options) -> str:
    quick = options.quick
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "data") as server:
        keep_training(server, 1 if quick else 3)
        found = watch(
            server, watchers=50, seconds=20.0 if quick else 600.0, patience=(2.0, 20.0), seed=options.seeds[0]
        )
    connections = sum(told.connections for told in found.watchers)
    heard = sum(told.events for told in found.watchers)
    rows = [
        ("watchers", f"{len(found.watchers)}"),
        ("seconds", f"{found.seconds:.0f}"),
        ("connections, all but the first of each resumed", f"{connections:,}"),
        ("events heard", f"{heard:,}"),
        ("state changes heard by each", f"{statistics.median(len(told.states) for told in found.watchers):,.0f}"),
        ("missed", f"{found.gaps}"),
        ("repeated or out of order", f"{found.duplicates}"),
        ("told to start afresh", f"{sum(told.resets for told in found.watchers)}"),
        ("refused", f"{sum(told.refused for told in found.watchers)}"),
        ("errors", f"{sum(bool(told.error) for told in found.watchers)}"),
        (
            "memory of the server, MiB: first, last, grown by",
            f"{found.rss_mib[0]:.0f}, {found.rss_mib[-1]:.0f}, {found.growth_mib:+.1f}",
        ),
        ("streams open after the end", f"{found.left_open}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
