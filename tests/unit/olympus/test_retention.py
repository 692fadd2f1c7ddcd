"""Retention against a brute-force oracle that simulates twelve thousand steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from olympus.retention import Candidate, best_of, kept_by, next_to_delete, policy_json
from settings import RetentionSettings

POLICY = RetentionSettings()


def oracle_keeps(candidate: Candidate, everything: list[Candidate], policy: RetentionSettings, used: set[str]) -> bool:
    """The rules, written the slow way round: count how many newer multiples there are."""
    newer = [other for other in everything if other.step > candidate.step]
    if not newer or candidate.pinned or candidate.name in used:
        return True
    if candidate.converged and policy.keep_converged:
        return True
    for stride, count in ((100, policy.every_100_steps), (1000, policy.every_1000_steps)):
        if candidate.step % stride == 0 and sum(other.step % stride == 0 for other in newer) < count:
            return True
    if candidate.holdout_loss is None:
        return False
    losses = [other.holdout_loss for other in everything if other.holdout_loss is not None]
    tied = [other.step for other in everything if other.holdout_loss == min(losses)]
    return candidate.holdout_loss == min(losses) and candidate.step == max(tied)


@hypothesis_settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_twelve_thousand_steps_equal_the_oracle(data: st.DataObject) -> None:
    policy = RetentionSettings(
        every_100_steps=data.draw(st.integers(0, 6)),
        every_1000_steps=data.draw(st.integers(0, 11)),
        keep_converged=data.draw(st.booleans()),
    )
    stride = data.draw(st.sampled_from([50, 100, 130, 250]))
    odd = data.draw(st.sets(st.integers(1, 12_000), max_size=10))
    alive: list[Candidate] = []
    for step in sorted({*range(stride, 12_001, stride), *odd}):
        name = f"step-{step:08d}"
        loss = data.draw(st.sampled_from([None, 1.0, 1.5, 2.0])) if step in odd else 5.0 - step % 7
        alive.append(
            Candidate(name, step, loss, converged=step in odd and step % 3 == 0, pinned=step in odd and step % 5 == 0)
        )
        used = {alive[len(alive) // 2].name} if step % 900 == 0 else set()
        reasons = kept_by(alive, policy, used)
        expected = {item.name for item in alive if oracle_keeps(item, alive, policy, used)}
        assert {name for name, rules in reasons.items() if rules} == expected
        alive = [item for item in alive if reasons[item.name]]


def test_plain_run_keeps_five_hundreds_and_ten_thousands() -> None:
    everything = [Candidate(str(step), step) for step in range(100, 12_001, 100)]
    reasons = kept_by(everything, POLICY)
    kept = sorted(int(name) for name, rules in reasons.items() if rules)
    assert kept == [*range(3000, 12_000, 1000), *range(11_600, 12_001, 100)]
    assert reasons["12000"] == ["every_100_steps", "every_1000_steps", "latest"]


def test_next_to_delete_is_what_the_next_checkpoint_displaces() -> None:
    everything = [Candidate(str(step), step) for step in range(100, 501, 100)]
    assert next_to_delete(everything, POLICY, next_step=600) == ["100"]
    assert next_to_delete(everything, POLICY, next_step=650) == []
    assert next_to_delete(everything, POLICY, next_step=600, in_use={"100"}) == []
    assert next_to_delete([], POLICY, next_step=100) == []


def test_best_ignores_what_was_not_measured_and_prefers_the_newer_of_equals() -> None:
    assert best_of([Candidate("a", 1), Candidate("b", 2)]) is None
    found = best_of([Candidate("a", 1, 0.5), Candidate("b", 2, 0.5), Candidate("c", 3, 0.9)])
    assert found is not None
    assert found.name == "b"


@pytest.mark.parametrize(("keep", "shown"), [(True, None), (False, 0)])
def test_policy_is_json_without_infinity(keep: bool, shown: int | None) -> None:
    assert policy_json(RetentionSettings(keep_converged=keep))["converged"] is shown
