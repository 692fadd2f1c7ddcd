"""Anything, in any order, against a model of a few lines: writes, time, pins, spilling, snapshots, kill -9.

The model keeps a list of segments per session and knows nothing of tensors, locks, residency or bytes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from tests.support.virtual_tokens import LAYERS, FakeClock, Shelf, make_layers, make_shape, same_view
from workspace.context import Segment
from workspace.errors import StoreFull, UnknownSegment
from workspace.virtual_kv import VirtualKVStore
from workspace.virtual_kv_limits import SegmentId, StoreLimits

TOKEN = make_shape().token_bytes
MAX_TOKENS, MAX_SEGMENTS, MAX_TOTAL = 5, 4, 9
PLENTY = 1 << 40

sessions = st.sampled_from("abc")
places = st.integers(0, MAX_SEGMENTS - 1)


@dataclass
class Known:
    """What the model knows of a segment; its tensors follow from ``seed`` and ``counts``."""

    id: SegmentId
    counts: dict[int, int]
    seed: int
    born: int
    distance: int
    steps_left: int | None
    expires_at: float | None
    pinned: bool

    def overdue(self, now: float) -> bool:
        late = self.expires_at is not None and now >= self.expires_at
        return not self.pinned and (late or (self.steps_left is not None and self.steps_left <= 0))


def _overfull(held: list[Known]) -> list[int]:
    return [layer for layer in LAYERS if sum(own.counts.get(layer, 0) for own in held) > MAX_TOKENS]


def _too_much(held: list[Known]) -> bool:
    return len(held) > MAX_SEGMENTS or sum(sum(own.counts.values()) for own in held) > MAX_TOTAL


def _after_write(held: list[Known], new: Known) -> list[Known] | None:
    """The session after ``new`` was written; None where it must be refused."""
    held = [*held, new]
    while _too_much(held) or _overfull(held):
        anything, layers = _too_much(held), _overfull(held)
        useful = [own for own in held[:-1] if not own.pinned and (anything or set(layers) & set(own.counts))]
        if not useful:
            return None
        held.remove(useful[0])
    return held


def _expected(held: list[Known]) -> dict[int, Segment]:
    view: dict[int, Segment] = {}
    for layer in LAYERS:
        own = [known for known in held if layer in known.counts]
        if own:
            keys, values, bias = (
                torch.cat([make_layers(known.counts, known.seed)[layer][part] for known in own], dim=2)
                for part in range(3)
            )
            birth = [known.born for known in own for _ in range(known.counts[layer])]
            distance = [known.distance for known in own for _ in range(known.counts[layer])]
            view[layer] = Segment(keys, values, bias, torch.tensor([birth]), distance=torch.tensor(distance))
    return view


class StoreMachine(RuleBasedStateMachine):
    """A store beside its model."""

    snapshots = Bundle("snapshots")

    @initialize(parking=st.booleans(), persistent=st.booleans())
    def start(self, parking: bool, persistent: bool) -> None:
        self.parking = torch.device("cpu") if parking else None
        self.persistent = persistent
        # Where nothing can leave memory for good, nothing may have to: what is forgotten has its own test.
        tight = 11 * TOKEN
        self.limits = StoreLimits(
            max_tokens_per_layer=MAX_TOKENS,
            max_segments=MAX_SEGMENTS,
            max_bytes=MAX_TOTAL * TOKEN,
            spill_bytes=tight if parking or persistent else PLENTY,
            parked_bytes=6 * TOKEN if persistent else PLENTY,
        )
        self.clock, self.shelf = FakeClock(), Shelf()
        self.model: dict[str, list[Known]] = {name: [] for name in "abc"}
        self.on_disk: dict[str, list[Known]] = copy.deepcopy(self.model)
        self.held: list[tuple[dict[int, Segment], dict[int, Segment]]] = []
        self.open()

    def open(self) -> None:
        persistence = {"load": self.shelf.load, "save": self.save} if self.persistent else {}
        self.store = VirtualKVStore(
            make_shape(),
            self.limits,
            clock=self.clock,
            parking=self.parking,
            **persistence,  # type: ignore[arg-type]
        )

    def save(self, session: str, blob: bytes | None) -> None:
        self.shelf.save(session, blob)
        self.on_disk[session] = copy.deepcopy(self.model[session])

    def expire(self) -> None:
        for name, held in self.model.items():
            self.model[name] = [own for own in held if not own.overdue(self.clock.now)]

    def compare(self, session: str) -> None:
        held = self.model[session]
        infos = self.store.segments(session)
        assert [info.id for info in infos] == [own.id for own in held]
        assert [info.pinned for info in infos] == [own.pinned for own in held]
        view, expected = self.store.view(session), _expected(held)
        assert same_view(view, expected)
        for layer, segment in view.items():
            shown = torch.as_tensor(segment.distance).expand(segment.tokens)
            assert torch.equal(shown, torch.as_tensor(expected[layer].distance))
        stats = self.store.stats(session)
        assert stats.bytes == TOKEN * sum(sum(own.counts.values()) for own in held)

    @rule(
        session=sessions,
        counts=st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 4), min_size=1),
        seed=st.integers(0, 1000),
        born=st.integers(0, 20),
        distance=st.integers(0, 1),
        ttl_steps=st.none() | st.integers(1, 4),
        ttl_seconds=st.none() | st.sampled_from([1.0, 3.0]),
        pinned=st.sampled_from([False, False, False, True]),
    )
    def write(
        self,
        session: str,
        counts: dict[int, int],
        seed: int,
        born: int,
        distance: int,
        ttl_steps: int | None,
        ttl_seconds: float | None,
        pinned: bool,
    ) -> None:
        expires_at = None if ttl_seconds is None else self.clock.now + ttl_seconds
        new = Known(SegmentId(0), counts, seed, born, distance, ttl_steps, expires_at, pinned)
        after = _after_write(self.model[session], new)

        def do() -> SegmentId:
            return self.store.write(
                session,
                make_layers(counts, seed),
                born=born,
                kind="plan",
                distance=distance,
                ttl_steps=ttl_steps,
                ttl_seconds=ttl_seconds,
                pinned=pinned,
            )

        if after is None:
            with pytest.raises(StoreFull):
                do()
        else:
            new.id = do()
            assert all(new.id > own.id for own in after[:-1])
            self.model[session] = after
        self.compare(session)

    @rule(session=sessions, steps=st.integers(1, 3))
    def tick(self, session: str, steps: int) -> None:
        self.store.tick(session, steps)
        for own in self.model[session]:
            if own.steps_left is not None:
                own.steps_left -= steps
        self.expire()
        self.compare(session)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now += seconds
        self.expire()

    @rule(session=sessions, place=places, pinned=st.booleans())
    def pin_or_unpin(self, session: str, place: int, pinned: bool) -> None:
        change = self.store.pin if pinned else self.store.unpin
        if place >= len(self.model[session]):
            with pytest.raises(UnknownSegment):
                change(session, SegmentId(1 << 50))
        else:
            own = self.model[session][place]
            change(session, own.id)
            own.pinned = pinned
            self.expire()
        self.compare(session)

    @rule(session=sessions, place=places)
    def drop(self, session: str, place: int) -> None:
        if place < len(self.model[session]):
            assert self.store.drop(session, self.model[session].pop(place).id)
        else:
            assert not self.store.drop(session, SegmentId(1 << 50))

    @rule(session=sessions)
    def clear(self, session: str) -> None:
        self.store.clear(session)
        self.model[session] = []

    @rule(session=sessions, position=st.integers(0, 20))
    def settle(self, session: str, position: int) -> None:
        self.store.settle(session, position)
        for own in self.model[session]:
            own.born = min(own.born, position)

    @rule(session=sessions)
    def spill(self, session: str) -> None:
        if self.store.spill(session):
            assert self.parking is not None or self.persistent

    @rule(session=sessions)
    def look(self, session: str) -> None:
        self.compare(session)

    @rule(session=sessions)
    def hold(self, session: str) -> None:
        self.held.append((dict(self.store.view(session)), _expected(self.model[session])))

    @rule(session=sessions, target=snapshots)
    def snapshot(self, session: str) -> object:
        return self.store.snapshot(session), copy.deepcopy(self.model[session])

    @rule(session=sessions, taken=snapshots)
    def restore(self, session: str, taken: tuple[bytes, list[Known]]) -> None:
        blob, held = taken
        self.store.restore(session, blob, source="test")
        self.model[session] = copy.deepcopy(held)
        self.expire()
        self.compare(session)

    @rule(session=sessions)
    def flush(self, session: str) -> None:
        self.store.flush(session)

    @rule()
    def kill(self) -> None:
        """What was flushed or spilled to disk is there again; the rest is as it was on disk."""
        if not self.persistent:
            return
        flushed = {}
        for name in "ab":
            self.store.flush(name)
            flushed[name] = copy.deepcopy(self.model[name])
        self.model = copy.deepcopy(self.on_disk)
        self.open()
        self.expire()
        for name in "abc":
            self.compare(name)
        assert {name: self.model[name] for name in flushed} == flushed

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_invariants()
        totals = self.store.totals()
        assert totals.resident_bytes <= self.limits.spill_bytes
        assert totals.parked_bytes <= self.limits.parked_bytes
        assert totals.forgotten == totals.failed_saves == 0
        for view, expected in self.held:
            assert same_view(view, expected)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreMachine = StoreMachine.TestCase
