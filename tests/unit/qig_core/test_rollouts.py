"""Picking among rollouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qig_core.errors import InvalidInput
from qig_core.incremental import Noise
from qig_core.inference import (
    Generation,
    generate,
    generate_many,
    mean_log_prob,
    rank_candidates,
    rank_many,
)
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.rollouts import choose
from qig_core.vocabulary import encode_prompt

TINY: dict[str, Any] = {"width": 16, "hidden": 16, "context": 64}


def _said(text: str, mean: float, halt: float) -> Generation:
    return Generation(list(text.encode()), text, mean, math.exp(mean), 1, halt, True)


def test_each_way_of_picking_has_its_reason() -> None:
    rollouts = [_said("a", -0.5, 0.0), _said("b", -0.1, 1.0), _said("c", -0.9, 2.0), _said("a", -0.4, -1.0)]
    assert choose(rollouts, "log_prob").picked is rollouts[1]
    assert choose(rollouts, "halt").picked is rollouts[2]
    majority = choose(rollouts, "majority")
    assert majority.picked is rollouts[3]
    assert majority.agreement == 0.5
    assert [(other.text, other.count) for other in majority.alternatives] == [("b", 1), ("c", 1)]
    with pytest.raises(InvalidInput):
        choose([])


def test_texts_that_only_look_alike_are_different_answers() -> None:
    broken = [Generation([200 + n], "�", -0.1 * (n + 1), 0.5, 1, 0.0, True) for n in range(2)]
    assert choose(broken).agreement == 0.5
    assert len(choose(broken).alternatives) == 1


def test_rollouts_without_noise_are_one_answer() -> None:
    kernel = M8Kernel(KernelConfig.preset("nano", **TINY), seed=1).eval()
    prompt = encode_prompt("hello", 64, 8)
    one, many = generate(kernel, prompt, 6), generate_many(kernel, prompt, 3, 6)
    assert all(rollout.ids == one.ids for rollout in many)
    assert [rollout.mean_log_prob for rollout in many] == pytest.approx([one.mean_log_prob] * 3, abs=1e-5)


def test_noise_makes_rollouts_differ_and_a_seed_repeats_them() -> None:
    kernel = M8Kernel(KernelConfig.preset("nano", **TINY), seed=1).eval()
    prompt = encode_prompt("hello", 64, 8)
    runs = [
        generate_many(kernel, prompt, 6, 6, noise=Noise(0.5, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({rollout.mean_log_prob for rollout in runs[0]}) == 6


def test_a_ranking_over_rollouts_is_the_mean_probability() -> None:
    kernel = M8Kernel(KernelConfig.preset("nano", **TINY), seed=1).eval()
    names = ["yes", "no", "perhaps"]
    noises = [Noise(0.3, torch.Generator().manual_seed(7)) for _ in range(2)]
    scores = rank_many(kernel, ["a question"] * 4, names, noises[0])
    assert len({float(score) for score in scores[:, 0]}) == 4
    ranked = dict(rank_candidates(kernel, "a question", names, noises[1], rollouts=4))
    assert [ranked[name] for name in names] == pytest.approx(scores.exp().mean(0).log().tolist())
    assert mean_log_prob(scores).shape == (3,)


def test_many_observations_rank_as_one_by_one() -> None:
    kernel = M8Kernel(KernelConfig.preset("nano", **TINY), seed=1).eval()
    observations = [f"question {'x' * (n * 7 % 50)} {n}" for n in range(40)]  # some are cropped, and more than a batch
    names = ["yes", "no", "a much longer answer than the others", "n" * 60]
    together = rank_many(kernel, observations, names)
    for row, observation in enumerate(observations):
        alone = dict(rank_candidates(kernel, observation, names))
        assert together[row].tolist() == pytest.approx([alone[name] for name in names], abs=1e-4)
    with pytest.raises(InvalidInput):
        rank_many(kernel, [], names)
