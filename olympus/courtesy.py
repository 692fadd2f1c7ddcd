"""Training that lets questions through in the middle of a step.

A step takes 0.1 to 1 s, a question some 15 ms. Giving way between two steps only would let a question compete, for
most of its life, with all training threads for the cores and for the interpreter. So a training thread also looks at
the door (``QueryGate``) at every linear map of its kernel's blocks, on the way forward and on the way back, and
between two iterations of the measurement of Phi: every millisecond or so. A look costs 0.1 microseconds.

A chat lasts for seconds or minutes, so training goes on beside it, but at a pace: for every millisecond of its own
processor time a thread rests so long that it keeps to its share of a core. The looks are so frequent that no token
waits for long; a pause between two steps instead would let every step slow all tokens that it meets.

How long one step may be held up altogether is bounded, so that a crowd slows training down and cannot stop it.
The numbers that are computed do not change. It does not lower a thread's priority: ``query_gate.be_nice`` does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from olympus.query_gate import QueryGate
from qig_core.m8_kernel import M8Kernel

#: Longest rest at once, in seconds: a thread that is asked to stop, or whose chat has ended, notices it after that.
_NAP_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Pace:
    """How a training thread goes on while somebody is served."""

    serving: Callable[[], bool]  #: whether an answer is being generated
    share: float  #: of a core, while that is so
    per_step_seconds: float  #: the most that this may hold up one step
    hurry: threading.Event  #: set when the thread shall end: no rest any more

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.per_step_seconds < 0:
            raise ValueError(
                "share must be above 0 and at most 1, per_step_seconds at least 0, got "
                f"{self.share} and {self.per_step_seconds}"
            )


class Courtesy:
    """Belongs to one training thread; ``renew`` it at every step and call it wherever work can be interrupted."""

    def __init__(self, gate: QueryGate, per_step_seconds: float, pace: Pace | None = None):
        if per_step_seconds < 0:
            raise ValueError(f"per_step_seconds must be at least 0, got {per_step_seconds}")
        self._gate = gate
        self._per_step = per_step_seconds
        self._left = per_step_seconds
        self._pace = pace
        self._pace_left = 0.0 if pace is None else pace.per_step_seconds
        self._worked = 0.0  #: this thread's processor time at the last look beside a chat; 0: there was none
        self._waited = 0.0

    def renew(self) -> None:
        """A step begins: it may be held up anew."""
        self._left = self._per_step
        self._pace_left = 0.0 if self._pace is None else self._pace.per_step_seconds

    def __call__(self) -> None:
        """Return when no question is open and the pace is kept, or when this step has been held up for long enough."""
        if not self._gate.is_empty and self._left > 0:
            begun = time.perf_counter()
            self._gate.give_way(self._left)
            waited = time.perf_counter() - begun
            self._left -= waited
            self._waited += waited
        if self._pace is not None and self._pace.share < 1:
            self._rest(self._pace)

    def _rest(self, pace: Pace) -> None:
        """Beside a chat, make up for the work since the last look."""
        if not pace.serving():
            self._worked = 0.0
            return
        now = time.thread_time()
        owed = (now - self._worked) * (1 / pace.share - 1) if self._worked else 0.0
        owed = min(owed, self._pace_left)
        while owed > 0 and pace.serving():
            begun = time.perf_counter()
            ended = pace.hurry.wait(min(owed, _NAP_SECONDS))
            rested = time.perf_counter() - begun
            owed -= rested
            self._pace_left -= rested
            self._waited += rested
            if ended:
                break
        self._worked = time.thread_time()

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
