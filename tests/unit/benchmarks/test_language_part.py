"""The language benchmark is fair: a causal GPT of nanoGPT's shape, equal parameters, and a clock for each arm."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_parts import language
from benchmarks.kernel_parts.gpt import Gpt, GptConfig, parameter_count
from qig_core.m8_kernel import M8Kernel

SMALL = GptConfig(layers=2, width=16, heads=2, context=16)


def test_the_gpt_has_nano_gpts_parameters_and_ties_its_head():
    width, layers = SMALL.width, SMALL.layers
    expected = layers * (12 * width**2 + 2 * width) + (256 + SMALL.context) * width + width
    assert parameter_count(Gpt(SMALL)) == expected


def test_the_gpt_is_causal():
    gpt, ids = Gpt(SMALL), torch.arange(16).unsqueeze(0)
    edited = ids.clone()
    edited[0, 9] = 200
    before, after = gpt(ids), gpt(edited)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_the_gpt_starts_indifferent_and_decays_matrices_only():
    gpt = Gpt(SMALL, seed=3)
    nats = torch.nn.functional.cross_entropy(gpt(torch.arange(16).unsqueeze(0))[0], torch.arange(100, 116))
    assert nats.item() == pytest.approx(5.545, abs=0.1)  # ln 256
    decayed, plain = gpt.optimizer(1e-3).param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert decayed["weight_decay"] == 0.1
    assert {p.dim() for p in plain["params"]} == {1}
    assert plain["weight_decay"] == 0.0


def test_impossible_gpt_shapes_are_errors():
    with pytest.raises(ValueError, match="multiple"):
        GptConfig(layers=1, width=10, heads=3, context=8)


def test_both_arms_have_the_same_parameters():
    target = parameter_count(Gpt(language.GPT))
    config = language.kernel_config(target)
    assert abs(parameter_count(M8Kernel(config)) - target) < 0.03 * target
    assert config.inner_cycles >= 3
    assert config.outer_cycles >= 2
    assert config.memory_tokens >= 8


def test_an_arm_spends_its_budget_in_turns_and_no_more():
    text = torch.tensor(list(b"to be or not to be, that is the question. " * 20))
    arms = [make(1, 1e-3, 0.5, text) for make in language.ARMS.values()]
    for arm in arms:
        arm.advance(0.2)
        assert arm.spent >= 0.2
        assert arm.steps >= 1
        first = arm.steps
        arm.advance(10.0)
        assert arm.spent >= 0.5
        assert arm.steps > first
        done = arm.steps
        arm.advance(10.0)
        assert arm.steps == done, "the budget is spent"
    kernel, gpt = (torch.Generator().manual_seed(1) for _ in range(2))
    assert torch.equal(language.random_windows(text, 64, 8, kernel), language.random_windows(text, 64, 8, gpt)), (
        "the generator decides, not the model"
    )
    raw, ema = arms[0].bits(text[:200])
    assert raw < 8
    assert ema < 9


def test_the_schedule_warms_up_and_ends_at_its_floor():
    shares = [language._schedule(share) for share in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert shares[0] < 0.1
    assert shares[0] < shares[1] < shares[2]
    assert shares[3] == pytest.approx(0.55)
    assert shares[4] == pytest.approx(language.FLOOR)
