"""When a domain is distilled: four triggers and a person, each with the numbers that it looked at.

    tokens       the history since the last distillation has more tokens than an agent should carry
    episodes     so many experiences or episodes were lived through since
    elapsed      so much time has passed, and something new was lived through
    plateau      the scores of the newest experiences are no better than those before, and mistakes remain
    stale        an experience that the serving cartridge learned from was deleted or corrected, and nothing was
                 tried about it yet

A trigger that fires within ``cooldown`` of the last run waits. Pure functions of what ``History`` and the rows say:
who acts on it is the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class When:
    """Thresholds; None switches a trigger off. Times in seconds."""

    max_history_tokens: int | None = None
    every_episodes: int | None = None
    every_seconds: float | None = None
    plateau_window: int | None = None
    min_improvement: float = 0.02
    cooldown_seconds: float = 600.0
    on_stale: bool = True


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of a domain. ``scores``: of the experiences since the last run, oldest first, unscored left out."""

    tokens: int
    experiences: int
    episodes: int
    seconds_since_run: float | None  #: since the last run ended; None when there was none
    scores: Sequence[float]
    stale: bool
    open_run: str | None = None
    stale_tried: bool = False  #: a run for that brought no new cartridge, and nothing was lived through since


@dataclass(frozen=True, slots=True)
class TriggerReport:
    """One trigger: where it stands, what it waits for, and whether it fires."""

    name: str
    fires: bool
    value: float | None
    threshold: float | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def judge(when: When, now: Situation) -> list[TriggerReport]:
    """All triggers, in the order in which they are asked."""
    return [_stale(when, now), _tokens(when, now), _episodes(when, now), _elapsed(when, now), _plateau(when, now)]


def decide(when: When, now: Situation) -> tuple[str | None, str]:
    """The name of the trigger that starts a run now, or None; and the reason in words."""
    fired = [report for report in judge(when, now) if report.fires]
    if now.open_run is not None:
        return None, f"run {now.open_run} is under way"
    if not fired:
        return None, "no trigger fires"
    since = now.seconds_since_run
    if since is not None and since < when.cooldown_seconds:
        return None, f"{fired[0].name} fires, and waits {when.cooldown_seconds - since:.0f} s for the cooldown to end"
    return fired[0].name, fired[0].reason


def _at_least(name: str, value: float, threshold: float | None, what: str) -> TriggerReport:
    if threshold is None:
        return TriggerReport(name, False, value, None, "switched off")
    fires = value >= threshold
    return TriggerReport(name, fires, value, threshold, f"{value:g} {what} of {threshold:g}")


def _stale(when: When, now: Situation) -> TriggerReport:
    if not when.on_stale:
        return TriggerReport("stale", False, float(now.stale), None, "switched off")
    said = "the serving cartridge learned from what was deleted since" if now.stale else "nothing it learned is gone"
    if now.stale and now.stale_tried:
        said += ", but the last run brought no better one, and nothing was lived through since"
    return TriggerReport("stale", now.stale and not now.stale_tried, float(now.stale), 1.0, said)


def _tokens(when: When, now: Situation) -> TriggerReport:
    return _at_least("tokens", now.tokens, when.max_history_tokens, "tokens since the last distillation")


def _episodes(when: When, now: Situation) -> TriggerReport:
    return _at_least("episodes", now.episodes, when.every_episodes, "episodes since the last distillation")


def _elapsed(when: When, now: Situation) -> TriggerReport:
    if when.every_seconds is None:
        return TriggerReport("elapsed", False, now.seconds_since_run, None, "switched off")
    if not now.experiences:
        return TriggerReport("elapsed", False, now.seconds_since_run, when.every_seconds, "nothing new to learn")
    if now.seconds_since_run is None:
        return TriggerReport("elapsed", True, None, when.every_seconds, "never distilled before")
    return _at_least("elapsed", now.seconds_since_run, when.every_seconds, "s since the last distillation")


def _plateau(when: When, now: Situation) -> TriggerReport:
    """Mean score of the last window against the one before it; a window of right answers alone is no plateau."""
    window = when.plateau_window
    if window is None:
        return TriggerReport("plateau", False, None, None, "switched off")
    if len(now.scores) < 2 * window:
        missing = 2 * window - len(now.scores)
        return TriggerReport("plateau", False, None, when.min_improvement, f"{missing} more scores are needed")
    before = sum(now.scores[-2 * window : -window]) / window
    after = sum(now.scores[-window:]) / window
    gain = after - before
    perfect = after >= 1.0
    said = f"the mean score went from {before:.2f} to {after:.2f}"
    return TriggerReport("plateau", gain < when.min_improvement and not perfect, gain, when.min_improvement, said)
