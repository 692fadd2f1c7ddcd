"""``kill -9`` during chat and training: it boots, every acknowledged exchange is there, the checkpoints load."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage.files import PARTIAL_PREFIX
from tests.support.server import Server

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
SEED = 20261122
#: Training does not give way here, and saves often: the loop is about what a kill can destroy.
QUICK = {
    "OLYMPUS_KERNELS__CHECKPOINT_EVERY": "5",
    "OLYMPUS_KERNELS__SERVE_PAUSE_MS": "0",
    "OLYMPUS_KERNELS__NICENESS": "0",
}


def _pairs(count: int, rng: random.Random) -> list[dict[str, str]]:
    words = ["card", "cash", "bank", "fee", "transfer", "limit"]
    chosen = [(rng.choice(words), rng.randrange(10_000)) for _ in range(count)]
    return [{"observation": f"my {word} question number {n}", "action": word} for word, n in chosen]


class _Chatter(threading.Thread):
    """Chats until the server dies; remembers the experience id and answer of each exchange it saw end."""

    def __init__(self, server: Server, name: str):
        super().__init__(daemon=True)
        self.server = server
        self.label = name
        self.acknowledged: dict[int, str] = {}

    def run(self) -> None:
        number = 0
        try:
            with httpx.Client(base_url=self.server.url, timeout=60, trust_env=False) as client:
                while True:
                    number += 1
                    self._one(client, f"{self.label} says {number}", stream=number % 2 == 0)
        except httpx.TransportError:
            return  # the server is dead, as planned

    def _one(self, client: httpx.Client, text: str, stream: bool) -> None:
        body = {"model": "smollm2-135m-instruct", "max_tokens": 4, "stream": stream}
        body["messages"] = [{"role": "user", "content": text}]  # type: ignore[assignment]
        if not stream:
            answer = client.post("/v1/chat/completions", json=body).json()
            self.acknowledged[answer["olympus"]["experience_id"]] = text
            return
        experience: int | None = None
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]" and experience is not None:
                    self.acknowledged[experience] = text
                elif line.startswith("data: {"):
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    experience = chunk.get("olympus", {}).get("experience_id", experience)


def _history(server: Server) -> dict[int, str]:
    found: dict[int, str] = {}
    before: int | None = None
    while True:
        query = {"limit": 200} | ({} if before is None else {"before": before})
        page = server.json("GET", "/olympus/history", params=query)["experiences"]
        if not page:
            return found
        found |= {item["id"]: item["observation"] for item in page}
        before = page[-1]["id"]


def _pause(server: Server, kernel: str) -> None:
    server.json("POST", f"/olympus/kernels/{kernel}/pause", json={})
    for _ in range(2400):
        if server.json("GET", f"/olympus/kernels/{kernel}/status")["state"] == "paused":
            return
        threading.Event().wait(0.05)
    raise AssertionError("the kernel did not pause")


def _wait_for_something_to_lose(server: Server, kernel: str, chatters: list[_Chatter], acknowledged: bool) -> None:
    """Until an exchange was acknowledged and a checkpoint written, or two minutes have passed."""
    for _ in range(600):
        acknowledged = acknowledged or any(chatter.acknowledged for chatter in chatters)
        if acknowledged and server.json("GET", f"/olympus/kernels/{kernel}/checkpoints")["checkpoints"]:
            return
        threading.Event().wait(0.2)


def _kill_loop(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(SEED)
    acknowledged: dict[int, str] = {}
    last_step, kernel = 0, ""
    for round_number in range(rounds):
        left = list(tmp_path.rglob(f"{PARTIAL_PREFIX}*"))  # by the process that was killed; each has a name of its own
        server = Server(tmp_path, QUICK)
        try:
            server.wait_ready()
            assert not [path for path in left if path.exists()], "the janitor left something"
            stored = _history(server)
            assert acknowledged.items() <= stored.items(), "an acknowledged exchange is gone"
            if not kernel:
                kernel = server.json("POST", "/olympus/kernels/spawn", 201, json={"domain": "general"})["kernel"][
                    "kernel_id"
                ]
            status = server.json("GET", f"/olympus/kernels/{kernel}/status")
            assert status["state"] in ("queued", "training", "waiting"), status
            assert status["step"] >= last_step, "training went back behind a published checkpoint"
            fed = server.json(
                "POST", f"/olympus/kernels/{kernel}/experiences", 201, json={"experiences": _pairs(24, rng)}
            )
            assert fed["accepted"] + fed["duplicates"] == 24
            chatters = [_Chatter(server, f"client {round_number}.{index}") for index in range(2)]
            for chatter in chatters:
                chatter.start()
            threading.Event().wait(rng.uniform(1.0, 7.0))
            if round_number == rounds - 1:  # a slow machine may not have come so far in all the rounds
                _wait_for_something_to_lose(server, kernel, chatters, bool(acknowledged))
            checkpoints = server.json("GET", f"/olympus/kernels/{kernel}/checkpoints")["checkpoints"]
            assert all(item["valid"] for item in checkpoints)
            last_step = max((item["step"] for item in checkpoints), default=0)
            server.kill()
            for chatter in chatters:
                chatter.join(20)
                acknowledged |= chatter.acknowledged
        finally:
            server.stop()
    assert acknowledged, "nothing was ever acknowledged: the loop proves nothing"
    assert last_step > 0, "no checkpoint was ever written: the loop proves nothing"
    server = Server(tmp_path, QUICK)
    try:
        server.wait_ready()
        assert acknowledged.items() <= _history(server).items()
        for one in server.json("GET", "/olympus/kernels")["kernels"]:  # the first one, which the server spawned, too
            _pause(server, one["kernel_id"])  # a trainer publishes and removes checkpoints between two looks
        checkpoints = server.json("GET", f"/olympus/kernels/{kernel}/checkpoints")["checkpoints"]
        on_disk = {path.name for path in (tmp_path / "kernels" / kernel).iterdir() if path.name.startswith("step-")}
        assert {item["id"] for item in checkpoints} <= on_disk
        assert len(on_disk) <= len(checkpoints) + 1, "checkpoint directories without a row pile up"
        assert not list(tmp_path.rglob(f"{PARTIAL_PREFIX}*"))
        print(f"seed {SEED}: {rounds} kills, {len(acknowledged)} acknowledged exchanges kept, step {last_step}")  # noqa: T201
    finally:
        server.stop()


def test_three_kills_lose_nothing(smollm2: object, tmp_path: Path) -> None:
    _kill_loop(tmp_path, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_nothing(smollm2: object, tmp_path: Path) -> None:
    _kill_loop(tmp_path, rounds=20)
