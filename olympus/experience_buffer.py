"""What a kernel remembers of the history: the newest experiences, a fair sample of all, and a held-out part.

- **Held-out by content.** The SHA-256 of an experience decides on which side it falls, so the split is the same after
  every restart, and a duplicate can never stand on both sides.
- **Newest and reservoir.** Half of a batch comes from a first-in-first-out window, half from a reservoir in which
  every experience ever seen stands with equal probability (Vitter 1985, algorithm R). Item t goes to slot
  ``h(seed, t) mod t`` when that slot exists: the draw is a hash of the counter, not a stream of random numbers, so the
  content depends on the history alone, however it was cut into batches.
- **Priorities** (off by default): a share of every batch goes to the experiences that the kernel knows worst
  (``priorities``). Their rows are weighed down so that, on average, the batch still asks what the buffer holds.
- **Per-source caps** (off by default): no source (chat, api, query, ...) holds more than a share of either training
  part; a source at its cap replaces only its own experiences, so a flood does not wash out what others sent.
- **Not imitated:** experiences with a negative score, cancelled answers, and the kernel's own unjudged answers. They
  are remembered by id only; a positive judgement later lets them in. A judgement above zero raises the sampling
  weight up to twofold.
- **Forgetting:** a deleted experience leaves all parts; the hole is filled by later experiences.

Sampling is a pure function of seed, step, content and priorities, all of which are saved: a resumed kernel draws the
same batches. Not here: reading the history (``experience_source``), what is done with a batch (``rehearsal``).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

from memory.history import Record
from olympus.example import Draw, Example, is_imitable
from olympus.priorities import Priorities

Outcome = Literal["training", "holdout", "duplicate", "waiting", "skipped"]
#: How many ids of not (yet) imitated experiences are watched for a later judgement.
MAX_WATCHED = 1024


class ExperienceBuffer:
    """Bounded memory over the history. Used by one thread at a time.

    ``priority_share`` in [0, 1): part of a batch that is drawn by priority. ``source_cap_percent``: share of each
    training part that one source may hold; 100 is no cap.
    """

    def __init__(
        self,
        capacity: int,
        holdout_percent: int,
        seed: int,
        *,
        priority_share: float = 0.0,
        source_cap_percent: int = 100,
    ):
        self.capacity = capacity
        self.holdout_percent = holdout_percent
        self.seed = seed
        self.holdout_capacity = max(1, capacity * holdout_percent // 100)
        self.recent_capacity = (capacity - self.holdout_capacity) // 2
        self.reservoir_capacity = capacity - self.holdout_capacity - self.recent_capacity
        self.priority_share = priority_share
        self.source_cap_percent = source_cap_percent
        held = self.recent_capacity + self.reservoir_capacity + 1  # one comes in before another leaves
        self._priorities = Priorities(held) if priority_share > 0 else None
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
        self._seen_by_source: Counter[str] = Counter()  # training experiences ever seen, by source
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
        if not is_imitable(record.source, record.score):
            self._watch(record.id)
            return "waiting"
        if record.content_hash in self._by_hash:
            return "duplicate"
        self._watched.pop(record.id, None)
        example = Example.of(record)
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
            self._unrank(example_id)
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
        """The examples of ``draw``."""
        return self.draw(count, step).examples

    def draw(self, count: int, step: int) -> Draw:
        """``count`` training examples for ``step``, with replacement: the prioritised share, and of the rest half
        from the newest and half from the reservoir.

        Raises ``ValueError`` when there is nothing to train on.
        """
        if not self._recent and not self._reservoir:
            raise ValueError("the buffer holds no training experience yet")
        if self._pools[0] != self.version:
            self._pools = (self.version, [self._pool(self._recent), self._pool(self._reservoir)])
        recent, reservoir = self._pools[1]
        drawer = random.Random(f"{self.seed}:{step}")
        ranked = self._by_priority(round(count * self.priority_share), drawer, step)
        rest = count - len(ranked)
        drawn = [self._items[example_id] for example_id, _ in ranked]
        for pool, other, share in ((recent, reservoir, rest // 2), (reservoir, recent, rest - rest // 2)):
            examples, cumulative = pool if pool[0] else other  # deletions can empty one of the two
            drawn += drawer.choices(examples, cum_weights=cumulative, k=share)
        return Draw(drawn, [weight for _, weight in ranked] + [1.0] * rest)

    def learned(self, ids: Iterable[int], losses: Iterable[float]) -> None:
        """The losses (nats per byte) of what was just trained on: their priorities from now on."""
        if self._priorities is not None:
            for example_id, loss in zip(ids, losses, strict=True):
                self._priorities.observe(example_id, loss)

    def get(self, example_id: int) -> Example | None:
        """The example held under an id."""
        return self._items.get(example_id)

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
            "seen_by_source": dict(self._seen_by_source),
            "priorities": None if self._priorities is None else self._priorities.state_dict(),
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
        self._items = {item: Example.of(found[item]) for item in self.ids_in(state) if item in found}
        self._by_hash = {example.content_hash: example.id for example in self._items.values()}
        self._uses = Counter([*self._recent, *self._reservoir, *self._holdout])
        self._seen_by_source = Counter(state.get("seen_by_source", {}))
        if self._priorities is not None:
            saved = state.get("priorities") or {"slots": [], "losses": []}  # they were off when this was saved
            self._priorities.load_state_dict(saved, {*self._recent, *self._reservoir})
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
        if self._priorities is not None:
            self._priorities.check_invariants()
            assert set(self._priorities.ids()) == training
        for part in (self._recent, self._reservoir):
            most = max(Counter(self._items[item].source for item in part).values(), default=0)
            assert most <= max(self._cap(self.recent_capacity), self._cap(self.reservoir_capacity))

    # -- inside -----------------------------------------------------------------------------------------------

    def _learn_from(self, example: Example) -> Outcome:
        self.seen_training += 1
        self._seen_by_source[example.source] += 1
        self._keep(example)
        self._recent[example.id] = None
        self._uses[example.id] += 1
        if self._priorities is not None:
            self._priorities.add(example.id)
        self._place_in_reservoir(example)
        if (crowded := self._crowded_out(example)) is not None:
            del self._recent[crowded]
            self._release(crowded)
        return "training"

    def _crowded_out(self, example: Example) -> int | None:
        """Who leaves the newest for ``example``: the oldest of its source if that is above its cap, or of all."""
        if self.source_cap_percent < 100:
            own = [item for item in self._recent if self._items[item].source == example.source]
            if len(own) > self._cap(self.recent_capacity):
                return own[0]
        return next(iter(self._recent)) if len(self._recent) > self.recent_capacity else None

    def _place_in_reservoir(self, example: Example) -> None:
        """Algorithm R over all; a source at its cap has a reservoir of its own within (Vitter over that source)."""
        if self.source_cap_percent < 100:
            own = [slot for slot, item in enumerate(self._reservoir) if self._items[item].source == example.source]
            if len(own) >= self._cap(self.reservoir_capacity):
                count = self._seen_by_source[example.source]
                chosen = self._hashed(f"{example.source}:{count}") % count
                if chosen < len(own):
                    self._replace(self._reservoir, own[chosen], example.id)
                return
        self._place(self._reservoir, self.reservoir_capacity, self.seen_training, example.id)

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
        slot = self._hashed(f"{capacity}:{count}") % count
        if slot >= capacity:
            return False
        self._replace(slots, slot, example_id)
        return True

    def _replace(self, slots: list[int], slot: int, example_id: int) -> None:
        replaced, slots[slot] = slots[slot], example_id
        self._uses[example_id] += 1
        self._release(replaced)

    def _hashed(self, text: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest(), "big")

    def _cap(self, capacity: int) -> int:
        """How many of ``capacity`` places one source may take."""
        return max(1, capacity * self.source_cap_percent // 100)

    def _keep(self, example: Example) -> None:
        self._items[example.id] = example
        self._by_hash[example.content_hash] = example.id

    def _release(self, example_id: int) -> None:
        self._uses[example_id] -= 1
        if self._uses[example_id] == 0:
            self._drop(example_id)

    def _drop(self, example_id: int) -> None:
        example = self._items.pop(example_id)
        self._unrank(example_id)
        del self._by_hash[example.content_hash], self._uses[example_id]

    def _unrank(self, example_id: int) -> None:
        if self._priorities is not None and example_id in self._priorities:
            self._priorities.remove(example_id)

    def _by_priority(self, count: int, drawer: random.Random, step: int) -> list[tuple[int, float]]:
        return [] if self._priorities is None or count < 1 else self._priorities.draw(count, drawer, step)

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
