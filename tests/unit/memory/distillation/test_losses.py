"""The objective against its definition, and where it must be stable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memory.distillation.encoding import gold_targets, teacher_targets
from memory.distillation.losses import target_losses
from memory.distillation.rows import flatten_topk


def tensors(targets: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(targets.top_ids), torch.from_numpy(targets.top_logprobs)  # type: ignore[attr-defined]


def made(teacher: torch.Tensor, top_k: int, mass: float = 0.99) -> tuple[torch.Tensor, torch.Tensor]:
    top = teacher.log_softmax(-1).topk(top_k)
    flat = flatten_topk(top.indices.numpy(), top.values.numpy(), mass)
    return tensors(teacher_targets(flat, len(teacher), top_k))


def test_with_all_candidates_it_is_the_divergence() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 12), torch.randn(5, 12)
    found = target_losses(student, *made(teacher, 12, mass=1.0))
    p = teacher.softmax(-1)
    torch.testing.assert_close(found, (p * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1))


def test_the_rest_counts_as_one_token() -> None:
    torch.manual_seed(1)
    teacher, student = torch.randn(4, 30), torch.randn(4, 30)
    ids, logs = made(teacher, 5)
    p, q = teacher.softmax(-1).gather(1, ids), student.softmax(-1).gather(1, ids)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    expected = (p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
    torch.testing.assert_close(target_losses(student, ids, logs), expected)
    assert (target_losses(student, ids, logs) > 0).all()
    torch.testing.assert_close(target_losses(teacher, ids, logs), torch.zeros(4), atol=1e-5, rtol=0)


def test_flat_rows_keep_all_candidates_and_sharp_ones_few() -> None:
    """The reference implementation keeps one candidate on the flattest rows."""
    teacher = torch.stack((torch.zeros(1000), torch.nn.functional.one_hot(torch.tensor(7), 1000) * 30.0))
    ids, logs = made(teacher, 20)
    assert ids.shape == (2, 20)
    assert torch.isfinite(logs).sum(dim=1).tolist() == [20, 1]
    losses = target_losses(torch.zeros(2, 1000), ids, logs)
    assert losses[0] == pytest.approx(0, abs=1e-4)  # both are flat
    assert losses[1] == pytest.approx(np.log(1000), rel=1e-3)


def test_a_known_answer_is_its_negative_log_likelihood() -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 50)
    ids, logs = tensors(gold_targets([4, 9, 4]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([4, 9, 4]), reduction="none")
    torch.testing.assert_close(target_losses(logits, ids, logs), expected)
    torch.testing.assert_close(target_losses(logits, ids, logs, "upstream"), expected)


def test_upstream_is_cross_entropy_against_the_kept_candidates() -> None:
    torch.manual_seed(3)
    teacher, student = torch.randn(4, 30), torch.randn(4, 30)
    ids, logs = made(teacher, 6)
    expected = -(teacher.softmax(-1).gather(1, ids) * student.log_softmax(-1).gather(1, ids)).sum(-1)
    torch.testing.assert_close(target_losses(student, ids, logs, "upstream"), expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 60.0, 3e4])
def test_gradients_are_finite_for_a_student_that_is_sure(scale: float) -> None:
    teacher = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    logits = (teacher.roll(1, 0) * scale).requires_grad_()
    losses = target_losses(logits, *made(teacher, 4))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_fewer_candidates_than_recorded() -> None:
    flat = flatten_topk([[5, 6, 7], [1, 2, 3]], np.log([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]]))
    targets = teacher_targets(flat, 2, 2)
    assert targets.top_ids.tolist() == [[5, 6], [1, 2]]
    assert teacher_targets(flat, 1, 20).top_ids.tolist() == [[5, 6, 7]]  # an answer that was cut


def test_positions_without_candidates_drop_out() -> None:
    from memory.distillation.rows import FlatTopLogprobs

    flat = FlatTopLogprobs(np.array([1, 1, 3]), np.array([5, 6, 7]), np.log([0.6, 0.4, 1.0]).astype("f4"), (5, 4))
    targets = teacher_targets(flat, 5, 20)
    assert targets.offsets.tolist() == [1, 3]
    assert targets.top_ids.tolist() == [[5, 6], [7, 0]]
    assert np.isneginf(targets.top_logprobs[1, 1])
