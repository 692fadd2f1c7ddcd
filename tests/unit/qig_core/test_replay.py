"""Stored logits: bounded, refreshed when better, saved exactly; and the distance that they add to the loss."""

from __future__ import annotations

import pytest
import torch

from qig_core.errors import InvalidInput
from qig_core.inference import collate
from qig_core.learning import supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.replay import MAX_SYMBOLS, Distillation, LogitMemory
from qig_core.vocabulary import VOCAB_SIZE, encode_pair


def logits(symbols: int, seed: int) -> torch.Tensor:
    return torch.randn(symbols, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def test_only_better_answers_replace_the_stored_ones() -> None:
    memory = LogitMemory(4)
    assert memory.offer(1, logits(3, 0), loss=0.2)
    assert not memory.offer(1, logits(3, 1), loss=0.3)
    assert not memory.offer(1, logits(3, 1), loss=float("nan"))
    kept = memory.get(1)
    assert kept is not None
    assert torch.equal(kept, logits(3, 0).half())
    assert memory.offer(1, logits(3, 2), loss=0.1)
    kept = memory.get(1)
    assert kept is not None
    assert torch.equal(kept, logits(3, 2).half())
    memory.check_invariants()


def test_it_is_bounded_in_examples_symbols_and_size_of_numbers() -> None:
    memory = LogitMemory(3)
    for key in range(6):
        memory.offer(key, 1e9 * logits(MAX_SYMBOLS + 9, key), loss=0.1)
        memory.check_invariants()
    assert [key for key in range(6) if memory.get(key) is not None] == [3, 4, 5]
    memory.keep_only({4})
    assert len(memory) == 1
    memory.check_invariants()
    with pytest.raises(InvalidInput, match="at least one"):
        LogitMemory(0)


def test_saved_tensors_bring_back_the_same_memory() -> None:
    memory = LogitMemory(8)
    assert memory.tensors() == {}
    for key in (5, 2, 9):
        memory.offer(key, logits(key, key), loss=key / 100)
    restored = LogitMemory(8)
    restored.load_tensors(memory.tensors())
    restored.check_invariants()
    for name, tensor in memory.tensors().items():
        assert torch.equal(tensor, restored.tensors()[name])
    assert not restored.offer(5, logits(5, 0), loss=0.06)
    broken = {**memory.tensors(), "lengths": torch.tensor([1, 2, 9])}
    with pytest.raises(InvalidInput, match="do not fit"):
        restored.load_tensors(broken)
    restored.load_tensors({})
    assert len(restored) == 0


def test_the_distance_is_the_mean_squared_difference_at_the_action() -> None:
    kernel = M8Kernel(KernelConfig.preset("nano", width=16, hidden=16, heads=2, context=64), seed=1)
    batch = collate([encode_pair("red light", "stop", 64), encode_pair("a green light ahead", "go", 64)])
    plain = supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=1)
    seen = Distillation([None, None], alpha=0.5)
    same = supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=1, distillation=seen)
    assert torch.equal(same.total, plain.total)
    assert [len(seen.found[row]) for row in (0, 1)] == [len("stop") + 1, len("go") + 1]
    shifted = Distillation([None, (seen.found[1] + 2.0).half()], alpha=0.5)
    pulled = supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=1, distillation=shifted)
    assert float((pulled.total - plain.total).detach()) == pytest.approx(0.5 * 4.0, rel=1e-2)
    pulled.total.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in kernel.head.parameters())
