"""When a kernel may rest, and what wakes it: the rules, as pure functions.

Rest. ``converged``: the specification (Phi and its deviation over the last 100 measured values) and the learning gate.
``settled``: ``patience`` examinations in a row did not lower the held-out loss by ``IMPROVEMENT``; the reason says
which condition of convergence is missing. (A kernel that lacks nothing but measurements of Phi goes on until there are
enough.) An examination without held-out experience counts as one that improved
nothing, so no kernel trains for ever.

Waking. A resting kernel trains again when, since it came to rest, (a) new experience came in that amounts to
``GROWTH_THAT_WAKES`` of its buffer, or (b) the held-out loss of its best weights, examined on today's questions, is
more than ``LOSS_THAT_WAKES`` above what it was, or (c) the loss of new experience rose by more than chance (``drift``).
A kernel that waits for experience trains as soon as it has enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qig_core.regime import Convergence

IMPROVEMENT = 0.001
GROWTH_THAT_WAKES = 0.20
LOSS_THAT_WAKES = 0.05


@dataclass(frozen=True, slots=True)
class Rest:
    """Why a kernel need not train now."""

    state: Literal["waiting", "converged", "settled"]
    reason: str


def improves(loss: float, mark: float | None) -> bool:
    """Whether a held-out loss is better than the mark by enough to earn more patience."""
    return mark is None or loss < mark * (1 - IMPROVEMENT)


def verdict(judged: Convergence, unimproved: int, patience: int) -> Rest | None:
    """Converged, settled, or None to train on."""
    if judged.converged:
        return Rest("converged", judged.reason)
    if unimproved < patience or _only_measurements_missing(judged):
        return None
    return Rest("settled", f"no better held-out loss in {unimproved} evaluations; not converged: {judged.reason}")


def _only_measurements_missing(judged: Convergence) -> bool:
    """All that can be judged holds and the window of Phi is still filling: a few more steps decide it."""
    missing = {condition.name for condition in judged.conditions if not condition.ok}
    return "window" in missing and missing <= {"window", "stable"}


def has_grown(rest: Mapping[str, Any], seen: int) -> bool:
    """Rule (a). ``rest`` holds ``seen`` and ``size`` as they were when the kernel came to rest."""
    return bool(seen - rest["seen"] >= GROWTH_THAT_WAKES * max(rest["size"], 1))


def does_worse(rest: Mapping[str, Any], loss: float | None) -> bool:
    """Rule (b). ``loss`` is today's, of the best weights; None, then or now, means that nothing can be compared."""
    before = rest["loss"]
    return loss is not None and before is not None and bool(loss > before * (1 + LOSS_THAT_WAKES))
