"""The Replit branch (``REPL_ID``): one trainer, the processor, a temporary directory, a mirror in the database."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from olympus.zeus import REPLIT_CHECKPOINTS, checkpoint_root
from tests.unit.olympus.kernel_world import World, facts, make_settings

MakeWorld = Callable[..., World]


@pytest.fixture
def on_replit(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], World]:
    monkeypatch.setenv("REPL_ID", "x")
    return lambda: make_world(checkpoint_dir=str(tmp_path / "volatile"), patience_evaluations=10_000)


def test_one_trains_and_the_next_stands_in_line(on_replit: Callable[[], World]) -> None:
    world = on_replit()
    assert world.zeus.limit == 1
    first = world.tiny("athena", experiences=tuple(facts(40)))
    world.wait_for(first, "training", step=1)
    second = world.tiny("hermes", experiences=tuple(facts(40, start=500)))
    line = world.wait_for(second, "queued")
    assert line["queue_position"] == 1
    world.wait_for(first, "training", step=10)
    assert world.zeus.status(second)["state"] == "queued"
    world.zeus.pause(first)
    world.wait_for(second, "training", step=1)


def test_weights_stay_on_the_processor(on_replit: Callable[[], World]) -> None:
    world = on_replit()
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=12)
    snapshot = world.zeus.snapshots.get(kernel, "latest")
    assert snapshot is not None
    assert {parameter.device.type for parameter in snapshot.kernel.parameters()} == {"cpu"}


def test_the_checkpoints_are_temporary_unless_the_settings_say_where(tmp_path: Path) -> None:
    assert checkpoint_root(make_settings(tmp_path), on_replit=True) == REPLIT_CHECKPOINTS == Path("/tmp/m8_checkpoints")
    chosen = make_settings(tmp_path, checkpoint_dir=str(tmp_path / "mine"))
    assert checkpoint_root(chosen, on_replit=True) == tmp_path / "mine"
    assert checkpoint_root(make_settings(tmp_path), on_replit=False) == tmp_path / "data" / "kernels"


def test_when_the_disk_is_lost_the_database_brings_every_kernel_back(on_replit: Callable[[], World]) -> None:
    world = on_replit()
    steps = {}
    for number, name in enumerate(("athena", "hermes")):
        kernel = world.tiny(name, experiences=tuple(facts(40, start=1000 * number)))
        world.wait_for(kernel, "training", step=3)
        steps[kernel] = world.zeus.pause(kernel)["step"]
    world.zeus.shutdown(5)
    shutil.rmtree(world.zeus.checkpoint_root)
    again = on_replit()
    for kernel, step in steps.items():
        rows = again.zeus.checkpoints(kernel)["checkpoints"]
        assert [row["step"] for row in rows] == [step]
        assert rows[0]["valid"]
    again.zeus.checkpoint_store.check_invariants()
