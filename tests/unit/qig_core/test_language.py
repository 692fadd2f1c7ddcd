"""Text as training material: the loss by hand, what a second pass is, windows, bits per byte, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from qig_core.errors import InvalidInput
from qig_core.language import bits_per_byte, random_windows, text_loss
from qig_core.learning import TrainingDefaults
from qig_core.m8_kernel import KernelConfig, M8Kernel


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _kernel(seed: int = 0) -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", width=16, hidden=32, blocks=1, context=32), seed=seed)


def _windows(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_next_byte_cross_entropy():
    kernel, windows = _kernel(), _windows()
    loss = text_loss(kernel, windows, halt_weight=0.0)
    logits = kernel(windows[:, :-1]).logits
    by_hand = -torch.log_softmax(logits, -1).gather(-1, windows[:, 1:].unsqueeze(-1)).mean()
    assert loss.total.item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert loss.nats_per_byte == loss.last_nats_per_byte == pytest.approx(by_hand.item(), abs=1e-5)
    loss.total.backward()
    assert float(kernel.head.weight.grad.abs().sum()) > 0


def test_the_halt_head_is_told_whether_the_byte_after_the_window_is_right():
    kernel, windows = _kernel(), _windows()
    output = kernel(windows[:, :-1])
    windows[0, -1] = output.logits[0, -1].argmax()  # one row is right, the others are not
    windows[1, -1] = (output.logits[1, -1].argmax() + 1) % 256
    windows[2, -1] = (output.logits[2, -1].argmax() + 1) % 256
    expected = F.binary_cross_entropy_with_logits(output.halt_logit, torch.tensor([1.0, 0.0, 0.0]))
    with_halt = text_loss(kernel, windows, halt_weight=0.5).total
    without = text_loss(kernel, windows, halt_weight=0.0).total
    assert (with_halt - without).item() == pytest.approx(0.5 * expected.item(), abs=1e-5)


def test_a_second_pass_starts_from_the_detached_carry():
    kernel, windows = _kernel(), _windows()
    text_loss(kernel, windows, passes=2, halt_weight=0.0).total.backward()
    both = kernel.head.weight.grad.clone()
    kernel.zero_grad()
    first = kernel(windows[:, :-1])
    second = kernel(windows[:, :-1], first.carry)
    target = windows[:, 1:].flatten()
    nats = [F.cross_entropy(output.logits.flatten(0, 1), target) for output in (first, second)]
    (0.5 * (nats[0] + nats[1])).backward()
    assert torch.allclose(both, kernel.head.weight.grad, atol=1e-6)
    loss = text_loss(kernel, windows, passes=2, halt_weight=0.0)
    assert loss.nats_per_byte == pytest.approx(nats[0].item(), abs=1e-6)
    assert loss.last_nats_per_byte == pytest.approx(nats[1].item(), abs=1e-6)


def test_windows_are_pieces_of_the_text_and_reach_both_ends():
    text = torch.arange(20)
    windows = random_windows(text, 4, 500, torch.Generator().manual_seed(0))
    assert windows.shape == (500, 5)
    assert torch.equal(windows - windows[:, :1], torch.arange(5).expand(500, 5))
    assert int(windows.min()) == 0
    assert int(windows.max()) == 19
    again = random_windows(text, 4, 500, torch.Generator().manual_seed(0))
    assert torch.equal(windows, again)


@pytest.mark.parametrize("length", [2, 9, 10, 25, 26])
def test_bits_per_byte_judges_every_byte_but_the_first_once(length: int):
    """A bigram table needs no context, so cutting into windows must not change its bits."""
    generator = torch.Generator().manual_seed(length)
    scores = torch.randn(256, 256, generator=generator)
    text = torch.randint(0, 256, (length,), generator=generator)
    whole = float(F.cross_entropy(scores[text[:-1]], text[1:])) / math.log(2)
    assert bits_per_byte(lambda ids: scores[ids], text, context=4, batch_size=2) == pytest.approx(whole, rel=1e-5)


def test_bits_per_byte_of_an_indifferent_model_are_eight():
    text = torch.arange(50)
    assert bits_per_byte(lambda ids: torch.zeros(*ids.shape, 256), text, context=7) == pytest.approx(8.0)


def test_a_kernel_learns_text():
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 20))
    kernel = _kernel()
    optimizer, generator = TrainingDefaults(lr=1e-2).optimizer(kernel), torch.Generator().manual_seed(0)
    before = bits_per_byte(lambda ids: kernel(ids).logits, text, 32)
    for _ in range(30):
        optimizer.zero_grad()
        text_loss(kernel, random_windows(text, 32, 8, generator)).total.backward()
        optimizer.step()
    after = bits_per_byte(lambda ids: kernel(ids).logits, text, 32)
    assert before > 7.0
    assert after < 3.0


def test_impossible_input_is_an_error():
    kernel = _kernel()
    with pytest.raises(InvalidInput, match="windows"):
        text_loss(kernel, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="passes"):
        text_loss(kernel, _windows(), passes=0)
    with pytest.raises(InvalidInput, match="no window"):
        random_windows(torch.arange(4), 4, 1, torch.Generator())
    with pytest.raises(InvalidInput, match="two bytes"):
        bits_per_byte(lambda ids: ids, torch.arange(1), 4)
