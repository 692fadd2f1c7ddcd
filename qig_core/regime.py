"""Regime of a kernel, the window of its last 100 integration values, and the specification's convergence test.

Converged, by specification: Phi > 0.7 and std(Phi) < 0.05 over the last 100 measured steps. The learning gate adds a
third, visible condition: held-out loss clearly below the context-free baseline. Thresholds of the regimes are the
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


def regime(phi: float | None, loss_ok: bool | None, diverging: bool) -> Regime:
    """linear (Phi < 0.45), geometric (up to 0.80), breakdown (diverging, or Phi >= 0.80 without having learned).

    An unmeasured Phi (None) is linear: nothing has shown integration. A kernel at Phi >= 0.80 that has learned stays
    geometric.
    """
    if diverging:
        return "breakdown"
    if phi is None or phi < LINEAR_BELOW:
        return "linear"
    return "breakdown" if phi >= BREAKDOWN_FROM and not loss_ok else "geometric"


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
class Convergence:
    """Each condition of the specification with its number, and one sentence for people."""

    phi_now: float | None
    phi_mean: float | None
    phi_std: float | None
    phi_ok: bool
    stable_ok: bool
    loss_ok: bool | None
    steps_in_window: int
    converged: bool
    reason: str


def convergence(
    window: PhiWindow,
    phi_threshold: float = 0.7,
    std_threshold: float = 0.05,
    loss_ok: bool | None = None,
    gate: bool = True,
) -> Convergence:
    """Judge a window. ``phi_ok``: both the newest value and the mean exceed the threshold. A window that is not full
    has not converged. ``gate=False`` leaves the seed's two conditions alone; ``loss_ok`` None means not yet measured.
    """
    now, mean, std, count = window.last, window.mean(), window.std(), len(window)
    full = count == window.size
    phi_ok = now is not None and mean is not None and now > phi_threshold and mean > phi_threshold
    stable_ok = full and std is not None and std < std_threshold
    converged = full and phi_ok and stable_ok and (bool(loss_ok) or not gate)
    missing: list[str] = []
    if not full:
        missing.append(f"only {count} of {window.size} Phi values measured")
    if not phi_ok:
        shown = "not measured" if now is None or mean is None else f"{now:.3f} now, {mean:.3f} on average"
        missing.append(f"Phi {shown}, needs more than {phi_threshold:g}")
    if full and not stable_ok:
        missing.append(f"std(Phi) {std:.3f}, needs less than {std_threshold:g}")
    if gate and not loss_ok:
        missing.append("held-out loss not " + ("yet measured" if loss_ok is None else "clearly below the baseline"))
    reason = "; ".join(missing) if missing else "all conditions hold"
    return Convergence(now, mean, std, phi_ok, stable_ok, loss_ok, count, converged, reason)
