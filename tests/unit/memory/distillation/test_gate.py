"""Intervals, and what the gate says with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memory.distillation.config import GateConfig
from memory.distillation.errors import EvaluationError
from memory.distillation.evaluation import ArmResult, Evaluation
from memory.distillation.gate import judge
from memory.distillation.statistics import mean_interval, paired_difference


def arm(name: str, right: list[float] | np.ndarray[Any, Any], **fields: Any) -> ArmResult:
    values = np.asarray(right, dtype=float)
    nothing = np.full(len(values), np.nan)
    made: dict[str, Any] = {
        "answers": ("",) * len(values), "exact": values, "ranked": nothing, "nll": nothing, "kl": nothing,
        "prompt_tokens": np.full(len(values), 10), "slots": 0, "seconds": 0.0,
    }  # fmt: skip
    return ArmResult(name=name, **{**made, **fields})


def evaluation(**arms: Any) -> Evaluation:
    made = {name: value if isinstance(value, ArmResult) else arm(name, value) for name, value in arms.items()}
    return Evaluation(tuple(str(number) for number in range(len(next(iter(made.values())).exact))), made)


def shares(rows: int, *right: int) -> list[list[float]]:
    """Answers of several arms: of ``rows``, the first so many right."""
    return [[1.0] * count + [0.0] * (rows - count) for count in right]


def test_bootstrap_agrees_with_theory() -> None:
    random = np.random.default_rng(1)
    one, other = random.normal(1.0, 1.0, 400), random.normal(0.8, 1.0, 400)
    found = paired_difference(one, other)
    error = (one - other).std(ddof=1) / 20
    assert found.difference == pytest.approx((one - other).mean())
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.02)
    assert found.lower == pytest.approx(found.difference - 1.645 * error, abs=0.02)
    assert found.upper == pytest.approx(found.difference + 1.645 * error, abs=0.02)
    assert found == paired_difference(one, other)


def test_pairing_counts() -> None:
    """Equal on each question is certain; equal on average alone is not."""
    right = np.array([1.0, 0.0] * 50)
    assert paired_difference(right, right).low == 0
    assert paired_difference(right, 1 - right).low < -0.1
    assert mean_interval(right)["mean"] == 0.5


def test_intervals_cover_as_often_as_they_say() -> None:
    """One-sided 95 %: about one of twenty times the true difference lies below the bound."""
    random, below = np.random.default_rng(2), 0
    for trial in range(120):
        one = random.random(60) < 0.7
        below += paired_difference(one.astype(float), np.zeros(60), seed=trial).lower > 0.7
    assert below <= 14


def test_equal_to_the_long_prompt_passes() -> None:
    long, memoryless = shares(60, 40, 2)
    verdict = judge(evaluation(cartridge=long, long_prompt=long, memoryless=memoryless), GateConfig())
    assert verdict.passed
    assert verdict.rows == 60
    assert [item.rival for item in verdict.comparisons] == ["long_prompt", "memoryless"]
    assert verdict.reason.startswith("passed on 60 held-out rows: 66.7% against 66.7% with the long prompt")
    assert verdict.numbers()["comparisons"][0]["bound"] == 0


def test_what_was_right_before_a_change_does_not_keep_out_what_is_right_now() -> None:
    """Of 40 questions the newest 16 are of changed conventions: the candidate knows those, the serving one the old."""
    old, new = [1.0] * 24 + [0.0] * 16, [0.0] * 24 + [1.0] * 16
    arms = {"cartridge": new, "serving": old, "memoryless": [0.0] * 40, "long_prompt": [0.0] * 40}
    assert not judge(evaluation(**arms), GateConfig()).passed
    aged = Evaluation(evaluation(**arms).keys, evaluation(**arms).arms, tuple(0.5 ** ((39 - n) / 6) for n in range(40)))
    verdict = judge(aged, GateConfig())
    assert verdict.passed
    assert "40 held-out rows, older ones counting less" in verdict.reason
    assert verdict.comparisons[0].candidate == pytest.approx((1 - 0.5 ** (16 / 6)) / (1 - 0.5 ** (40 / 6)), abs=1e-3)


def test_clearly_worse_is_rejected_with_numbers() -> None:
    cartridge, long, memoryless = shares(60, 20, 40, 2)
    verdict = judge(evaluation(cartridge=cartridge, long_prompt=long, memoryless=memoryless), GateConfig())
    assert not verdict.passed
    assert "rejected on 60 held-out rows: 33.3% against 66.7% with the long prompt" in verdict.reason
    assert "allowed are -5.0" in verdict.reason
    assert "no cartridge" not in verdict.reason  # only what failed


def test_perhaps_worse_is_rejected_where_rows_are_few_and_passes_with_many() -> None:
    """One answer in sixty less: within the margin on average, but how sure is that?"""
    random = np.random.default_rng(3)

    def noisy(rows: int) -> Evaluation:
        long = (random.random(rows) < 0.7).astype(float)
        flipped = random.random(rows) < 0.1
        cartridge = np.where(flipped, 1 - long, long)
        return evaluation(cartridge=cartridge, long_prompt=long, memoryless=[0.0] * rows)

    assert not judge(noisy(30), GateConfig()).passed
    assert judge(noisy(2000), GateConfig(margin=0.1)).passed


def test_the_serving_cartridge_is_a_rival_if_wanted() -> None:
    cartridge, serving, memoryless = shares(60, 30, 50, 2)
    arms = {"cartridge": cartridge, "long_prompt": cartridge, "memoryless": memoryless, "serving": serving}
    assert "with the serving cartridge" in judge(evaluation(**arms), GateConfig()).reason
    assert not judge(evaluation(**arms), GateConfig()).passed
    assert judge(evaluation(**arms), GateConfig(must_beat_serving=False)).passed


def test_worse_than_no_memory_is_rejected() -> None:
    cartridge, memoryless = shares(60, 10, 40)
    verdict = judge(evaluation(cartridge=cartridge, long_prompt=cartridge, memoryless=memoryless), GateConfig())
    assert not verdict.passed
    assert "with no cartridge" in verdict.reason


def test_too_few_rows() -> None:
    one = shares(7, 7)[0]
    verdict = judge(evaluation(cartridge=one, long_prompt=one, memoryless=one), GateConfig())
    assert not verdict.passed
    assert verdict.reason.startswith("not enough held-out rows: 7, gate.min_rows is 20. The candidate is rejected")
    assert judge(evaluation(cartridge=one, long_prompt=one, memoryless=one), GateConfig(min_rows=5)).passed


def test_rows_without_candidates_do_not_count_for_ranked() -> None:
    ranked = np.array([1.0] * 10 + [np.nan] * 50)
    arms = {name: arm(name, [1.0] * 60, ranked=ranked) for name in ("cartridge", "long_prompt", "memoryless")}
    verdict = judge(evaluation(**arms), GateConfig(metric="ranked"))
    assert "not enough held-out rows with candidates: 10" in verdict.reason
    assert judge(evaluation(**arms), GateConfig(metric="ranked", min_rows=10)).passed


def test_a_long_prompt_that_does_not_work_is_no_parity() -> None:
    cartridge, long, memoryless = shares(60, 50, 10, 5)
    verdict = judge(evaluation(cartridge=cartridge, long_prompt=long, memoryless=memoryless), GateConfig())
    assert verdict.passed
    assert "says nothing about parity" in verdict.reason


def test_divergence() -> None:
    random = np.random.default_rng(4)
    none = random.normal(2.0, 0.5, 40)
    arms = {
        "memoryless": arm("memoryless", [0.0] * 40, kl=none),
        "cartridge": arm("cartridge", [0.0] * 40, kl=none - 1.5),
        "serving": arm("serving", [0.0] * 40, kl=none - 1.53),
    }
    config = GateConfig(metric="kl")
    verdict = judge(evaluation(**arms), config)
    assert verdict.passed
    assert "nats from the long prompt" in verdict.reason
    assert not judge(evaluation(**{**arms, "cartridge": arm("cartridge", [0.0] * 40, kl=none)}), config).passed
    better = {**arms, "serving": arm("serving", [0.0] * 40, kl=none - 1.7)}
    assert "with the serving cartridge" in judge(evaluation(**better), config).reason
    assert not judge(evaluation(**better), config).passed


def test_without_a_candidate_there_is_nothing_to_judge() -> None:
    with pytest.raises(EvaluationError, match="was not measured"):
        judge(evaluation(memoryless=[1.0] * 30), GateConfig())


def test_right_answers_must_be_likelier_than_without_memory() -> None:
    """Nothing right anywhere: not worse than anything, and still no memory."""
    rows, none = 40, [0.0] * 40
    noise = np.random.default_rng(0).normal(0, 0.2, rows)
    for cost, passed in ((9.0, True), (10.0, False), (11.0, False)):
        made = evaluation(
            memoryless=arm("memoryless", none, nll=np.full(rows, 10.0)),
            long_prompt=arm("long_prompt", none, nll=np.full(rows, 5.0)),
            cartridge=arm("cartridge", none, nll=cost + noise - noise.mean()),
        )
        verdict = judge(made, GateConfig(margin=0.05, min_rows=20))
        assert verdict.passed is passed
        assert verdict.comparisons[-1].metric == "nll"
        assert ("nats against 10.00 with no cartridge" in verdict.reason) or passed
