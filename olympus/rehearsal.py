"""What a step learns from: a batch of the buffer, encoded, weighed, and with the old answers to stay close to.

The buffer draws, this module turns the draw into tensors, and after the step it takes back what the step found out:
losses become priorities (``priorities``), and the logits of well-known experiences are stored for DER++
(``qig_core/replay``; Buzzega et al. 2020), when that is on. "Well known" is a loss below ``LEARNED``: to hold a kernel
to answers that it has not learned yet would only slow it down.

Everything here is a function of seed, step, buffer and stored logits, all of which are in the checkpoint.
Not here: the loss (``qig_core/learning``), where experience comes from (``experience_source``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from olympus.example import Example
from olympus.experience_buffer import ExperienceBuffer
from qig_core.inference import Batch, collate
from qig_core.replay import Distillation, LogitMemory
from qig_core.vocabulary import EncodedPair, encode_pair

#: Nats per byte below which an answer counts as learned, and its logits are worth keeping.
LEARNED = 0.2
#: Experiences whose logits are stored; 256 of 20 bytes are 2.7 MB in memory and in every checkpoint.
LOGITS_KEPT = 256


@dataclass(frozen=True, slots=True)
class Lesson:
    """One step's batch. ``weights`` [N] or None when every row counts the same."""

    examples: list[Example]
    batch: Batch
    weights: Tensor | None
    distillation: Distillation | None


class Rehearsal:
    """Batches for one kernel. ``der_alpha`` 0: no stored logits. Used by one thread at a time."""

    def __init__(self, buffer: ExperienceBuffer, context: int, der_alpha: float):
        self._buffer = buffer
        self._context = context
        self._alpha = der_alpha
        self._encoded: dict[int, EncodedPair] = {}
        self._seen_version = -1
        self.logits = LogitMemory(LOGITS_KEPT) if der_alpha > 0 else None

    def encode(self, item: Example) -> EncodedPair:
        """The example as the network sees it; kept, because most are drawn again."""
        pair = self._encoded.get(item.id)
        if pair is None:
            if len(self._encoded) >= 2 * self._buffer.capacity:
                self._encoded.clear()
            pair = encode_pair(item.observation, item.action, self._context)
            self._encoded[item.id] = pair
        return pair

    def lesson(self, count: int, step: int) -> Lesson:
        """The batch of a step. Raises ``ValueError`` when there is nothing to train on."""
        drawn = self._buffer.draw(count, step)
        batch = collate([self.encode(item) for item in drawn.examples])
        alike = all(weight == 1.0 for weight in drawn.weights)
        weights = None if alike else torch.tensor(drawn.weights, dtype=torch.float32)
        return Lesson(drawn.examples, batch, weights, self._distillation(drawn.examples))

    def learned(self, lesson: Lesson, item_nats: Tensor) -> None:
        """Take back the losses [N] in nats per byte, and the logits that the loss left in the lesson."""
        losses = item_nats.tolist()
        self._buffer.learned([item.id for item in lesson.examples], losses)
        if self.logits is None or lesson.distillation is None:
            return
        for row, logits in sorted(lesson.distillation.found.items()):
            if losses[row] < LEARNED:
                self.logits.offer(lesson.examples[row].id, logits, losses[row])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensor files of a checkpoint, by name."""
        stored = {} if self.logits is None else self.logits.tensors()
        return {"replay": stored} if stored else {}

    def load_tensors(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of ``tensors``; nothing to do while DER++ is off."""
        if self.logits is not None:
            self.logits.load_tensors(saved.get("replay", {}))

    def _distillation(self, examples: list[Example]) -> Distillation | None:
        if self.logits is None:
            return None
        if self._seen_version != self._buffer.version:
            self._seen_version = self._buffer.version
            self.logits.keep_only({item.id for item in self._buffer.training()})
        return Distillation([self.logits.get(item.id) for item in examples], self._alpha)
