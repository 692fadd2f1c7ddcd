"""Frozen copies of a kernel's weights that answer queries while training goes on.

The training thread makes a copy and puts it on the shelf; a query takes the reference and keeps it for as long as it
computes. Nobody changes a snapshot, so it is never torn, and a query never waits for a step: the lock covers the
exchange of a reference and nothing else.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

from olympus.kernel_state import KernelState
from qig_core.m8_kernel import M8Kernel
from qig_core.phrasebook import Phrasebook


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One copy. ``checksum`` is over the weights at the time of the copy."""

    which: str
    kernel: M8Kernel
    step: int
    holdout_loss: float | None
    phi: float | None
    regime: str
    checksum: str = field(default="")

    def __post_init__(self) -> None:
        if not self.checksum:
            object.__setattr__(self, "checksum", weights_checksum(self.kernel))

    @property
    def label(self) -> str:
        """What the answer calls it."""
        return f"{self.which}@{self.step}" if self.which in ("best", "latest") else self.which

    def check_invariants(self) -> None:
        """The weights are still those that were copied."""
        assert weights_checksum(self.kernel) == self.checksum


class SnapshotShelf:
    """The newest copies of every kernel. Safe to use from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shelf: dict[tuple[str, str], Snapshot] = {}
        self._phrases: dict[str, Phrasebook] = {}

    def put(self, kernel_id: str, snapshot: Snapshot, *, replace: bool = True) -> None:
        """Replace the copy of the same kind, or only fill an empty place."""
        with self._lock:
            if replace or (kernel_id, snapshot.which) not in self._shelf:
                self._shelf[kernel_id, snapshot.which] = snapshot

    def get(self, kernel_id: str, which: str) -> Snapshot | None:
        """The copy, or None. Without a measured best one, the latest stands in for it: there is no better one."""
        with self._lock:
            found = self._shelf.get((kernel_id, which))
            return found or (self._shelf.get((kernel_id, "latest")) if which == "best" else None)

    def phrases(self, kernel_id: str) -> Phrasebook:
        """What the kernel has answered lately, whichever its weights were."""
        with self._lock:
            return self._phrases.setdefault(kernel_id, Phrasebook())

    def forget(self, kernel_id: str) -> None:
        """Drop a kernel's copies and phrases."""
        with self._lock:
            self._phrases.pop(kernel_id, None)
            for key in [key for key in self._shelf if key[0] == kernel_id]:
                del self._shelf[key]


class FreshSnapshots:
    """Copies made by a training thread and not yet put on the shelf. The best one is copied only when it changed."""

    def __init__(self, live: KernelState):
        self._live = live
        self._waiting: list[Snapshot] = []
        self._best_shown: tuple[int | None, float | None] = (None, None)

    def publish(self, regime: str) -> None:
        """Copy the weights as they are now."""
        self._waiting.append(latest_snapshot(self._live, regime))
        mark = (self._live.progress.best_step, self._live.progress.best_loss)
        if mark == self._best_shown:
            return
        self._best_shown = mark
        best = best_snapshot(self._live, regime)
        if best is not None:
            self._waiting.append(best)

    def take(self) -> list[Snapshot]:
        """What was published since the last call."""
        fresh, self._waiting = self._waiting, []
        return fresh


def latest_snapshot(live: KernelState, regime: str) -> Snapshot:
    """A copy of the averaged weights as they are now."""
    progress = live.progress
    phi = progress.integration.get("phi")
    return Snapshot("latest", live.ema.snapshot(), progress.step, progress.holdout_loss, phi, regime)


def best_snapshot(live: KernelState, regime: str) -> Snapshot | None:
    """A copy of the averaged weights with the lowest held-out loss so far; None when none was measured."""
    progress, kernel = live.progress, live.best_kernel()
    if kernel is None or progress.best_step is None:
        return None
    phi = progress.integration.get("phi")
    return Snapshot("best", kernel, progress.best_step, progress.best_loss, phi, regime)


def weights_checksum(kernel: M8Kernel) -> str:
    """Hex SHA-256 over names and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in kernel.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
