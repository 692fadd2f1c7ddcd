"""Prioritised replay: which of the experiences held are worth another look.

Schaul et al. 2016 (arXiv 1511.05952), proportional variant (section 3.3):

    P(i) = p_i^alpha / sum_k p_k^alpha        w_i = (N P(i))^-beta / max_j w_j

- **p is the clipped loss.** p_i = min(loss_i, clip) + epsilon, in nats per byte of the action. A high loss is not
  useful by itself: on noisy data the highest losses are answers that nobody can know, and unclipped they would take
  the whole share. ``CLIP`` is what a kernel loses when it has not learned an action at all yet still knows its
  alphabet (measured: 2 to 3 nats per byte); above it, one experience is as much worth another look as the next.
- **New items** get the highest priority, ``CLIP``, so that each is seen soon.
- **beta** rises from 0.4 to 1 over ``BETA_STEPS``: the correction matters most when the weights hardly move any more.

Every experience keeps its slot in the tree for as long as it is held, and the slots are saved with the values, so a
restored kernel draws the same ones. Not here: how large the prioritised share of a batch is (``experience_buffer``).
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Collection, Mapping
from typing import Any

from olympus.sum_tree import SumTree

ALPHA = 0.6
BETA_START = 0.4
BETA_STEPS = 5000
CLIP = 3.0
EPSILON = 0.01


class Priorities:
    """Priorities of up to ``capacity`` experiences by id. Used by one thread at a time."""

    def __init__(self, capacity: int):
        self._tree = SumTree(capacity)
        self._slots: list[int | None] = [None] * capacity
        self._where: dict[int, int] = {}
        self._losses: dict[int, float] = {}
        self._free = list(range(capacity))  # a heap: the lowest empty slot first, whatever order they became empty in

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, example_id: int) -> bool:
        return example_id in self._where

    def ids(self) -> list[int]:
        """Who has a priority, in ascending order."""
        return sorted(self._where)

    def add(self, example_id: int) -> None:
        """A new experience, at the highest priority."""
        slot = heapq.heappop(self._free)
        self._slots[slot], self._where[example_id] = example_id, slot
        self._put(example_id, CLIP)

    def remove(self, example_id: int) -> None:
        """The experience is no longer held."""
        slot = self._where.pop(example_id)
        self._slots[slot] = None
        self._tree[slot] = 0.0
        del self._losses[example_id]
        heapq.heappush(self._free, slot)

    def observe(self, example_id: int, loss: float) -> None:
        """The loss of an experience that was just trained on; unknown ids and losses that are no number pass by."""
        if example_id in self._where and math.isfinite(loss):
            self._put(example_id, min(max(loss, 0.0), CLIP))

    def draw(self, count: int, drawer: random.Random, step: int) -> list[tuple[int, float]]:
        """``count`` pairs (id, importance weight in (0, 1]), stratified: one from each equal part of the line."""
        share = self._tree.total / count
        slots = [self._tree.find(min((part + drawer.random()) * share, self._last)) for part in range(count)]
        beta = min(1.0, BETA_START + (1 - BETA_START) * step / BETA_STEPS)
        weights = [(len(self) * self._tree[slot] / self._tree.total) ** -beta for slot in slots]
        top = max(weights)
        drawn: list[tuple[int, float]] = []
        for slot, weight in zip(slots, weights, strict=True):
            example_id = self._slots[slot]
            assert example_id is not None, "an empty slot has no share"
            drawn.append((example_id, weight / top))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Slots and clipped losses as JSON types."""
        return {
            "slots": self._slots[: self._used],
            "losses": [self._losses[item] for item in self._slots if item is not None],
        }

    def load_state_dict(self, state: Mapping[str, Any], held: Collection[int]) -> None:
        """Replace everything by what was saved, for those still ``held``; who has no saved priority is new.

        Raises ``ValueError`` when the state does not fit.
        """
        saved = list(state["slots"])
        if len(saved) > self._tree.capacity:
            raise ValueError(f"{len(saved)} saved priorities do not fit into {self._tree.capacity} slots")
        self._clear()
        losses = iter(state["losses"])
        known = [(slot, item, float(next(losses))) for slot, item in enumerate(saved) if item is not None]
        taken = {slot: (item, loss) for slot, item, loss in known if item in held}
        self._free = [slot for slot in self._free if slot not in taken]
        for slot, (item, loss) in taken.items():
            self._slots[slot], self._where[item] = item, slot
            self._put(item, loss)
        for item in sorted(held):
            if item not in self._where:
                self.add(item)

    def check_invariants(self) -> None:
        """Slots, places and the tree agree; free slots are empty."""
        self._tree.check_invariants()
        held = {slot: item for slot, item in enumerate(self._slots) if item is not None}
        assert held == {slot: item for item, slot in self._where.items()}
        assert self._losses.keys() == self._where.keys()
        assert sorted(self._free) == [slot for slot, item in enumerate(self._slots) if item is None]
        assert all((self._tree[slot] > 0) == (item is not None) for slot, item in enumerate(self._slots))

    def _clear(self) -> None:
        capacity = len(self._slots)
        self._tree = SumTree(capacity)
        self._slots = [None] * capacity
        self._where.clear()
        self._losses.clear()
        self._free = list(range(capacity))

    @property
    def _last(self) -> float:
        return math.nextafter(self._tree.total, 0.0)

    @property
    def _used(self) -> int:
        """Slots up to the last one taken."""
        return max(self._where.values(), default=-1) + 1

    def _put(self, example_id: int, loss: float) -> None:
        self._losses[example_id] = loss
        self._tree[self._where[example_id]] = (loss + EPSILON) ** ALPHA
