"""Every loss against its equation, written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from workspace.training_config import LossWeights
from workspace.training_data import Batch
from workspace.training_losses import controller_divergence, distillation, losses_of, row_means, token_losses

ROWS, FED, WORDS = 2, 3, 7
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(ROWS, FED, WORDS, generator=torch.Generator().manual_seed(0), requires_grad=True)


def make_batch(**changes: object) -> Batch:
    teacher = torch.randn(ROWS, FED, WORDS, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    best, ids = teacher.topk(3, dim=-1)
    batch = Batch(
        prefix_ids=torch.zeros(ROWS, 0, dtype=torch.long),
        prefix_mask=torch.zeros(ROWS, 0, dtype=torch.long),
        fed_ids=torch.zeros(ROWS, FED, dtype=torch.long),
        target_ids=torch.tensor([[1, 2, 3], [4, 0, 0]]),
        target_mask=MASK,
        first=torch.tensor([3, 5]),
        updates=(),
        top_ids=ids,
        top_logprobs=best,
        base_loss=torch.tensor([[1.0, 1.0, 1.0], [9.0, 0.0, 0.0]]),
        whole=True,
        sampled=torch.tensor([False, False]),
        controller_inputs=None,
        controller_targets=torch.full((ROWS, FED, 4), 0.25),
    )
    return dataclasses.replace(batch, **changes)  # type: ignore[arg-type]


def test_cross_entropy_counts_targets_only(logits: torch.Tensor) -> None:
    batch = make_batch()
    found = losses_of(batch, logits, None, LossWeights(broadcast=0))
    expected = functional.cross_entropy(logits[MASK], batch.target_ids[MASK])
    torch.testing.assert_close(found.total, expected)
    each = token_losses(logits, batch.target_ids)
    torch.testing.assert_close((each * MASK).sum() / MASK.sum(), expected)
    torch.testing.assert_close(row_means(each, MASK)[1], each[1, 0])
    changed = logits.detach().clone()
    changed[1, 1:] = 50.0
    torch.testing.assert_close(losses_of(batch, changed, None, LossWeights(broadcast=0)).total, expected)


def test_distillation_is_the_divergence_with_the_rest_as_one_token(logits: torch.Tensor) -> None:
    batch = make_batch()
    assert batch.top_ids is not None
    assert batch.top_logprobs is not None
    logs = logits.log_softmax(-1)
    found = distillation(logs, batch.top_ids, batch.top_logprobs)
    for row in range(ROWS):
        for place in range(FED):
            ids, p = batch.top_ids[row, place], batch.top_logprobs[row, place].exp()
            q = logs[row, place].exp()[ids]
            p, q = torch.cat((p, 1 - p.sum()[None])), torch.cat((q, 1 - q.sum()[None]))
            torch.testing.assert_close(found[row, place], (p * (p / q).log()).sum())
    whole = torch.randn(ROWS, FED, WORDS, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    full = (whole.exp() * (whole - logs)).sum(-1)
    assert (found <= full + 1e-6).all()
    assert (found >= 0).all()
    everything = whole.sort(-1, descending=True)
    exact = distillation(logs, everything.indices, everything.values)
    torch.testing.assert_close(exact, full, atol=1e-4, rtol=1e-4)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(logits: torch.Tensor) -> None:
    best, ids = logits.detach().log_softmax(-1).topk(3, dim=-1)
    batch = make_batch(top_ids=ids, top_logprobs=best, sampled=torch.tensor([True, True]))
    found = losses_of(batch, logits, None, LossWeights(cross_entropy=0, broadcast=0, distillation=1))
    found.total.backward()
    assert abs(found.numbers()["total"]) < 1e-6
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5


def test_the_broadcast_loss_punishes_harm_only(logits: torch.Tensor) -> None:
    batch = make_batch()
    nll = token_losses(logits, batch.target_ids)
    rows = torch.stack((nll[0].mean() - 1.0, nll[1, 0] - 9.0))  # the second text gains
    assert bool(rows[0] > 0 > rows[1])
    found = losses_of(batch, logits, None, LossWeights(cross_entropy=0, broadcast=2))
    torch.testing.assert_close(found.total, rows[0])  # 2 * (rows[0] + 0) / 2
    found.total.backward()
    assert logits.grad is not None
    assert logits.grad[0].any()
    assert not logits.grad[1].any()
    part = losses_of(make_batch(whole=False), logits, None, LossWeights())
    assert part.broadcast is None  # with a part of the context there is nothing to compare with


def test_the_controllers_loss_is_a_divergence() -> None:
    targets = torch.tensor([0.0, 0.2, 0.5, 1.0])
    same = controller_divergence(torch.logit(targets, eps=1e-6), targets)
    assert abs(float(same)) < 1e-4
    found = controller_divergence(torch.zeros(4), targets)
    p = targets[1:3]
    bernoulli = (p * (p / 0.5).log() + (1 - p) * ((1 - p) / 0.5).log()).sum() + 2 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(found, bernoulli)
    weights = LossWeights(controller=1)
    mean = losses_of(make_batch(), None, torch.zeros(ROWS, FED, 4), weights).total
    torch.testing.assert_close(mean, controller_divergence(torch.zeros(4), torch.full((4,), 0.25)))


def test_terms_are_weighed_and_told(logits: torch.Tensor) -> None:
    weights = LossWeights(cross_entropy=0.5, distillation=2, broadcast=3, controller=4)
    batch = make_batch(sampled=torch.tensor([False, True]))
    found = losses_of(batch, logits, torch.zeros(ROWS, FED, 4), weights)
    numbers = found.numbers()
    expected = (
        0.5 * numbers["cross_entropy"]
        + 2 * numbers["distillation"]
        + 3 * numbers["broadcast"]
        + 4 * numbers["controller"]
    )
    assert numbers["total"] == pytest.approx(expected, rel=1e-5)


def test_own_samples_are_distilled_and_other_texts_predicted(logits: torch.Tensor) -> None:
    """Of the two rows the second is the model's own."""
    weights = LossWeights(distillation=1)
    batch = make_batch(sampled=torch.tensor([False, True]))
    assert batch.top_ids is not None
    assert batch.top_logprobs is not None
    nll = token_losses(logits, batch.target_ids)
    kd = distillation(logits.log_softmax(-1), batch.top_ids, batch.top_logprobs)
    whole = losses_of(batch, logits, None, weights)
    part = losses_of(make_batch(sampled=torch.tensor([False, True]), whole=False), logits, None, weights)
    for found in (whole, part):
        assert found.cross_entropy is not None
        torch.testing.assert_close(found.cross_entropy, nll[0].mean())
    assert whole.distillation is not None
    assert part.distillation is not None
    torch.testing.assert_close(whole.distillation, kd[1, 0])
    torch.testing.assert_close(part.distillation, kd[MASK].mean())


def test_a_batch_that_teaches_nothing_has_no_gradient(logits: torch.Tensor) -> None:
    batch = make_batch(sampled=torch.tensor([True, True]), whole=False)
    found = losses_of(batch, logits, None, LossWeights())
    assert found.cross_entropy is None
    found.total.backward()
    assert found.numbers() == {"total": 0.0}
    assert logits.grad is not None
    assert not logits.grad.any()
