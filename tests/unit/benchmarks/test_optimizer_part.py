"""The optimizer benchmark is fair: all arms start from the same weights and see the same batches, each on its clock."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.kernel_parts import optimizer
from qig_core.learning import collate
from qig_core.optimizers import DiagonalFisherOptimizer
from qig_core.vocabulary import encode_pair


def _rows(count: int = 200, intents: int = 8) -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [("".join(draw.choices("abcd ", k=6)), f"intent{draw.randrange(intents)}") for _ in range(count)]


def _flat(arm: optimizer.Arm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in arm.kernel.parameters()])


def test_arms_begin_alike_and_decay_the_same_matrices():
    arms = [optimizer.Arm(name, 1e-3, seed=5) for name in optimizer.NAMES]
    assert isinstance(arms[0].optimizer, torch.optim.AdamW)
    assert all(isinstance(arm.optimizer, DiagonalFisherOptimizer) for arm in arms[1:])
    for arm in arms[1:]:
        assert torch.equal(_flat(arm), _flat(arms[0]))
        for ours, theirs in zip(arm.optimizer.param_groups, arms[0].optimizer.param_groups, strict=True):
            assert ours["weight_decay"] == theirs["weight_decay"]
            assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]


def test_every_arm_moves_and_is_timed():
    batch = collate([encode_pair("ab", "cd", 256), encode_pair("ef", "gh", 256)])
    for name in optimizer.NAMES:
        arm = optimizer.Arm(name, 1e-3, seed=1)
        before = _flat(arm)
        arm.step(batch)
        arm.evaluate(batch)
        assert not torch.equal(before, _flat(arm))
        assert arm.step_seconds[0] > 0
        assert arm.curve[0][0] == arm.step_seconds[0]


def test_held_out_messages_are_not_trained_on_and_come_from_the_same_six_intents():
    rows = _rows()
    train, held = optimizer._pairs(rows, seed=1, context=256)
    actions = {pair.action for pair in train}
    assert len(actions) <= optimizer.INTENTS
    assert held.ids.shape[0] == optimizer.HELD
    again, _ = optimizer._pairs(rows, seed=1, context=256)
    other, _ = optimizer._pairs(rows, seed=2, context=256)
    assert [pair.ids for pair in again] == [pair.ids for pair in train]
    assert [pair.ids for pair in other] != [pair.ids for pair in train]
    assert len(train) + optimizer.HELD == sum(action in actions for _, action in rows)


def test_equal_time_is_read_off_the_curve():
    arm = optimizer.Arm(optimizer.REFERENCE, 1e-3, seed=1)
    arm.curve = [(1.0, 2.0), (2.0, 1.0), (4.0, 0.5)]
    assert arm.at_time(1.5) == pytest.approx(1.5)
    assert arm.at_time(3.0) == pytest.approx(0.75)
    assert arm.at_time(4.0) == arm.at_time(9.0) == 0.5
