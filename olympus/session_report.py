"""What a training session tells the status: everything as JSON types, in one place.

It reads and computes nothing new. The shape that users see is made from it in ``status``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olympus.training_session import TrainingSession


def session_report(session: TrainingSession, parts: Mapping[str, Any], steps: int, seconds: float) -> dict[str, Any]:
    """The report of a session that took ``steps`` in ``seconds``. ``parts``: what only the session knows."""
    progress, optimizer = session.progress, session.live.optimizer
    return {
        "progress": {**asdict(progress), "rest": dict(progress.rest)},
        "convergence": asdict(session.convergence()),
        "optimizer": {
            "lr": optimizer.param_groups[0]["lr"],
            **{name: finite(value) for name, value in optimizer.statistics.items()},
        },
        "throughput": {
            "steps_per_second": round(steps / seconds, 3) if steps and seconds > 0 else None,
            "step_ms": round(session.last_step_ms, 3) if steps else None,
        },
        "overhead_seconds": round(session.overhead_seconds, 4),
        "parameters": session.live.kernel.parameter_count(),
        "last_saved_step": session.saved_step,
        **parts,
    }


def finite(value: float) -> float | None:
    """The value, or None when it is no number: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
