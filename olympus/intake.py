"""What comes in: the buffer follows the history, and what is new is put to the kernel before it is trained on.

One look (``sync``) reads new records, late judgements and deletions into the buffer, and hands what came in to the
prequential test, whose losses tell drift. Not here: who decides what follows from it (``training_session``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from olympus.drift import Drift
from olympus.experience_buffer import ExperienceBuffer
from olympus.experience_source import ExperienceSource
from olympus.prequential import MAX_TESTED, PrequentialTest, examine
from olympus.rehearsal import Rehearsal
from qig_core.m8_kernel import M8Kernel

SYNC_SECONDS = 2.0


class Intake:
    """Used by one thread at a time."""

    def __init__(self, source: ExperienceSource, buffer: ExperienceBuffer, rehearsal: Rehearsal):
        self.prequential = PrequentialTest()
        self.seconds = 0.0  # spent on testing since the last ``take_seconds``
        self._source = source
        self._buffer = buffer
        self._rehearsal = rehearsal
        self._synced = float("-inf")
        self._drifts: list[Drift] = []

    @property
    def due(self) -> bool:
        """True when it is time to look for judgements and deletions again."""
        return time.monotonic() - self._synced > SYNC_SECONDS

    @property
    def latest_drift(self) -> Drift | None:
        """Noticed and not yet taken."""
        return self._drifts[-1] if self._drifts else None

    def sync(self, serving: Callable[[], M8Kernel], step: int) -> Drift | None:
        """Follow the history; ``serving`` gives the weights that new experience is put to. Returns drift, if any."""
        fresh = self._source.sync(self._buffer).fresh
        self._synced = time.monotonic()
        if not fresh:
            return None
        begun = time.perf_counter()
        items = [item for item in map(self._buffer.get, fresh) if item is not None]
        drift = self.prequential.put(serving(), [self._rehearsal.encode(item) for item in items], step)
        if drift is not None:
            self._drifts.append(drift)
        self.seconds += time.perf_counter() - begun
        return drift

    def come_to_rest(self, best: M8Kernel | None) -> None:
        """From now on, new experience is compared with what the weights that serve do on the held-out part."""
        pairs = [self._rehearsal.encode(item) for item in self._buffer.holdout()[-MAX_TESTED:]]
        results = [] if best is None else examine(best, pairs)
        self.prequential.detector.begin(result.loss for result in results)

    def take_drifts(self) -> list[Drift]:
        """Drift noticed since the last call."""
        fresh, self._drifts = self._drifts, []
        return fresh

    def take_seconds(self) -> float:
        """Cost of testing since the last call."""
        spent, self.seconds = self.seconds, 0.0
        return spent

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint's state; those of older versions hold no prequential result."""
        self._source.restore(self._buffer, state["buffer"])
        if "prequential" in state:
            self.prequential.load_state_dict(state["prequential"])

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON types."""
        return {"buffer": self._buffer.state_dict(), "prequential": self.prequential.state_dict()}

    def report(self) -> dict[str, Any]:
        """For the status."""
        test = self.prequential
        return {"buffer": self._buffer.counts(), "prequential": test.report(), "drift": test.detector.report()}
