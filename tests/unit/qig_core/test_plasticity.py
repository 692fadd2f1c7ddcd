"""Plasticity: dead units are counted, rank and norm are what they are called, and nothing is touched."""

from __future__ import annotations

import math

import pytest
import torch

from qig_core.errors import InvalidInput
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.plasticity import effective_rank, measure_plasticity
from qig_core.vocabulary import PAD


def kernel() -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", width=16, hidden=24, heads=2, context=64), seed=0)


def probe() -> torch.Tensor:
    return torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))


def test_units_whose_gate_is_shut_are_dead() -> None:
    subject = kernel()
    fresh = measure_plasticity(subject, probe())
    assert fresh.units == 2 * 24
    assert fresh.dead_units == 0
    with torch.no_grad():
        subject.blocks[1].gate_up.weight[24 + 3 : 24 + 8] = 0.0  # "up" of five hidden units
    assert measure_plasticity(subject, probe()).dead_units == 5


def test_padding_does_not_count() -> None:
    padded = torch.cat((probe(), torch.full((6, 9), PAD)), dim=1)
    plain, wide = measure_plasticity(kernel(), probe()), measure_plasticity(kernel(), padded)
    assert wide.eff_rank == pytest.approx(plain.eff_rank, rel=1e-4)
    assert (wide.dead_units, wide.weight_norm) == (plain.dead_units, plain.weight_norm)
    with pytest.raises(InvalidInput, match="no symbol"):
        measure_plasticity(kernel(), torch.full((2, 4), PAD))


def test_the_kernel_is_left_as_it_was() -> None:
    subject = kernel().train()
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    measure_plasticity(subject, probe())
    assert subject.training
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.state_dict().items())
    assert not any(module._forward_pre_hooks for module in subject.modules())


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4, 4)) == 1.0
    two = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_weight_norm_is_that_of_the_recursion() -> None:
    subject = kernel()
    square = sum(float(p.detach().double().pow(2).sum()) for p in subject.blocks.parameters())
    assert measure_plasticity(subject, probe()).weight_norm == pytest.approx(math.sqrt(square))
