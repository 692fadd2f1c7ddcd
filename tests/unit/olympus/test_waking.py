"""A kernel at rest, and what comes in: the whole way from the history to the event."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from memory.history import NewExperience
from olympus import continuous_trainer
from tests.unit.olympus.kernel_world import World, write_facts
from tests.unit.olympus.test_training_session import Bench


def test_another_domain_wakes_a_settled_kernel_and_an_event_says_why(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_trainer, "EXAMINE_SECONDS", 0.1)
    world = make_world(start=False, holdout_percent=30)
    bench = Bench(world, world.settings.kernels)
    write_facts(world.history, 400)
    session = bench.open()
    for _ in range(100):
        session.advance()
    session.remember_rest("settled", "because")
    bench.save(session)
    world.zeus.rows.progress(bench.kernel.id, 100, session.report())
    world.zeus.rows.set_state(bench.kernel.id, "settled", "because", step=100)

    world.zeus.start()
    kernel = bench.kernel.id
    rested = world.zeus.status(kernel)
    assert rested["state"] == "settled"
    assert rested["plasticity"]["units"] == 32
    assert rested["prequential"]["tested"] + rested["prequential"]["skipped"] == rested["buffer"]["seen"]
    assert rested["drift"]["detections"] == 0
    subscription = world.hub.subscribe(["kernel.drift"], where={"kernel_id": kernel})
    drawer = random.Random(5)
    words = ["".join(drawer.choice("qxzjvk") for _ in range(6)) for _ in range(40)]
    world.history.append([NewExperience(f"{word} {n}", word[::-1], "d", "api") for n, word in enumerate(words)])
    woken = world.wait_for(kernel, "training", seconds=60, step=101)
    assert "drift" in woken["state_reason"]
    (event, *_) = subscription.get(5.0)
    assert event.topic == "kernel.drift"
    assert event.data["step"] == 100
    assert event.data["after"] > event.data["before"]
    assert woken["state_reason"] == event.data["reason"]
    assert woken["drift"]["last"]["step"] == 100
