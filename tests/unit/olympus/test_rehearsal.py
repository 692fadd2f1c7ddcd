"""Lessons: encoded, weighed, and with stored logits of what is known and still held."""

from __future__ import annotations

import torch

from olympus.experience_buffer import ExperienceBuffer
from olympus.rehearsal import LEARNED, Rehearsal
from qig_core.vocabulary import VOCAB_SIZE
from tests.unit.olympus.test_experience_buffer import record


def filled(**options: float) -> ExperienceBuffer:
    buffer = ExperienceBuffer(128, 5, seed=1, **options)  # type: ignore[arg-type]
    for number in range(1, 41):
        buffer.add(record(number))
    return buffer


def test_a_plain_lesson_has_no_weights_and_nothing_to_stay_close_to() -> None:
    rehearsal = Rehearsal(filled(), 64, der_alpha=0.0)
    lesson = rehearsal.lesson(8, step=3)
    assert lesson.weights is None
    assert lesson.distillation is None
    assert lesson.batch.ids.shape[0] == len(lesson.examples) == 8
    rehearsal.learned(lesson, torch.zeros(8))
    assert rehearsal.tensors() == {}


def test_losses_become_priorities() -> None:
    buffer = filled(priority_share=0.5)
    rehearsal = Rehearsal(buffer, 64, der_alpha=0.0)
    lesson = rehearsal.lesson(8, step=3)
    assert lesson.weights is None  # all are new, and alike
    for step in range(30):
        rehearsal.learned(rehearsal.lesson(8, step), torch.linspace(0.0, 2.0, 8))
    later = rehearsal.lesson(8, step=30).weights
    assert later is not None
    assert float(later.max()) == 1.0
    assert float(later.min()) < 1.0


def test_only_known_answers_are_stored_and_only_while_they_are_held() -> None:
    buffer = filled()
    rehearsal = Rehearsal(buffer, 64, der_alpha=0.5)
    lesson = rehearsal.lesson(8, step=3)
    assert lesson.distillation is not None
    known = torch.tensor([0.5 * LEARNED] * 4 + [2 * LEARNED] * 4)
    for row in range(8):
        lesson.distillation.found[row] = torch.full((7, VOCAB_SIZE), float(row))
    rehearsal.learned(lesson, known)
    assert rehearsal.logits is not None
    ids = [item.id for item in lesson.examples]
    stored = {item for item in ids if rehearsal.logits.get(item) is not None}
    assert stored == set(ids[:4])
    again = Rehearsal(buffer, 64, der_alpha=0.5)
    again.load_tensors(rehearsal.tensors())
    assert again.logits is not None
    assert len(again.logits) == len(stored)
    buffer.forget([ids[0]])
    again.lesson(8, step=4)
    assert again.logits.get(ids[0]) is None
    again.logits.check_invariants()
