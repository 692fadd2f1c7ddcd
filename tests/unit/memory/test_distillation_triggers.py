"""Triggers: each fires at its threshold and not before, says its numbers, and waits for the cooldown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory.distillation.triggers import Situation, When, decide, judge

QUIET = Situation(tokens=0, experiences=0, episodes=0, seconds_since_run=None, scores=(), stale=False)


@pytest.mark.parametrize(
    ("when", "before", "after", "name"),
    [
        (When(max_history_tokens=1500), replace(QUIET, tokens=1499), replace(QUIET, tokens=1500), "tokens"),
        (When(every_episodes=40), replace(QUIET, episodes=39), replace(QUIET, episodes=40), "episodes"),
        (
            When(every_seconds=3600),
            replace(QUIET, experiences=5, seconds_since_run=3599),
            replace(QUIET, experiences=5, seconds_since_run=3600),
            "elapsed",
        ),
        (
            When(every_seconds=3600),
            replace(QUIET, experiences=0, seconds_since_run=9999),
            replace(QUIET, experiences=1),
            "elapsed",
        ),
        (
            When(plateau_window=4),
            replace(QUIET, scores=[0, 0, 1, 1, 0, 1, 1, 1]),
            replace(QUIET, scores=[0, 0, 1, 1, 1, 1, 0, 0]),
            "plateau",
        ),
        (When(), QUIET, replace(QUIET, stale=True), "stale"),
    ],
)
def test_each_fires_at_its_threshold(when: When, before: Situation, after: Situation, name: str) -> None:
    assert decide(when, before)[0] is None
    assert decide(when, after)[0] == name
    report = {item.name: item for item in judge(when, after)}[name]
    assert report.fires
    assert report.reason
    assert decide(when, replace(after, open_run="run-1")) == (None, "run run-1 is under way")


def test_a_plateau_needs_mistakes_and_enough_scores() -> None:
    when = When(plateau_window=4)
    assert decide(when, replace(QUIET, scores=[1.0] * 8))[0] is None  # nothing left to learn
    assert decide(when, replace(QUIET, scores=[0.0] * 7))[0] is None
    assert decide(when, replace(QUIET, scores=[0.0] * 8))[0] == "plateau"


def test_the_cooldown_delays_and_does_not_forget() -> None:
    when = When(every_episodes=1, cooldown_seconds=600)
    name, reason = decide(when, replace(QUIET, episodes=9, seconds_since_run=500))
    assert name is None
    assert "100 s" in reason
    assert decide(when, replace(QUIET, episodes=9, seconds_since_run=600))[0] == "episodes"


def test_switched_off_is_off() -> None:
    when = When(on_stale=False)
    busy = Situation(10**6, 10**6, 10**6, 10**6, [0.0] * 100, True)
    assert decide(when, busy) == (None, "no trigger fires")
    assert all(report.reason == "switched off" for report in judge(when, busy))


def test_what_is_stale_is_tried_once() -> None:
    tried = replace(QUIET, stale=True, stale_tried=True)
    assert decide(When(), tried)[0] is None
    assert "brought no better one" in judge(When(), tried)[0].reason
