"""Plain text as training material: next-byte cross-entropy over windows, and bits per byte.

A pair (``learning.py``) is judged on its action; a window of raw text on every byte but its first. There are no marks:
the text did not begin or end where the window was cut. Deep supervision as there: further passes start from the
detached carry. The halt head, read at the window's last position, learns whether the byte after it is right already.

What it does not do: choose windows, step an optimizer, or generate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qig_core.errors import InvalidInput
from qig_core.m8_kernel import Carry, M8Kernel


@dataclass(frozen=True)
class TextLoss:
    """A loss to descend; the detached nats are those of the first and of the last pass."""

    total: Tensor  # scalar with gradient, mean over passes
    nats_per_byte: float
    last_nats_per_byte: float


def text_loss(kernel: M8Kernel, windows: Tensor, passes: int = 1, halt_weight: float = 0.1) -> TextLoss:
    """Next-byte loss of windows [B, T + 1] of byte ids: nats per byte + halt_weight * halt loss, mean over passes.

    Raises InvalidInput for windows of less than two bytes, or ``passes`` < 1.
    """
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise InvalidInput(f"windows must be [B, T + 1] with T >= 1, got {list(windows.shape)}")
    if passes < 1:
        raise InvalidInput(f"passes must be at least 1, got {passes}")
    ids, target = windows[:, :-1], windows[:, 1:]
    carry: Carry | None = None
    losses, nats = list[Tensor](), list[Tensor]()
    for _ in range(passes):
        output = kernel(ids, carry)
        carry = output.carry
        nats.append(F.cross_entropy(output.logits.flatten(0, 1), target.flatten()))
        right = output.logits[:, -1].detach().argmax(-1) == target[:, -1]  # [B]
        halt = F.binary_cross_entropy_with_logits(output.halt_logit, right.float())
        losses.append(nats[-1] + halt_weight * halt)
    return TextLoss(torch.stack(losses).mean(), float(nats[0].detach()), float(nats[-1].detach()))


def random_windows(text: Tensor, context: int, rows: int, generator: torch.Generator) -> Tensor:
    """[rows, context + 1] windows of text [N], each beginning anywhere."""
    if len(text) <= context:
        raise InvalidInput(f"a text of {len(text)} bytes has no window of {context} + 1")
    starts = torch.randint(len(text) - context, (rows, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


@torch.no_grad()
def bits_per_byte(predict: Callable[[Tensor], Tensor], text: Tensor, context: int, batch_size: int = 64) -> float:
    """Mean bits of text [N] from its second byte on, cut into windows of ``context`` that share no target.

    ``predict``: ids [B, T] -> logits [B, T, V], as ``lambda ids: kernel(ids).logits``. Bytes early in a window are
    judged with little before them, which makes the number an upper bound of what the model can do.
    """
    if len(text) < 2 or context < 1:
        raise InvalidInput(f"bits_per_byte needs two bytes and a context, got {len(text)} bytes, context {context}")
    whole = (len(text) - 1) // context * context  # bytes in windows of full length
    pieces = [
        (text[begin:end].view(-1, context), text[begin + 1 : end + 1].view(-1, context))
        for begin in range(0, whole, batch_size * context)
        for end in (min(begin + batch_size * context, whole),)
    ]
    if whole < len(text) - 1:  # the last window is shorter
        pieces.append((text[whole:-1].unsqueeze(0), text[whole + 1 :].unsqueeze(0)))
    nats = 0.0
    for ids, target in pieces:
        nats += float(F.cross_entropy(predict(ids).flatten(0, 1).float(), target.flatten(), reduction="sum"))
    return nats / (len(text) - 1) / math.log(2)
