"""The main claim, as a user would check it: fed over REST, a kernel learns; its control on shuffled labels does not."""

from __future__ import annotations

import csv
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server, running

SEED = 20261122
INTENTS = [
    "card_arrival",
    "exchange_rate",
    "top_up_failed",
    "pin_blocked",
    "card_payment_fee_charged",
    "transfer_timing",
]
COUNT, ASKED, STEPS, SECONDS = 300, 100, 200, 700


def _messages(path: Path, rng: random.Random, count: int) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["category"] in INTENTS]
    rng.shuffle(rows)
    return [{"observation": row["text"], "action": row["category"]} for row in rows[:count]]


def _accuracy(server: Server, kernel: str, asked: list[dict[str, str]]) -> float:
    """Share of unseen messages for which the kernel ranks the right one of the six intents first."""
    right = 0
    for pair in asked:
        body = {"input": pair["observation"], "candidates": INTENTS}
        answer: dict[str, Any] = server.json("POST", f"/olympus/kernels/{kernel}/query", json=body)
        right += answer["output"] == pair["action"]
    return right / len(asked)


def _spawn(server: Server, domain: str, pairs: list[dict[str, str]]) -> str:
    kernel = server.json("POST", "/olympus/kernels/spawn", 201, json={"domain": domain, "seed": SEED})["kernel"]
    fed = server.json("POST", f"/olympus/kernels/{kernel['kernel_id']}/experiences", 201, json={"experiences": pairs})
    assert fed["accepted"] >= 200
    return str(kernel["kernel_id"])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 100)
def test_a_kernel_beats_the_baseline_and_its_shuffled_control_does_not(shared_data: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    pairs = _messages(shared_data / "banking77" / "train.csv", rng, COUNT)
    unseen = _messages(shared_data / "banking77" / "test.csv", rng, ASKED)
    labels = [pair["action"] for pair in pairs]
    rng.shuffle(labels)
    shuffled = [pair | {"action": label} for pair, label in zip(pairs, labels, strict=True)]
    with running(tmp_path, {"OLYMPUS_MODEL__LOAD": "false"}) as server:
        real, control = _spawn(server, "banking", pairs), _spawn(server, "banking-shuffled", shuffled)
        begun, gates = time.monotonic(), []
        while time.monotonic() - begun < SECONDS:
            status = {name: server.json("GET", f"/olympus/kernels/{name}/status") for name in (real, control)}
            gates.append(status[control]["loss"]["below_baseline"])
            if min(item["step"] for item in status.values()) >= STEPS:
                break
            threading.Event().wait(2)
        accuracy = {name: _accuracy(server, name, unseen) for name in (real, control)}
    for name in (real, control):
        loss = status[name]["loss"]
        print(  # noqa: T201
            f"seed {SEED}: {name} step {status[name]['step']} held-out {loss['holdout']:.4f} best {loss['best']:.4f} "
            f"baseline {loss['baseline_context_free']:.4f}; right for {accuracy[name]:.0%} of {ASKED} unseen messages; "
            f"{loss['gate']}"
        )
    assert status[real]["step"] >= STEPS, "too slow to judge"
    assert status[real]["loss"]["below_baseline"], status[real]["loss"]
    assert status[real]["loss"]["best"] < status[real]["loss"]["baseline_context_free"]
    assert not any(gates), "the control passed the learning gate"
    assert accuracy[real] > 0.4, "chance is 17 %"
