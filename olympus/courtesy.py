"""Training that lets questions through in the middle of a step.

A step takes 0.1 to 1 s, a question some 15 ms. Giving way between two steps only would let a question compete, for
most of its life, with all training threads for the cores and for the interpreter. So a training thread also looks at
the door (``QueryGate``) at every linear map of its kernel's blocks, on the way forward and on the way back, and
between two iterations of the measurement of Phi: every millisecond or so. A look costs 0.1 microseconds.

How long one step may be held up altogether is bounded, so that a crowd slows training down and cannot stop it.
The numbers that are computed do not change. It does not lower a thread's priority: ``query_gate.be_nice`` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from olympus.query_gate import QueryGate
from qig_core.m8_kernel import M8Kernel


class Courtesy:
    """Belongs to one training thread; ``renew`` it at every step and call it wherever work can be interrupted."""

    def __init__(self, gate: QueryGate, per_step_seconds: float):
        if per_step_seconds < 0:
            raise ValueError(f"per_step_seconds must be at least 0, got {per_step_seconds}")
        self._gate = gate
        self._per_step = per_step_seconds
        self._left = per_step_seconds
        self._waited = 0.0

    def renew(self) -> None:
        """A step begins: it may be held up anew."""
        self._left = self._per_step

    def __call__(self) -> None:
        """Return when no question is open, or when this step has been held up for long enough."""
        if self._gate.is_empty or self._left <= 0:
            return
        begun = time.perf_counter()
        self._gate.give_way(self._left)
        waited = time.perf_counter() - begun
        self._left -= waited
        self._waited += waited

    def take_waited(self) -> float:
        """Seconds waited since the last call, to be taken off what a step is said to have cost."""
        waited, self._waited = self._waited, 0.0
        return waited

    def hook(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook: look at the door now, and again when the gradient comes back to here."""
        self()
        entering: Tensor = inputs[0]
        if entering.requires_grad:
            entering.register_hook(self._backward)  # type: ignore[no-untyped-call]

    def _backward(self, _: Tensor) -> None:
        self()


@contextmanager
def within(courtesy: Courtesy | None, kernel: M8Kernel) -> Iterator[None]:
    """While open, the passes of ``kernel`` give way at every linear map of its blocks; None: to nobody.

    Copy no kernel meanwhile: the copy would have the hooks, too, and make a question wait for itself.
    """
    layers = [] if courtesy is None else [layer for layer in kernel.blocks.modules() if isinstance(layer, nn.Linear)]
    handles = [] if courtesy is None else [layer.register_forward_pre_hook(courtesy.hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
