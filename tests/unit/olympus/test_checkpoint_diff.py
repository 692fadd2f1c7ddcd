"""What changed between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from olympus.errors import CheckpointNotFound, KernelNotFound
from tests.unit.olympus.kernel_world import World, facts

MakeWorld = Callable[..., World]


def test_two_moments_of_a_life(make_world: MakeWorld) -> None:
    zeus = (world := make_world(patience_evaluations=10_000, phi_every=10)).zeus
    kernel = world.tiny(experiences=tuple(facts(60)))
    world.wait_for(kernel, "training", step=12)
    early = zeus.checkpoint_now(kernel)
    world.wait_for(kernel, "training", step=early["step"] + 30)
    late = zeus.checkpoint_now(kernel)
    zeus.pause(kernel)

    told = zeus.compare_checkpoints(kernel, early["name"], late["name"])
    assert (told["base"]["step"], told["other"]["step"]) == (early["step"], late["step"])
    seen = told["numbers"]["bytes_seen"]
    assert seen["change"] == seen["other"] - seen["base"] > 0
    loss = told["numbers"]["holdout_loss"]
    assert loss["change"] == pytest.approx(loss["other"] - loss["base"])
    store = zeus.checkpoint_store
    one, other = (store.load(kernel, name, "ema").tensors["ema"] for name in (early["name"], late["name"]))
    whole = torch.cat([(other[name] - one[name]).flatten() for name in one]).norm()
    before = torch.cat([tensor.flatten() for tensor in one.values()]).norm()
    assert told["weights"]["moved"] == pytest.approx(float(whole / before), rel=1e-4)
    assert told["weights"]["numbers"] == sum(part["numbers"] for part in told["weights"]["parts"])
    moved = [part["moved"] for part in told["weights"]["parts"] if part["moved"] is not None]
    assert moved == sorted(moved, reverse=True)
    assert {"blocks.0", "head"} <= {part["part"] for part in told["weights"]["parts"]}

    nothing = zeus.compare_checkpoints(kernel, late["name"], late["name"])
    assert nothing["weights"]["moved"] == 0.0
    assert nothing["basin_distance"] in (None, pytest.approx(0.0, abs=1e-6))
    assert {item["change"] for item in nothing["numbers"].values()} <= {0, None}


def test_what_is_not_there(make_world: MakeWorld) -> None:
    world = make_world()
    with pytest.raises(KernelNotFound):
        world.zeus.compare_checkpoints("nobody-000000", "step-00000001", "step-00000002")
    kernel = world.tiny(train=False)
    with pytest.raises(CheckpointNotFound):
        world.zeus.compare_checkpoints(kernel, "step-00000001", "step-00000002")
