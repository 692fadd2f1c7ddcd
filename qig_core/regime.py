"""Regime of a kernel, the window of its last 100 integration values, and the specification's convergence test.

Converged, by specification: Phi > 0.7 and std(Phi) < 0.05 over the last 100 measured steps. The learning gate adds two
visible conditions: held-out loss clearly below the context-free baseline, and no longer falling (an architecture that
integrates does so long before it has finished learning). Thresholds of the regimes are the
ones of the original kernels (0.45, 0.80), kept; what decides between them is ours (reference kernels.md, 5.4).

Nothing here measures Phi; that is ``integration.py``. A value that could not be measured is never put in the window.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from qig_core.errors import InvalidInput

Regime = Literal["linear", "geometric", "breakdown"]
LINEAR_BELOW = 0.45
BREAKDOWN_FROM = 0.80


def regime(phi: float | None, loss_ok: bool | None, diverging: bool, improving: bool = False) -> Regime:
    """linear (Phi < 0.45), geometric (up to 0.80), breakdown (diverging, or Phi >= 0.80 without having learned).

    An unmeasured Phi (None) is linear: nothing has shown integration. At Phi >= 0.80 a kernel that has learned, or
    whose held-out loss still falls (``improving``), stays geometric: an integrating architecture starts up there.
    """
    if diverging:
        return "breakdown"
    if phi is None or phi < LINEAR_BELOW:
        return "linear"
    return "breakdown" if phi >= BREAKDOWN_FROM and not (loss_ok or improving) else "geometric"


class PhiWindow:
    """The last ``size`` measured Phi values."""

    def __init__(self, size: int = 100):
        if size < 2:
            raise InvalidInput(f"a window of {size} has no deviation; use at least 2")
        self.size = size
        self._values: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def last(self) -> float | None:
        return self._values[-1] if self._values else None

    def add(self, phi: float) -> None:
        """Append one measured value in [0, 1]; anything else raises InvalidInput."""
        if not (math.isfinite(phi) and 0.0 <= phi <= 1.0):
            raise InvalidInput(f"Phi must be a number in [0, 1], got {phi}; do not add what was not measured")
        self._values.append(float(phi))

    def clear(self) -> None:
        self._values.clear()

    def mean(self) -> float | None:
        return math.fsum(self._values) / len(self._values) if self._values else None

    def std(self) -> float | None:
        """Population standard deviation, or None while empty."""
        mean = self.mean()
        if mean is None:
            return None
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self._values) / len(self._values))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"size": self.size, "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if int(state["size"]) != self.size:
            raise InvalidInput(f"the saved window holds {state['size']} values, this one {self.size}")
        self._values.clear()
        for value in state["values"]:
            self.add(float(value))
        self.check_invariants()

    def check_invariants(self) -> None:
        """Raises AssertionError when the window is not what it claims to be."""
        assert len(self._values) <= self.size, (len(self._values), self.size)
        assert all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in self._values), list(self._values)


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of convergence: what was measured, what is asked, and a sentence. ``ok`` None: not yet known."""

    name: str
    ok: bool | None
    value: float | None
    threshold: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Learned:
    """The learning gate as measured on held-out experience. None: not examined yet.

    ``loss_ok``: clearly below the context-free baseline, for the reason ``loss_reason``. ``unimproved`` of
    ``plateau`` examinations in a row brought no better loss: a kernel whose loss still falls has not converged.
    """

    loss_ok: bool | None = None
    loss: float | None = None
    baseline: float | None = None
    loss_reason: str = "not examined yet"
    unimproved: int = 0
    plateau: int = 0


@dataclass(frozen=True, slots=True)
class Convergence:
    """Each condition of the specification with its number, and one sentence for people."""

    phi_now: float | None
    phi_mean: float | None
    phi_std: float | None
    phi_ok: bool
    stable_ok: bool
    loss_ok: bool | None
    plateau_ok: bool
    steps_in_window: int
    phi_threshold: float
    std_threshold: float
    gate: bool
    converged: bool
    reason: str
    conditions: tuple[Condition, ...]


def convergence(
    window: PhiWindow,
    phi_threshold: float = 0.7,
    std_threshold: float = 0.05,
    learned: Learned | None = None,
    gate: bool = True,
) -> Convergence:
    """Judge a window. ``phi_ok``: both the newest value and the mean exceed the threshold. A window that is not full
    has not converged. ``gate=False`` leaves the seed's two conditions alone.
    """
    learned = Learned() if learned is None else learned
    now, mean, std, count = window.last, window.mean(), window.std(), len(window)
    full = count == window.size
    phi_ok = now is not None and mean is not None and now > phi_threshold and mean > phi_threshold
    stable_ok = full and std is not None and std < std_threshold
    plateau_ok = learned.unimproved >= learned.plateau
    conditions = [_window_full(window), _phi(now, mean, phi_ok, phi_threshold), _stable(std, full, std_threshold)]
    if gate:
        conditions += [_below_baseline(learned), _plateau(learned, plateau_ok)]
    missing = [condition.reason for condition in conditions if not condition.ok]
    return Convergence(
        phi_now=now,
        phi_mean=mean,
        phi_std=std,
        phi_ok=phi_ok,
        stable_ok=stable_ok,
        loss_ok=learned.loss_ok,
        plateau_ok=plateau_ok,
        steps_in_window=count,
        phi_threshold=phi_threshold,
        std_threshold=std_threshold,
        gate=gate,
        converged=not missing,
        reason="; ".join(missing) if missing else "all conditions hold",
        conditions=tuple(conditions),
    )


def _window_full(window: PhiWindow) -> Condition:
    count, size = len(window), window.size
    said = f"{count} Phi values measured" if count == size else f"only {count} of {size} Phi values measured"
    return Condition("window", count == size, count, size, said)


def _phi(now: float | None, mean: float | None, ok: bool, threshold: float) -> Condition:
    if now is None or mean is None:
        return Condition("phi", None, None, threshold, f"Phi not measured, needs more than {threshold:g}")
    shown = f"Phi {now:.3f} now, {mean:.3f} on average, needs more than {threshold:g}"
    return Condition("phi", ok, mean, threshold, shown)


def _stable(std: float | None, full: bool, threshold: float) -> Condition:
    if std is None or not full:
        return Condition("stable", None, std, threshold, f"std(Phi) is judged on a full window, below {threshold:g}")
    return Condition("stable", std < threshold, std, threshold, f"std(Phi) {std:.3f}, needs less than {threshold:g}")


def _below_baseline(learned: Learned) -> Condition:
    if learned.loss_ok is None:
        reason = f"held-out loss not yet measured ({learned.loss_reason})"
    elif learned.loss_ok:
        reason = "held-out loss clearly below the baseline"
    else:
        reason = f"held-out loss not clearly below the baseline ({learned.loss_reason})"
    return Condition("learned", learned.loss_ok, learned.loss, learned.baseline, reason)


def _plateau(learned: Learned, ok: bool) -> Condition:
    reason = f"no better held-out loss in {learned.unimproved} examinations, needs {learned.plateau}"
    return Condition("plateau", ok, learned.unimproved, learned.plateau, reason)
