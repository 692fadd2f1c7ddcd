"""The examination of a kernel: held-out loss against the context-free baseline, and the probe batch for Phi.

All kernels of a moment (trained weights, EMA, best) sit the same examination: up to ``MAX_ITEMS`` held-out pairs in
an order fixed by their content. When the held-out part changes, the examination and its ``fingerprint`` change.
A pair that was cropped to fit the context is judged as if it ended there, for the baseline and the kernel alike;
kernels are not trained on such an end, so this errs against the kernel.

Not here: when to examine and what follows from it (``training_session``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from olympus.example import Example
from olympus.experience_buffer import ExperienceBuffer
from qig_core.baseline import ContextFreeBaseline, GateResult, learning_gate, uniform_nats
from qig_core.geometry import frechet_mean
from qig_core.inference import Batch, by_length, collate, run_to_halt
from qig_core.m8_kernel import M8Kernel
from qig_core.vocabulary import EncodedPair

MAX_ITEMS = 64
#: Pairs of like length are evaluated together, so that little is padding and the states stay in the processor's cache
#: (CPU time of 64 questions: 0.54 s in batches of 8, 0.63 of 16, 0.93 of 32, 1.64 of 64).
_BATCH = 8
#: Positions of the probe batch for Phi; 20 k^2 = 1280 state pairs are needed for k = 8.
_PROBE_POSITIONS = 1408


@dataclass(frozen=True, slots=True)
class Exam:
    """One kernel's result. ``loss`` in nats per byte; ``nats`` [N] per item; ``basin`` [basin_dim], their mean."""

    loss: float
    nats: Tensor
    basin: Tensor


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
        nats, basins = _sit(kernel, self._batch)
        return Exam(float(nats.sum() / self._symbols.sum()), nats, frechet_mean(basins))

    def gate(self, exam: Exam) -> GateResult:
        """Whether the kernel is clearly below the baseline."""
        return learning_gate(exam.nats, self._baseline_nats, self._symbols)

    @property
    def probe(self) -> Tensor | None:
        """Ids [B, T] for Phi, the same until the held-out part changes; None without questions."""
        return self._probe

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
        self._probe = collate(_middle(pairs, _PROBE_POSITIONS)).ids

    def _per_byte(self, nats: Tensor) -> float | None:
        return float(nats.sum() / self._symbols.sum()) if self.items else None


@torch.no_grad()
def _sit(kernel: M8Kernel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Nats [N] (float64, over the judged symbols) and basins [N, basin_dim], answered as it would be asked."""
    nats = torch.zeros(len(batch.ids), dtype=torch.float64)
    basins = torch.zeros(len(batch.ids), kernel.config.basin_dim)
    was_training = kernel.training
    kernel.eval()
    try:
        for index, length in by_length(batch.ids, math.ceil(len(batch.ids) / _BATCH)):
            ids, judged = batch.ids[index, :length], batch.loss_mask[index, 1:length]
            answer = run_to_halt(kernel, ids)
            each = F.cross_entropy(answer.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")  # [B, T - 1]
            nats[index] = (each.double() * judged).sum(dim=1)
            basins[index] = answer.basin
    finally:
        kernel.train(was_training)
    return nats, basins


def _middle(pairs: Sequence[EncodedPair], positions: int) -> list[EncodedPair]:
    """Pairs, sorted by length, around the median until they have ``positions``: of like length, so little is padding.

    (States of 1,485 positions in 21 such rows: 58 ms; of 2,042 in 22 rows as they came: 260 ms.)
    """
    low = high = len(pairs) // 2
    held = 0
    while held < positions and high - low < len(pairs):
        if high < len(pairs):
            held += len(pairs[high].ids)
            high += 1
        if held < positions and low > 0:
            low -= 1
            held += len(pairs[low].ids)
    return list(pairs[low:high])
