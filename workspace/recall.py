"""What the workspace asks of a memory: the protocol, and nothing of how a memory finds things.

The runtime hands an implementation to ``Steering``; tests hand in a list. Calls come from the engine's thread in the
middle of a generation, so an implementation answers within milliseconds, and raises nothing: a memory that fails is a
memory that has nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recollection:
    """Something that was remembered. ``embedding`` [E] updates the slots where the memory has one."""

    text: str
    score: float
    source: str  #: what it is, for people: ``experience 17``
    embedding: Tensor | None = None


class Recall(Protocol):
    """A memory that can be asked."""

    def __call__(self, query: str, *, session: str | None, domain: str | None, limit: int) -> Sequence[Recollection]:
        """At most ``limit`` recollections that ``query`` brings to mind, best first; none where nothing fits."""
