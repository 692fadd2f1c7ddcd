"""When there is no room: the quota pauses instead of deleting, and a disk that refuses costs nothing but the save."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from olympus.errors import StorageFull
from tests.unit.olympus.kernel_world import World, facts

MakeWorld = Callable[..., World]


def test_the_byte_quota_pauses_and_goes_on_when_something_was_removed(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olympus.kernel_thread.ROOM_CHECK_SECONDS", 0.05)
    quota = {"max_bytes": 1 << 20, "min_free_bytes": 0}
    world = make_world(patience_evaluations=10_000, checkpoint_every=10_000, retention=quota)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=1)
    with pytest.raises(StorageFull, match=r"kernels\.retention\.max_bytes|the server's log"):
        _save_until_refused(world, kernel)
    status = world.wait_for(kernel, "paused")
    assert "no room: checkpoints use" in status["state_reason"]
    assert "kernels.retention.max_bytes" in status["state_reason"]
    kept = world.zeus.checkpoints(kernel)
    assert kept["total_bytes"] >= 1 << 20
    assert all(row["pinned"] and row["valid"] for row in kept["checkpoints"]), "nothing was deleted to make room"
    for row in kept["checkpoints"][1:]:
        world.zeus.pin(kernel, row["id"], False)
        world.zeus.delete_checkpoint(kernel, row["id"])
    went_on = world.wait_for(kernel, "training", step=status["step"] + 1)
    assert went_on["step"] > status["step"], "what it had learned was kept in memory"
    world.zeus.checkpoint_store.check_invariants()


def test_a_disk_that_refuses_a_checkpoint_does_not_end_training(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(patience_evaluations=10_000, checkpoint_every=5)
    store = world.zeus.checkpoint_store
    full, refused = True, 0
    publish = store.publish

    def hesitant(*given: Any, **named: Any) -> dict[str, Any]:
        nonlocal refused
        if full:
            refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(*given, **named)

    monkeypatch.setattr(store, "publish", hesitant)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=12)
    assert refused >= 2
    assert world.zeus.checkpoints(kernel)["checkpoints"] == []
    with pytest.raises(StorageFull, match="the server's log"):
        world.zeus.checkpoint_now(kernel)
    full = False
    reached = world.zeus.status(kernel)["step"]
    world.wait_for(kernel, "training", step=reached + 10)
    assert world.zeus.checkpoints(kernel)["checkpoints"][0]["step"] > reached - 5
    full = True
    world.wait_for(kernel, "training", step=world.zeus.status(kernel)["step"] + 2)  # something to lose
    stopped = world.zeus.pause(kernel)
    assert "could not be saved, see the server's log" in stopped["state_reason"]


def test_next_to_delete_is_what_goes_with_the_next_checkpoint(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000, checkpoint_every=10, retention={"every_100_steps": 0})
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=45)
    world.zeus.pause(kernel)
    warned = world.zeus.checkpoints(kernel)["next_to_delete"]
    before = {row["id"] for row in world.zeus.checkpoints(kernel)["checkpoints"]}
    world.zeus.resume(kernel)
    step = world.zeus.status(kernel)["step"]
    world.wait_for(kernel, "training", step=step - step % 10 + 11)
    gone = before - {row["id"] for row in world.zeus.checkpoints(kernel)["checkpoints"]}
    assert set(warned) <= gone


def _save_until_refused(world: World, kernel: str) -> None:
    for _ in range(100):  # each is pinned, so no rule removes it
        world.zeus.checkpoint_now(kernel)
