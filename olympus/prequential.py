"""Test, then train: what a kernel makes of an experience that it has never seen.

Each new experience is put to the kernel before it can be drawn for training (prequential evaluation: Dawid 1984; Gama
et al. 2013, "On evaluating stream learning algorithms"). No part of the data has to be held back for it, and it is
about today's stream, where the held-out part is about everything kept.

- **Loss**: nats per byte of the action.
- **Right**: every symbol of the action is the most likely one after the right ones before it, which is the same as
  greedy generation giving exactly this action.

Both are shown as fading averages (``FADING`` per experience: about the last 200) and as plain means since the kernel
began. Bounded: of what one look at the history brings, the newest ``MAX_TESTED`` are tested; ``skipped`` counts the
others (a kernel that is given a long history at once is not asked about all of it).

The losses go to the drift detector. Nothing here touches weights or batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from olympus.drift import Drift, DriftDetector
from qig_core.inference import collate, run_to_halt
from qig_core.m8_kernel import M8Kernel
from qig_core.vocabulary import EncodedPair

MAX_TESTED = 128
FADING = 0.995
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Tested:
    """One experience's result."""

    loss: float
    right: bool


class PrequentialTest:
    """The running result of one kernel. Used by one thread at a time."""

    def __init__(self) -> None:
        self.detector = DriftDetector()
        self.skipped = 0
        self.loss: float | None = None
        self.accuracy: float | None = None
        self._sums = [0.0, 0.0]

    @property
    def tested(self) -> int:
        """Experiences tested so far."""
        return self.detector.tested

    def put(self, kernel: M8Kernel, pairs: Sequence[EncodedPair], step: int) -> Drift | None:
        """Test new experiences, in the order they came; the last drift they reveal, if any."""
        self.skipped += max(len(pairs) - MAX_TESTED, 0)
        drift: Drift | None = None
        for result in examine(kernel, pairs[-MAX_TESTED:]):
            drift = self.detector.add(result.loss, step) or drift
            self._count(min(result.loss, _WORST) if math.isfinite(result.loss) else _WORST, result.right)
        return drift

    def report(self) -> dict[str, Any]:
        """For the status."""
        tested = self.tested
        return {
            "tested": tested,
            "skipped": self.skipped,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "mean_loss": self._sums[0] / tested if tested else None,
            "mean_accuracy": self._sums[1] / tested if tested else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "detector": self.detector.state_dict(),
            "skipped": self.skipped,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.detector.load_state_dict(state["detector"])
        self.skipped, self.loss, self.accuracy = int(state["skipped"]), state["loss"], state["accuracy"]
        self._sums = [float(value) for value in state["sums"]]

    def check_invariants(self) -> None:
        """Averages exist exactly when something was tested, and lie where averages can lie."""
        self.detector.check_invariants()
        assert (self.loss is None) == (self.accuracy is None) == (self.tested == 0)
        assert self.accuracy is None or 0.0 <= self.accuracy <= 1.0
        assert self.loss is None or 0.0 <= self.loss <= _WORST

    def _count(self, loss: float, right: bool) -> None:
        self._sums[0] += loss
        self._sums[1] += right
        self.loss = loss if self.loss is None else FADING * self.loss + (1 - FADING) * loss
        before = float(right) if self.accuracy is None else self.accuracy
        self.accuracy = FADING * before + (1 - FADING) * right


#: A loss that is no number counts as this many nats per byte.
_WORST = 100.0


@torch.no_grad()
def examine(kernel: M8Kernel, pairs: Sequence[EncodedPair]) -> list[Tested]:
    """The kernel's loss on each pair and whether it would have answered exactly so. Needs a kernel in eval mode."""
    results: list[Tested] = []
    for start in range(0, len(pairs), _BATCH):
        batch = collate(pairs[start : start + _BATCH])
        target, action = batch.ids[:, 1:], batch.loss_mask[:, 1:]  # [B, T - 1]
        logits = run_to_halt(kernel, batch.ids).logits[:, :-1]
        nats = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").double()
        loss = (nats * action).sum(1) / action.sum(1).clamp_min(1)
        right = ((logits.argmax(-1) == target) | ~action).all(dim=1)
        results += [Tested(*item) for item in zip(loss.tolist(), right.tolist(), strict=True)]
    return results
