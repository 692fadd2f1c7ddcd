"""Which checkpoints stay: a union of rules, as a pure function.

A checkpoint lives while *any* rule keeps it, and ``kept_by`` names every rule that does. The counting rules look at
multiples: ``every_100_steps: 5`` keeps the five newest checkpoints whose step is a multiple of 100, and step 1000
counts for both rules. The newest checkpoint, the best one by held-out loss, pinned ones and those in use always stay.

Not here: deleting (``checkpoints``), and the byte quota, which pauses training instead of deleting what a rule keeps.
Relatives: Orbax ``AnyPreservationPolicy([LatestN, EveryNSteps, BestN])``, Lightning ``save_top_k``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from settings import RetentionSettings


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the rules need to know of a checkpoint. ``holdout_loss`` None: it was not measured."""

    name: str
    step: int
    holdout_loss: float | None = None
    converged: bool = False
    pinned: bool = False


def kept_by(
    checkpoints: Iterable[Candidate], policy: RetentionSettings, in_use: Collection[str] = ()
) -> dict[str, list[str]]:
    """For each checkpoint's name, the rules that keep it; an empty list means that it may go."""
    ordered = sorted(checkpoints, key=lambda item: item.step, reverse=True)
    reasons: dict[str, list[str]] = {item.name: [] for item in ordered}
    for rule, stride, count in (
        ("every_100_steps", 100, policy.every_100_steps),
        ("every_1000_steps", 1000, policy.every_1000_steps),
    ):
        for item in [item for item in ordered if item.step % stride == 0][:count]:
            reasons[item.name].append(rule)
    for item in ordered:
        if item.converged and policy.keep_converged:
            reasons[item.name].append("converged")
        if item.pinned:
            reasons[item.name].append("pinned")
        if item.name in in_use:
            reasons[item.name].append("in_use")
    if ordered:
        reasons[ordered[0].name].append("latest")
    best = best_of(ordered)
    if best is not None:
        reasons[best.name].append("best")
    return reasons


def best_of(checkpoints: Iterable[Candidate]) -> Candidate | None:
    """The checkpoint with the lowest measured held-out loss; among equals the newest; None when none was measured."""
    measured = [item for item in checkpoints if item.holdout_loss is not None]
    return min(measured, key=lambda item: (item.holdout_loss, -item.step), default=None)


def next_to_delete(
    checkpoints: Collection[Candidate], policy: RetentionSettings, next_step: int, in_use: Collection[str] = ()
) -> list[str]:
    """Names that would go when a checkpoint of ``next_step`` is published, oldest first: what to warn a user with."""
    coming = Candidate(f"coming-{next_step}", next_step)
    reasons = kept_by([*checkpoints, coming], policy, in_use)
    return [item.name for item in sorted(checkpoints, key=lambda item: item.step) if not reasons[item.name]]


def policy_json(policy: RetentionSettings) -> dict[str, Any]:
    """The policy as the API shows it. JSON has no infinity: null means all of them."""
    return {
        "every_100_steps": policy.every_100_steps,
        "every_1000_steps": policy.every_1000_steps,
        "converged": None if policy.keep_converged else 0,
        "max_bytes": policy.max_bytes,
        "min_free_bytes": policy.min_free_bytes,
    }
