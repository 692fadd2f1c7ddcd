"""The examination of a kernel: held-out loss against the context-free baseline, and the probe batch for Phi.

All kernels of a moment (trained weights, EMA, best) sit the same examination: up to ``MAX_ITEMS`` held-out pairs in
an order fixed by their content. When the held-out part changes, the examination and its ``fingerprint`` change.
A pair that was cropped to fit the context is judged as if it ended there, for the baseline and the kernel alike;
kernels are not trained on such an end, so this errs against the kernel.

Not here: when to examine and what follows from it (``training_session``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from olympus.experience_buffer import Example, ExperienceBuffer
from qig_core.baseline import ContextFreeBaseline, GateResult, learning_gate, uniform_nats
from qig_core.geometry import frechet_mean
from qig_core.inference import Batch, collate, evaluate_pairs, run_to_halt
from qig_core.m8_kernel import M8Kernel
from qig_core.vocabulary import EncodedPair

MAX_ITEMS = 64
#: Pairs of like length are evaluated together, so that little is padding.
_BATCH = 16
#: Positions of the probe batch for Phi; 20 k^2 = 1280 state pairs are needed for k = 8.
_PROBE_LIMIT = 2048
_BASIN_ITEMS = 16


@dataclass(frozen=True, slots=True)
class Exam:
    """One kernel's result. ``loss`` in nats per byte; ``nats`` [N] per item."""

    loss: float
    nats: Tensor


class Examiner:
    """Holds the questions and the baseline in step with the buffer."""

    def __init__(self, buffer: ExperienceBuffer, encode: Callable[[Example], EncodedPair]):
        self._buffer = buffer
        self._encode = encode
        self._holdout_version = -1
        self._training_version = -1
        self._batch: Batch | None = None
        self._probe: Tensor | None = None
        self._actions: list[str] = []
        self.fingerprint = ""
        self._symbols = torch.zeros(0, dtype=torch.int64)
        self._baseline = ContextFreeBaseline()
        self._baseline_nats = torch.zeros(0, dtype=torch.float64)

    def refresh(self) -> None:
        """Follow the buffer. ``fingerprint`` is then that of the questions: equal ones, equal questions."""
        buffer = self._buffer
        changed = self._holdout_version != buffer.holdout_version
        if changed:
            self._holdout_version = buffer.holdout_version
            self._set_questions(buffer.holdout())
        if changed or self._training_version != buffer.version:
            self._training_version = buffer.version
            self._baseline.fit(self._encode(item).action for item in buffer.training())
            nats = [self._baseline.nats(action) for action in self._actions]
            self._baseline_nats = torch.tensor(nats, dtype=torch.float64)

    @property
    def items(self) -> int:
        """How many questions there are."""
        return len(self._actions)

    @property
    def baseline_loss(self) -> float | None:
        """The baseline's nats per byte, or None without questions."""
        return self._per_byte(self._baseline_nats)

    @property
    def uniform_loss(self) -> float | None:
        """Nats per byte of knowing nothing."""
        return self._per_byte(torch.tensor([uniform_nats(action) for action in self._actions], dtype=torch.float64))

    def examine(self, kernel: M8Kernel) -> Exam | None:
        """The kernel's held-out loss; None without questions."""
        if self._batch is None:
            return None
        nats, _ = evaluate_pairs(kernel, self._batch.ids, self._batch.loss_mask, _BATCH)
        return Exam(float(nats.sum() / self._symbols.sum()), nats.cpu())

    def gate(self, exam: Exam) -> GateResult:
        """Whether the kernel is clearly below the baseline."""
        return learning_gate(exam.nats, self._baseline_nats, self._symbols)

    @property
    def probe(self) -> Tensor | None:
        """Ids [B, T] for Phi, the same until the held-out part changes; None without questions."""
        return self._probe

    @torch.no_grad()
    def basin(self, kernel: M8Kernel) -> Tensor | None:
        """Fréchet mean [basin_dim] of the kernel's basins over some of the questions."""
        if self._probe is None:
            return None
        return frechet_mean(run_to_halt(kernel, self._probe[:_BASIN_ITEMS]).basin)

    def _set_questions(self, holdout: list[Example]) -> None:
        chosen = sorted(holdout, key=lambda item: item.content_hash)[:MAX_ITEMS]
        self.fingerprint = hashlib.sha256("".join(item.content_hash for item in chosen).encode()).hexdigest()
        mixed = [self._encode(item) for item in chosen]
        pairs = sorted(mixed, key=lambda pair: len(pair.ids))
        self._actions = [pair.action for pair in pairs]
        if not pairs:
            self._batch, self._probe = None, None
            self._symbols = torch.zeros(0, dtype=torch.int64)
            return
        judged = [EncodedPair(pair.ids, [*pair.loss_mask[:-1], True], pair.action, pair.truncated) for pair in pairs]
        self._batch = collate(judged)
        self._symbols = self._batch.loss_mask.sum(dim=1)
        ends = accumulate(len(pair.ids) for pair in mixed)
        self._probe = collate([pair for pair, end in zip(mixed, ends, strict=True) if end < _PROBE_LIMIT]).ids

    def _per_byte(self, nats: Tensor) -> float | None:
        return float(nats.sum() / self._symbols.sum()) if self.items else None
