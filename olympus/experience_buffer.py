"""What a kernel remembers of the history: the newest experiences, a fair sample of all, and a held-out part.

- **Held-out by content.** The SHA-256 of an experience decides on which side it falls, so the split is the same after
  every restart, and a duplicate can never stand on both sides.
- **Newest and reservoir.** Half of a batch comes from a first-in-first-out window, half from a reservoir in which
  every experience ever seen stands with equal probability (Vitter 1985, algorithm R). Item t goes to slot
  ``h(seed, t) mod t`` when that slot exists: the draw is a hash of the counter, not a stream of random numbers, so the
  content depends on the history alone, however it was cut into batches.
- **Not imitated:** experiences with a negative score, cancelled answers, and the kernel's own unjudged answers. They
  are remembered by id only; a positive judgement later lets them in. A judgement above zero raises the sampling
  weight up to twofold.
- **Forgetting:** a deleted experience leaves all parts; the hole is filled by later experiences.

Sampling is a pure function of seed, step and content: a resumed kernel draws the same batches. Not here: reading
the history (``experience_source``), priorities and distillation of old answers (DER++), which build on ``sample``.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from memory.history import Record

Outcome = Literal["training", "holdout", "duplicate", "waiting", "skipped"]
#: How many ids of not (yet) imitated experiences are watched for a later judgement.
MAX_WATCHED = 1024
#: Source of a kernel's own answers; they need a positive judgement before they are imitated.
QUERY_SOURCE = "query"


@dataclass(frozen=True, slots=True)
class Example:
    """An experience to imitate. ``weight`` is relative to an unjudged one."""

    id: int
    observation: str
    action: str
    score: float | None
    content_hash: str

    @property
    def weight(self) -> float:
        """1 when unjudged, up to 2 when confirmed."""
        return 1.0 + min(max(self.score or 0.0, 0.0), 1.0)


class ExperienceBuffer:
    """Bounded memory over the history. Used by one thread at a time."""

    def __init__(self, capacity: int, holdout_percent: int, seed: int):
        self.capacity = capacity
        self.holdout_percent = holdout_percent
        self.seed = seed
        self.holdout_capacity = max(1, capacity * holdout_percent // 100)
        self.recent_capacity = (capacity - self.holdout_capacity) // 2
        self.reservoir_capacity = capacity - self.holdout_capacity - self.recent_capacity
        self.cursor = 0
        self.seen_training = 0
        self.seen_holdout = 0
        #: Grows with every change of content; equal versions, equal content.
        self.version = 0
        self.holdout_version = 0
        self._items: dict[int, Example] = {}
        self._by_hash: dict[str, int] = {}
        self._uses: Counter[int] = Counter()  # in how many parts an experience stands
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._reservoir: list[int] = []
        self._holdout: list[int] = []
        self._watched: OrderedDict[int, None] = OrderedDict()
        self._pools: tuple[int, list[tuple[list[Example], list[float]]]] = (-1, [])

    def __len__(self) -> int:
        return len(self._items)

    # -- what comes in ----------------------------------------------------------------------------------------

    def add(self, record: Record) -> Outcome:
        """Take in one record of the history, which must come in order of id the first time."""
        self.cursor = max(self.cursor, record.id)
        if record.deleted or not record.action or record.meta.get("finish_reason") == "cancelled":
            return "skipped"
        if not _is_imitable(record.source, record.score):
            self._watch(record.id)
            return "waiting"
        if record.content_hash in self._by_hash:
            return "duplicate"
        self._watched.pop(record.id, None)
        example = Example(record.id, record.observation, record.action, record.score, record.content_hash)
        kept = self._hold_out(example) if self.is_held_out(record.content_hash) else self._learn_from(example)
        self._changed(holdout=kept == "holdout")
        return kept

    def judge(self, example_id: int, score: float | None) -> None:
        """A judgement changed: reweigh the experience, or stop imitating it when the score is negative."""
        example = self._items.get(example_id)
        if example is None or example.score == score:
            return
        if score is not None and score < 0:
            self.forget([example_id])
            self._watch(example_id)
            return
        self._items[example_id] = replace(example, score=score)
        self._changed(holdout=False)

    def forget(self, ids: Iterable[int]) -> int:
        """Drop experiences, in ascending order of id whatever the order given; returns how many were held."""
        dropped = 0
        for example_id in sorted(ids):
            self._watched.pop(example_id, None)
            example = self._items.pop(example_id, None)
            if example is None:
                continue
            dropped += 1
            del self._by_hash[example.content_hash], self._uses[example_id]
            self._recent.pop(example_id, None)
            held_out = self.is_held_out(example.content_hash)
            slots = self._holdout if held_out else self._reservoir
            if example_id in slots:
                slots.remove(example_id)
            self._changed(holdout=held_out)
        return dropped

    def is_held_out(self, content_hash: str) -> bool:
        """Which side an experience falls on; a pure function of its content."""
        return int(content_hash[:8], 16) % 100 < self.holdout_percent

    # -- what goes out ----------------------------------------------------------------------------------------

    def sample(self, count: int, step: int) -> list[Example]:
        """``count`` training examples for ``step``, with replacement: half newest, half reservoir.

        Raises ``ValueError`` when there is nothing to train on.
        """
        if not self._recent and not self._reservoir:
            raise ValueError("the buffer holds no training experience yet")
        if self._pools[0] != self.version:
            self._pools = (self.version, [self._pool(self._recent), self._pool(self._reservoir)])
        recent, reservoir = self._pools[1]
        drawer = random.Random(f"{self.seed}:{step}")
        drawn: list[Example] = []
        for pool, other, share in ((recent, reservoir, count // 2), (reservoir, recent, count - count // 2)):
            examples, cumulative = pool if pool[0] else other  # deletions can empty one of the two
            drawn += drawer.choices(examples, cum_weights=cumulative, k=share)
        return drawn

    def training(self) -> list[Example]:
        """All training examples, once each, by id."""
        ids = set(self._recent) | set(self._reservoir)
        return [self._items[example_id] for example_id in sorted(ids)]

    def holdout(self) -> list[Example]:
        """All held-out examples, by id."""
        return [self._items[example_id] for example_id in sorted(self._holdout)]

    @property
    def held_ids(self) -> list[int]:
        """Ids whose judgement or deletion matters: held and watched ones."""
        return [*self._items, *self._watched]

    def counts(self) -> dict[str, int]:
        """Sizes for the status."""
        return {
            "size": len(self._items),
            "capacity": self.capacity,
            "new": len(self._recent),
            "reservoir": len(self._reservoir),
            "training": len(self._items) - len(self._holdout),
            "holdout": len(self._holdout),
            "not_imitated": len(self._watched),
            "seen": self.seen_training + self.seen_holdout,
            "cursor": self.cursor,
        }

    # -- persistence ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Ids and counters as JSON types; the texts stay in the history, the one truth."""
        return {
            "cursor": self.cursor,
            "seen_training": self.seen_training,
            "seen_holdout": self.seen_holdout,
            "recent": list(self._recent),
            "reservoir": list(self._reservoir),
            "holdout": list(self._holdout),
            "watched": list(self._watched),
        }

    @staticmethod
    def ids_in(state: Mapping[str, Any]) -> list[int]:
        """The ids whose records ``load_state_dict`` needs."""
        return sorted({*state["recent"], *state["reservoir"], *state["holdout"]})

    def load_state_dict(self, state: Mapping[str, Any], records: Sequence[Record]) -> None:
        """Rebuild the content from saved ids and their records; what was deleted meanwhile is forgotten."""
        found = {record.id: record for record in records if not record.deleted}
        self.cursor, self.seen_training = int(state["cursor"]), int(state["seen_training"])
        self.seen_holdout = int(state["seen_holdout"])
        self._recent = OrderedDict.fromkeys(item for item in state["recent"] if item in found)
        self._reservoir = [item for item in state["reservoir"] if item in found]
        self._holdout = [item for item in state["holdout"] if item in found]
        self._watched = OrderedDict.fromkeys(state["watched"])
        self._items = {
            item: Example(item, row.observation, row.action, row.score, row.content_hash)
            for item, row in ((item, found[item]) for item in self.ids_in(state) if item in found)
        }
        self._by_hash = {example.content_hash: example.id for example in self._items.values()}
        self._uses = Counter([*self._recent, *self._reservoir, *self._holdout])
        self._changed(holdout=True)
        rejected = [example.id for example in self._items.values() if (example.score or 0.0) < 0]
        self.forget(rejected)
        for example_id in rejected:
            self._watch(example_id)

    def check_invariants(self) -> None:
        """Bounds hold, the parts are disjoint or nested as documented, and the split follows the content."""
        training = set(self._recent) | set(self._reservoir)
        assert len(self._recent) <= self.recent_capacity
        assert len(self._reservoir) == len(set(self._reservoir)) <= self.reservoir_capacity
        assert len(self._holdout) == len(set(self._holdout)) <= self.holdout_capacity
        assert len(self._watched) <= MAX_WATCHED
        assert not training & set(self._holdout)
        assert training | set(self._holdout) == set(self._items)
        assert not set(self._watched) & set(self._items)
        assert len(self._items) <= self.capacity
        assert Counter([*self._recent, *self._reservoir, *self._holdout]) == self._uses
        assert {example.content_hash: example.id for example in self._items.values()} == self._by_hash
        assert all(self.is_held_out(self._items[item].content_hash) for item in self._holdout)
        assert not any(self.is_held_out(self._items[item].content_hash) for item in training)
        assert all((example.score or 0.0) >= 0 for example in self._items.values())
        assert max(self._items, default=0) <= self.cursor

    # -- inside -----------------------------------------------------------------------------------------------

    def _learn_from(self, example: Example) -> Outcome:
        self.seen_training += 1
        self._keep(example)
        self._recent[example.id] = None
        self._uses[example.id] += 1
        self._place(self._reservoir, self.reservoir_capacity, self.seen_training, example.id)
        if len(self._recent) > self.recent_capacity:
            self._release(self._recent.popitem(last=False)[0])
        return "training"

    def _hold_out(self, example: Example) -> Outcome:
        self.seen_holdout += 1
        self._keep(example)
        if self._place(self._holdout, self.holdout_capacity, self.seen_holdout, example.id):
            return "holdout"
        self._drop(example.id)
        return "skipped"

    def _place(self, slots: list[int], capacity: int, count: int, example_id: int) -> bool:
        """Algorithm R: the ``count``-th item; holes left by deletions are filled first."""
        if len(slots) < capacity:
            slots.append(example_id)
            self._uses[example_id] += 1
            return True
        digest = hashlib.blake2b(f"{self.seed}:{capacity}:{count}".encode(), digest_size=8).digest()
        slot = int.from_bytes(digest, "big") % count
        if slot >= capacity:
            return False
        replaced, slots[slot] = slots[slot], example_id
        self._uses[example_id] += 1
        self._release(replaced)
        return True

    def _keep(self, example: Example) -> None:
        self._items[example.id] = example
        self._by_hash[example.content_hash] = example.id

    def _release(self, example_id: int) -> None:
        self._uses[example_id] -= 1
        if self._uses[example_id] == 0:
            self._drop(example_id)

    def _drop(self, example_id: int) -> None:
        example = self._items.pop(example_id)
        del self._by_hash[example.content_hash], self._uses[example_id]

    def _watch(self, example_id: int) -> None:
        self._watched[example_id] = None
        if len(self._watched) > MAX_WATCHED:
            self._watched.popitem(last=False)

    def _pool(self, ids: Iterable[int]) -> tuple[list[Example], list[float]]:
        examples = [self._items[example_id] for example_id in ids]
        return examples, list(accumulate(example.weight for example in examples))

    def _changed(self, *, holdout: bool) -> None:
        self.version += 1
        self.holdout_version += holdout


def _is_imitable(source: str, score: float | None) -> bool:
    if score is None:
        return source != QUERY_SOURCE
    return score > 0 if source == QUERY_SOURCE else score >= 0
