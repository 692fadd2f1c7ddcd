"""Drift: has what comes in become harder than what this kernel was tested on before?

ADWIN (Bifet and Gavalda 2007, "Learning from time-changing data with adaptive windowing") keeps a window of losses and
cuts it wherever two parts of it have means that differ by more than chance (a bound with confidence ``DELTA``). The
implementation is river's. Only a cut after which the mean is *higher* is drift: a kernel that learns makes its losses
fall, which ADWIN notices too and which merely forgets the older ones here.

The losses are those of the prequential test (``prequential``): each new experience, before it is trained on. The bound
assumes values in [0, 1], so ADWIN sees loss / (loss + ``HALF``): unlike a clipped scale it tells 0.1 from 0.3 nats per
byte as well as 0.5 from 1.5, which is what matters to a kernel that has learned.

A kernel that comes to rest gives the detector the held-out losses of its best weights as the window to begin with:
what comes in from now on is compared with what the weights that serve can do, not with how they did while learning.

The state is the list of losses in the window, at most ``MEMORY``: river's own state is no JSON, and feeding the same
losses again gives the same detector. Not here: what follows from drift (``resting``, ``training_session``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

DELTA = 0.02
#: The loss, in nats per byte, that ADWIN sees as one half.
HALF = 0.3
#: A loss that is no number, or above this, counts as this much.
WORST = 10.0
#: ADWIN compares after every so many losses; a window shorter than this can hold no cut.
CLOCK = 8
#: Losses kept. At the limit the older half is forgotten: drift is about the recent past.
MEMORY = 512
_GRACE = 16


@dataclass(frozen=True, slots=True)
class Drift:
    """A rise that is no chance: ``before`` and ``after`` are mean losses in nats per byte."""

    step: int
    tested: int  # experiences tested when it was noticed, by this kernel in all
    before: float
    after: float

    @property
    def reason(self) -> str:
        """For people."""
        return f"drift: the loss of new experience rose from {self.before:.2f} to {self.after:.2f} nats per byte"


class DriftDetector:
    """Used by one thread at a time."""

    def __init__(self) -> None:
        self._restart([])
        self.tested = 0
        self.detections = 0
        self.last: Drift | None = None

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def mean(self) -> float | None:
        """Mean loss of the window, or None while it is empty."""
        return _mean(self._losses) if self._losses else None

    def add(self, loss: float, step: int) -> Drift | None:
        """One more loss in nats per byte (not finite counts as the worst); the drift it reveals, if any."""
        self.tested += 1
        if len(self._losses) >= MEMORY:
            self._restart(self._losses[-MEMORY // 2 :])
        self._losses.append(_bounded(loss))
        self._adwin.update(_squashed(self._losses[-1]))
        if not self._adwin.drift_detected:
            return None
        window, kept = self._losses, int(self._adwin.width)
        self._restart(window[-kept:])
        low, high = _mean(window[:-kept]), _mean(window[-kept:])
        if high <= low:
            return None
        self.detections += 1
        self.last = Drift(step, self.tested, round(low, 4), round(high, 4))
        return self.last

    def begin(self, losses: Iterable[float]) -> None:
        """A new window: the losses that are normal from now on."""
        self._restart([_bounded(loss) for loss in losses][-MEMORY:])

    def state_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "losses": list(self._losses),
            "tested": self.tested,
            "detections": self.detections,
            "last": None if self.last is None else asdict(self.last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; the same losses lead to the same detector."""
        self._restart([float(value) for value in state["losses"]])
        self.tested, self.detections = int(state["tested"]), int(state["detections"])
        self.last = None if state["last"] is None else Drift(**state["last"])

    def report(self) -> dict[str, Any]:
        """For the status."""
        last = self.last
        return {
            "detections": self.detections,
            "window": len(self),
            "mean": self.mean,
            "last": None if last is None else {**asdict(last), "reason": last.reason},
        }

    def check_invariants(self) -> None:
        """The window is bounded, its losses are bounded, and the detector has seen nothing else."""
        assert len(self._losses) <= MEMORY
        assert all(0.0 <= value <= WORST for value in self._losses)
        assert int(self._adwin.width) == len(self._losses)

    def _restart(self, losses: list[float]) -> None:
        """A detector that has seen exactly these losses, the older ones dropped where it finds a cut among them."""
        while True:
            self._adwin, self._losses = _new_adwin(), losses
            for value in losses:
                self._adwin.update(_squashed(value))
            width = int(self._adwin.width)
            if width == len(losses):
                return
            losses = losses[-width:]


def _new_adwin() -> Any:  # river's ADWIN, whose methods carry no types
    """Imported here: river brings scipy, and the second that takes is only for processes that train kernels."""
    from river.drift import ADWIN

    return ADWIN(delta=DELTA, clock=CLOCK, grace_period=_GRACE, min_window_length=5)  # type: ignore[no-untyped-call]


def _bounded(loss: float) -> float:
    return min(max(loss, 0.0), WORST) if math.isfinite(loss) else WORST


def _squashed(loss: float) -> float:
    return loss / (loss + HALF)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
