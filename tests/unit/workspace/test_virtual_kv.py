"""The store of virtual tokens: views that hold, limits, pins, times to live, pressure, persistence, threads."""

from __future__ import annotations

import logging
import threading
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from tests.support.virtual_tokens import HEADS, LAYERS, SIZE, FakeClock, Shelf, make_layers, make_shape, same_view
from workspace.context import Segment
from workspace.errors import InvalidSegment, InvalidSnapshot, StoreFull, UnknownSegment
from workspace.virtual_kv import VirtualKVStore
from workspace.virtual_kv_limits import SegmentId, StoreLimits, StoreShape

TOKEN = make_shape().token_bytes


def _store(**settings: Any) -> VirtualKVStore:
    options = {name: settings.pop(name) for name in ("load", "save", "clock", "parking") if name in settings}
    return VirtualKVStore(make_shape(), StoreLimits(**settings), **options)


def _write(store: VirtualKVStore, session: str, counts: dict[int, int], seed: int = 0, **extra: Any) -> SegmentId:
    fields: dict[str, Any] = {"born": 0, "kind": "plan", **extra}
    number = store.write(session, make_layers(counts, seed), **fields)
    store.check_invariants()
    return number


def _clone(view: Any) -> dict[int, Segment]:
    return {
        layer: Segment(own.keys.clone(), own.values.clone(), own.bias.clone(), own.birth.clone())
        for layer, own in view.items()
    }


# Views.


def test_a_view_concatenates_the_segments_of_each_layer_in_order() -> None:
    store = _store()
    first, second = make_layers({1: 2, 5: 1}, seed=1), make_layers({1: 3, 3: 1}, seed=2)
    store.write("s", first, born=4, kind="plan")
    store.write("s", second, born=9, kind="plan", distance=7)
    view = store.view("s")
    assert list(view) == [1, 3, 5]
    for part, index in (("keys", 0), ("values", 1), ("bias", 2)):
        assert torch.equal(getattr(view[1], part), torch.cat([first[1][index], second[1][index]], dim=2))
        assert torch.equal(getattr(view[5], part), first[5][index])
    assert view[1].birth.tolist() == [[4, 4, 9, 9, 9]]
    assert view[1].distance.tolist() == [0, 0, 7, 7, 7]  # type: ignore[union-attr]
    assert (view[3].distance, view[5].distance) == (7, 0)
    store.check_invariants()


def test_an_unchanged_session_gives_the_very_same_view() -> None:
    store = _store()
    _write(store, "s", {1: 2})
    view = store.view("s")
    store.tick("s", 100)
    assert store.view("s") is view
    assert store.view("somebody else") == {}
    assert store.sessions() == ["s"]


def test_layers_that_a_write_does_not_touch_keep_their_segments() -> None:
    store = _store()
    _write(store, "s", {1: 2, 3: 2})
    before = store.view("s")
    _write(store, "s", {3: 1})
    assert store.view("s")[1] is before[1]
    assert store.view("s")[3] is not before[3]


@pytest.mark.parametrize("change", ["write", "evict", "drop", "clear", "expire", "settle", "spill", "restore"])
def test_a_view_that_is_held_never_changes(change: str) -> None:
    store = _store(max_tokens_per_layer=4, parking=torch.device("cpu"))
    empty = store.snapshot("s")
    first = _write(store, "s", {1: 2, 3: 1}, seed=1, born=5, ttl_steps=3)
    _write(store, "s", {1: 1}, seed=2, born=6)
    held = store.view("s")
    copy = _clone(held)
    changes = {
        "write": lambda: _write(store, "s", {1: 1}, seed=3),
        "evict": lambda: _write(store, "s", {1: 3}, seed=3),
        "drop": lambda: store.drop("s", first),
        "clear": lambda: store.clear("s"),
        "expire": lambda: store.tick("s", 3),
        "settle": lambda: store.settle("s"),
        "spill": lambda: store.spill("s"),
        "restore": lambda: store.restore("s", empty, source="test"),
    }
    changes[change]()
    store.check_invariants()
    assert same_view(held, copy)
    assert same_view(store.view("s"), copy) == (change == "spill")
    with pytest.raises(TypeError):
        held[1] = copy[1]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        held[1].keys = copy[1].keys  # type: ignore[misc]


def test_writing_into_a_view_is_found_by_the_invariants() -> None:
    store = _store()
    _write(store, "s", {1: 2})
    store.view("s")[1].keys.zero_()
    with pytest.raises(AssertionError, match="somebody wrote"):
        store.check_invariants()


def test_what_is_written_is_copied_and_detached() -> None:
    store = _store()
    layers = make_layers({1: 2})
    keys = layers[1][0].requires_grad_()
    store.write("s", layers, born=0, kind="plan")
    stored = store.view("s")[1].keys
    assert not stored.requires_grad
    expected = stored.clone()
    with torch.no_grad():
        keys.zero_()
    assert torch.equal(store.view("s")[1].keys, expected)
    store.check_invariants()


def test_what_inference_wrote_can_be_trained_with() -> None:
    store = _store()
    with torch.inference_mode():
        _write(store, "s", {1: 2})
        store.settle("s")
        keys = store.view("s")[1].keys
    weight = torch.ones(SIZE, requires_grad=True)
    (keys * weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, keys.sum(dim=(0, 1, 2)))


def test_one_bias_for_all_heads_is_spread() -> None:
    store = _store()
    keys, values, _ = make_layers({1: 3})[1]
    store.write("s", {1: (keys, values, torch.tensor([[[-16.0, -8.0, 0.0]]]))}, born=0, kind="plan")
    assert store.view("s")[1].bias.tolist() == [[[-16.0, -8.0, 0.0]] * HEADS]
    store.check_invariants()


def test_keys_take_the_dtype_of_the_store_and_biases_stay_float32() -> None:
    store = VirtualKVStore(make_shape(torch.bfloat16))
    store.write("s", make_layers({1: 2}), born=0, kind="plan")
    segment = store.view("s")[1]
    assert (segment.keys.dtype, segment.values.dtype, segment.bias.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
    store.check_invariants()


def test_after_a_request_its_segments_are_visible_from_the_first_position() -> None:
    store = _store()
    _write(store, "s", {1: 2}, born=900)
    _write(store, "s", {1: 1}, born=3)
    store.settle("s", 10)
    assert store.view("s")[1].birth.tolist() == [[10, 10, 3]]
    view = store.view("s")
    store.settle("s", 10)
    assert store.view("s") is view
    store.settle("s")
    assert store.view("s")[1].birth.tolist() == [[0, 0, 0]]
    assert [info.born for info in store.segments("s")] == [0, 0]
    store.check_invariants()


# What a write must look like.


def _with(layer: int, **replaced: torch.Tensor) -> dict[int, Any]:
    keys, values, bias = make_layers({1: 2})[1]
    return {layer: (replaced.get("keys", keys), replaced.get("values", values), replaced.get("bias", bias))}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({}, "at least one layer"),
        (_with(2), r"layer 2 is not hooked; hooked are \[1, 3, 5\]"),
        (_with(1, keys=torch.zeros(1, HEADS, 3, SIZE)), "must both be"),
        (_with(1, keys=torch.zeros(HEADS, 2, SIZE)), "must both be"),
        (_with(1, keys=torch.zeros(1, HEADS, 0, SIZE), values=torch.zeros(1, HEADS, 0, SIZE)), "at least one token"),
        (_with(1, keys=torch.zeros(2, HEADS, 2, SIZE), values=torch.zeros(2, HEADS, 2, SIZE)), "must both be"),
        (_with(1, bias=torch.zeros(1, HEADS, 3)), r"bias must be \[1, 2 or 1, 2\]"),
        (_with(1, keys=torch.full((1, HEADS, 2, SIZE), float("nan"))), "layer 1: keys hold NaN"),
        (_with(1, values=torch.full((1, HEADS, 2, SIZE), float("inf"))), "layer 1: values hold NaN or infinity"),
        (_with(1, bias=torch.full((1, 1, 2), float("-inf"))), "layer 1: bias hold NaN or infinity"),
    ],
)
def test_wrong_tensors_are_refused_and_nothing_is_kept(layers: dict[int, Any], words: str) -> None:
    store = _store()
    with pytest.raises(InvalidSegment, match=words):
        store.write("s", layers, born=0, kind="plan")
    store.check_invariants()
    assert store.sessions() == []


def test_a_value_that_overflows_in_the_dtype_of_the_store_is_refused() -> None:
    store = VirtualKVStore(make_shape(torch.float16))
    with pytest.raises(InvalidSegment, match=r"values hold NaN or infinity in torch\.float16"):
        store.write("s", _with(1, values=torch.full((1, HEADS, 2, SIZE), 1e6)), born=0, kind="plan")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": ""}, "kind"),
        ({"kind": "x" * 65}, "kind"),
        ({"kind": "\ud800"}, "Unicode"),
        ({"born": -1}, "born"),
        ({"born": 1.5}, "born"),
        ({"distance": -1}, "distance"),
        ({"ttl_steps": 0}, "ttl_steps"),
        ({"ttl_seconds": float("nan")}, "ttl_seconds"),
        ({"ttl_seconds": float("inf")}, "ttl_seconds"),
        ({"meta": {"x": float("nan")}}, "meta must be JSON"),
        ({"meta": {"x": object()}}, "meta must be JSON"),
        ({"meta": {"x": "\ud800"}}, "meta must be JSON"),
        ({"meta": {"x": "y" * 5000}}, "at most 4096 bytes"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    store = _store()
    with pytest.raises(InvalidSegment, match=words):
        _write(store, "s", {1: 1}, **fields)
    assert store.sessions() == []


@pytest.mark.parametrize("name", ["", "x" * 257, "a\0b", "\ud800"])
def test_names_that_persistence_cannot_keep_are_refused(name: str) -> None:
    store = _store()
    for use in (store.view, store.clear, store.flush, store.spill, store.snapshot, store.tick, store.stats):
        with pytest.raises(InvalidSegment, match="session's name"):
            use(name)


def test_what_is_noted_of_a_segment_is_a_copy() -> None:
    store = _store()
    meta = {"entropy": [1.5], "why": "Φ"}
    _write(store, "s", {1: 1, 3: 2}, meta=meta, kind="memory", born=3)
    meta["entropy"].append(2.5)  # type: ignore[attr-defined]
    info = store.segments("s")[0]
    assert info.meta == {"entropy": [1.5], "why": "Φ"}
    assert (info.kind, info.tokens, info.total_tokens, info.born) == ("memory", {1: 1, 3: 2}, 3, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens_per_layer": 0},
        {"max_segments": -1},
        {"max_bytes": float("nan")},
        {"ttl_steps": 0},
        {"ttl_seconds": -1.0},
        {"ttl_seconds": float("inf")},
        {"spill_bytes": 100, "max_bytes": 101},
    ],
)
def test_limits_that_exist_are_valid(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        StoreLimits(**settings)


@pytest.mark.parametrize(
    "wrong", [{"layers": ()}, {"layers": (3, 1)}, {"kv_heads": 0}, {"head_dim": 0}, {"dtype": torch.int64}]
)
def test_a_shape_that_exists_is_valid(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"fingerprint": "m", "layers": LAYERS, "kv_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StoreShape(**{**fields, "dtype": torch.float32, "device": torch.device("cpu"), **wrong})


def test_half_a_persistence_is_refused() -> None:
    with pytest.raises(ValueError, match="both load and save"):
        _store(load=Shelf().load)


# Limits and pins.


def test_the_oldest_go_first_and_only_where_they_help() -> None:
    store = _store(max_tokens_per_layer=4)
    elsewhere = _write(store, "s", {3: 4})
    oldest, newer = _write(store, "s", {1: 2}), _write(store, "s", {1: 2})
    added = _write(store, "s", {1: 1})
    assert [info.id for info in store.segments("s")] == [elsewhere, newer, added]
    assert oldest not in {info.id for info in store.segments("s")}
    assert store.totals().evicted == 1


def test_the_number_of_segments_is_limited() -> None:
    store = _store(max_segments=2)
    ids = [_write(store, "s", {layer: 1}) for layer in LAYERS]
    assert [info.id for info in store.segments("s")] == ids[1:]


def test_the_bytes_of_a_session_are_limited() -> None:
    store = _store(max_bytes=5 * TOKEN, spill_bytes=100 * TOKEN)
    _write(store, "s", {1: 1})
    kept = _write(store, "s", {1: 2, 3: 1})
    added = _write(store, "s", {5: 2})
    assert [info.id for info in store.segments("s")] == [kept, added]
    assert store.stats("s").bytes == store.totals().resident_bytes == 5 * TOKEN
    assert _write(store, "t", {1: 5})  # limits are a session's own


def test_limits_never_evict_a_pin_and_refuse_what_does_not_fit_beside_it() -> None:
    store = _store(max_tokens_per_layer=4)
    pinned = _write(store, "s", {1: 3}, pinned=True)
    loose = _write(store, "s", {1: 1})
    view = store.view("s")
    with pytest.raises(StoreFull, match=r"all but the 1 pinned .* layer 1 would hold 5 tokens .*unpin or drop"):
        store.write("s", make_layers({1: 2}), born=0, kind="plan")
    store.check_invariants()
    assert store.view("s") is view
    assert [info.id for info in store.segments("s")] == [pinned, loose]
    assert _write(store, "s", {1: 1})
    assert pinned in {info.id for info in store.segments("s")}
    assert store.totals().refused == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens_per_layer": 1}, "even alone: layer 1 would hold 2 tokens"),
        (
            {"max_bytes": TOKEN, "spill_bytes": TOKEN},
            rf"even alone: the session would hold {2 * TOKEN} bytes \(max_bytes {TOKEN}\)",
        ),
    ],
)
def test_a_segment_larger_than_the_limits_is_refused(settings: dict[str, int], words: str) -> None:
    store = _store(**settings)
    with pytest.raises(StoreFull, match=words):
        store.write("s", make_layers({1: 2}), born=0, kind="plan")
    assert store.sessions() == []
    store.check_invariants()


def test_pins_alone_can_fill_the_number_of_segments() -> None:
    store = _store(max_segments=1)
    _write(store, "s", {1: 1}, pinned=True)
    with pytest.raises(StoreFull, match=r"2 segments \(max_segments 1\)"):
        store.write("s", make_layers({3: 1}), born=0, kind="plan")


def test_a_pin_holds_against_time_until_it_is_taken_off() -> None:
    store = _store()
    number = _write(store, "s", {1: 1}, ttl_steps=2)
    store.pin("s", number)
    store.tick("s", 5)
    assert store.view("s")[1].tokens == 1
    store.check_invariants()
    store.unpin("s", number)
    store.check_invariants()
    assert store.sessions() == []
    assert store.view("s") == {}


def test_a_pin_holds_against_time_also_when_others_go() -> None:
    store = _store()
    number = _write(store, "s", {1: 1}, ttl_steps=2, pinned=True)
    _write(store, "s", {1: 2}, ttl_steps=2)
    store.tick("s", 2)
    store.check_invariants()
    assert [info.id for info in store.segments("s")] == [number]


def test_pinning_twice_changes_nothing() -> None:
    shelf = Shelf()
    store = _store(load=shelf.load, save=shelf.save)
    number = _write(store, "s", {1: 1}, pinned=True)
    store.flush("s")
    store.pin("s", number)
    store.flush("s")
    assert shelf.saves == ["s"]


def test_unknown_segments() -> None:
    store = _store()
    number = _write(store, "s", {1: 1})
    for use in (store.pin, store.unpin):
        with pytest.raises(UnknownSegment, match="no segment 99"):
            use("s", SegmentId(99))
        with pytest.raises(UnknownSegment):
            use("nobody", number)
    assert not store.drop("s", SegmentId(99))
    assert not store.drop("nobody", number)
    assert store.drop("s", number)
    assert not store.drop("s", number)
    store.check_invariants()
    assert store.sessions() == []


def test_ids_are_never_used_again() -> None:
    store = _store()
    ids = []
    for session in ("a", "b", "a"):
        ids.append(_write(store, session, {1: 1}))
        store.clear(session)
    assert ids == sorted(set(ids))


# Time.


def test_steps_pass_by_ticks_of_the_own_session() -> None:
    store = _store()
    _write(store, "s", {1: 1}, ttl_steps=3)
    store.tick("s", 2)
    _write(store, "s", {1: 2}, ttl_steps=3)
    _write(store, "t", {1: 1}, ttl_steps=1)
    store.tick("s")
    assert store.view("s")[1].tokens == 2
    store.tick("s", 2)
    assert store.view("s") == {}
    assert store.view("t")[1].tokens == 1
    assert store.totals().expired == 2
    store.tick("nobody")
    with pytest.raises(ValueError, match="steps"):
        store.tick("t", 0)
    store.check_invariants()


def test_seconds_pass_by_the_clock_also_without_ticks() -> None:
    clock = FakeClock()
    store = _store(clock=clock, ttl_seconds=10.0)
    _write(store, "s", {1: 1})
    _write(store, "s", {1: 2}, ttl_seconds=20.0)
    clock.now += 9.9
    assert store.view("s")[1].tokens == 3
    clock.now += 0.1
    assert store.view("s")[1].tokens == 2
    clock.now += 10
    assert store.view("s") == {}
    store.check_invariants()


def test_the_default_of_the_limits_in_steps() -> None:
    store = _store(ttl_steps=2)
    _write(store, "s", {1: 1})
    _write(store, "s", {1: 2}, ttl_steps=5)
    store.tick("s", 2)
    assert store.view("s")[1].tokens == 2


def test_the_expired_make_room_before_anything_else() -> None:
    clock = FakeClock()
    store = _store(clock=clock, max_segments=2)
    old = _write(store, "s", {1: 1})
    _write(store, "s", {1: 1}, ttl_seconds=1.0)
    clock.now += 1
    added = _write(store, "s", {1: 1})
    assert [info.id for info in store.segments("s")] == [old, added]
    assert (store.totals().expired, store.totals().evicted) == (1, 0)


# Numbers.


def test_statistics_count_tokens_bytes_and_norms() -> None:
    store = _store()
    _write(store, "s", {1: 2, 3: 1}, seed=1)
    _write(store, "s", {1: 1}, seed=2, pinned=True)
    store.tick("s", 4)
    stats, view = store.stats("s"), store.view("s")
    assert (stats.segments, stats.pinned, stats.step, stats.bytes) == (2, 1, 4, 4 * TOKEN)
    assert {layer: own.tokens for layer, own in stats.layers.items()} == {1: 3, 3: 1}
    assert stats.layers[1].bytes == 3 * TOKEN
    assert stats.layers[1].key_norm == pytest.approx(float(view[1].keys.square().sum(-1).sqrt().mean()))
    assert stats.layers[1].value_norm == pytest.approx(float(view[1].values.square().sum(-1).sqrt().mean()))
    totals = store.totals()
    assert (totals.sessions, totals.segments, totals.tokens, totals.resident_bytes) == (1, 2, 4, 4 * TOKEN)
    assert (totals.writes, totals.parked_bytes, totals.spilled) == (2, 0, 0)
    nothing = store.stats("nobody")
    assert (nothing.segments, nothing.bytes, nothing.layers) == (0, 0, {})
    assert store.sessions() == ["s"]


# Pressure.


def test_least_recently_used_sessions_are_parked_and_come_back_bit_for_bit() -> None:
    limits = {"max_bytes": 4 * TOKEN, "spill_bytes": 8 * TOKEN, "parked_bytes": 100 * TOKEN}
    store = _store(**limits, parking=torch.device("cpu"))
    for index, name in enumerate("abc"):
        _write(store, name, {1: 2, 3: 1}, seed=index)
        store.check_invariants()
    before = {name: store.snapshot(name) for name in "abc"}
    store.view("c")
    totals = store.totals()
    assert (totals.resident_bytes, totals.parked_bytes, totals.parked_sessions) == (6 * TOKEN, 3 * TOKEN, 1)
    view = store.view("a")  # back, and "b" leaves
    assert torch.equal(view[1].keys, make_layers({1: 2, 3: 1}, seed=0)[1][0])
    assert store.totals().resident_bytes <= 8 * TOKEN
    assert store.totals().brought_back == 1
    assert {name: store.snapshot(name) for name in "abc"} == before
    store.check_invariants()


def test_a_parked_session_can_be_changed_without_coming_back() -> None:
    clock = FakeClock()
    store = _store(parking=torch.device("cpu"), clock=clock)
    first = _write(store, "s", {1: 2}, seed=1)
    _write(store, "s", {1: 1}, seed=2, ttl_steps=3, born=9)
    _write(store, "s", {1: 1}, seed=3, born=9)
    assert store.spill("s")
    assert not store.spill("s")
    store.tick("s", 3)
    store.settle("s", 4)
    store.drop("s", first)
    store.check_invariants()
    assert store.totals().parked_sessions == 1
    assert torch.equal(store.view("s")[1].keys, make_layers({1: 1}, seed=3)[1][0])
    assert store.view("s")[1].birth.tolist() == [[4]]
    assert store.totals().parked_sessions == 0


def test_a_write_to_a_parked_session_brings_it_back() -> None:
    store = _store(parking=torch.device("cpu"))
    _write(store, "s", {1: 2}, seed=1)
    store.spill("s")
    _write(store, "s", {1: 1}, seed=2)
    assert store.totals().parked_sessions == 0
    expected = torch.cat([make_layers({1: 2}, 1)[1][0], make_layers({1: 1}, 2)[1][0]], dim=2)
    assert torch.equal(store.view("s")[1].keys, expected)


def test_a_refused_write_to_a_parked_session_leaves_the_budget_kept() -> None:
    limits = {"max_bytes": 4 * TOKEN, "spill_bytes": 4 * TOKEN, "max_tokens_per_layer": 3}
    store = _store(**limits, parking=torch.device("cpu"))
    _write(store, "a", {1: 3}, pinned=True)
    _write(store, "b", {1: 3})
    with pytest.raises(StoreFull):
        store.write("a", make_layers({1: 1}), born=0, kind="plan")
    assert store.totals().resident_bytes == 3 * TOKEN
    store.check_invariants()


def test_on_a_cpu_sessions_leave_for_persistence_and_come_back_bit_for_bit() -> None:
    shelf = Shelf()
    store = _store(max_bytes=3 * TOKEN, spill_bytes=6 * TOKEN, load=shelf.load, save=shelf.save)
    for index, name in enumerate("abc"):
        _write(store, name, {1: 2, 3: 1}, seed=index)
    assert store.sessions() == ["b", "c"]
    assert shelf.saves == ["a"]
    assert torch.equal(store.view("a")[1].keys, make_layers({1: 2, 3: 1}, seed=0)[1][0])
    assert store.sessions() == ["c", "a"]
    assert store.snapshot("a") == shelf.blobs["a"]
    store.check_invariants()


def test_beyond_the_parking_sessions_leave_for_persistence() -> None:
    shelf = Shelf()
    limits = {"max_bytes": 2 * TOKEN, "spill_bytes": 2 * TOKEN, "parked_bytes": 4 * TOKEN}
    store = _store(**limits, parking=torch.device("cpu"), load=shelf.load, save=shelf.save)
    for index, name in enumerate("abcde"):
        _write(store, name, {1: 2}, seed=index)
    assert store.sessions() == ["c", "d", "e"]
    assert set(shelf.blobs) == {"a", "b"}
    totals = store.totals()
    assert (totals.resident_bytes, totals.parked_bytes) == (2 * TOKEN, 4 * TOKEN)
    for index, name in enumerate("abcde"):
        assert torch.equal(store.view(name)[1].values, make_layers({1: 2}, seed=index)[1][1])
        store.check_invariants()


def test_a_session_that_is_looked_at_stays_and_another_leaves() -> None:
    shelf = Shelf()
    store = _store(max_bytes=2 * TOKEN, spill_bytes=4 * TOKEN, load=shelf.load, save=shelf.save)
    for name in "ab":
        _write(store, name, {1: 2})
    store.view("a")
    _write(store, "c", {1: 2})
    assert store.sessions() == ["a", "c"]


def test_what_is_spilled_by_hand_keeps_the_parking_within_its_budget() -> None:
    shelf = Shelf()
    limits = {"max_bytes": 2 * TOKEN, "spill_bytes": 8 * TOKEN, "parked_bytes": TOKEN}
    store = _store(**limits, parking=torch.device("cpu"), load=shelf.load, save=shelf.save)
    for name in ("older", "newer"):
        _write(store, name, {1: 2})
    assert store.spill("newer")
    assert store.sessions() == ["older"]  # which is not parked, so it was not its turn
    assert store.totals().parked_bytes == 0
    store.check_invariants()


def test_what_was_flushed_is_spilled_without_saving_again() -> None:
    shelf = Shelf()
    store = _store(max_bytes=2 * TOKEN, spill_bytes=2 * TOKEN, load=shelf.load, save=shelf.save)
    _write(store, "a", {1: 2})
    store.flush("a")
    _write(store, "b", {1: 2})
    assert store.sessions() == ["b"]
    assert shelf.saves == ["a"]


def test_without_persistence_sessions_are_forgotten_but_never_their_pins(caplog: pytest.LogCaptureFixture) -> None:
    store = _store(max_bytes=2 * TOKEN, spill_bytes=4 * TOKEN)
    _write(store, "pinned", {1: 2}, pinned=True)
    _write(store, "loose", {1: 2})
    assert not store.spill("loose")
    with caplog.at_level(logging.WARNING, logger="workspace.virtual_kv_residency"):
        _write(store, "new", {1: 2})
    assert "session loose was forgotten" in caplog.text
    assert store.sessions() == ["pinned", "new"]
    assert store.totals().forgotten == 1


def test_the_expired_of_other_sessions_go_before_any_session_is_spilled() -> None:
    clock = FakeClock()
    store = _store(max_bytes=2 * TOKEN, spill_bytes=4 * TOKEN, clock=clock)
    _write(store, "old", {1: 2})
    _write(store, "short", {1: 2}, ttl_seconds=1.0)
    clock.now += 1
    _write(store, "new", {1: 2})
    assert store.sessions() == ["old", "new"]
    assert store.totals().forgotten == 0


def test_a_failing_save_neither_loses_a_session_nor_fails_the_one_in_use(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf()
    full = True

    def save(session: str, blob: bytes | None) -> None:
        if full:
            raise OSError("no space left on device")
        shelf.save(session, blob)

    store = _store(max_bytes=2 * TOKEN, spill_bytes=2 * TOKEN, load=shelf.load, save=save)
    _write(store, "a", {1: 2}, seed=1)
    _write(store, "b", {1: 2}, seed=2)
    assert "session a could not be saved" in caplog.text
    assert store.sessions() == ["a", "b"]
    assert store.totals().failed_saves == 1
    with pytest.raises(OSError, match="no space"):
        store.flush("a")
    with pytest.raises(OSError, match="no space"):
        store.flush_all()
    full = False
    store.flush_all()
    store.check_invariants()
    again = _store(load=shelf.load, save=shelf.save)
    assert torch.equal(again.view("a")[1].keys, make_layers({1: 2}, seed=1)[1][0])
    assert torch.equal(again.view("b")[1].keys, make_layers({1: 2}, seed=2)[1][0])


# Persistence.


def test_what_was_flushed_is_there_in_the_next_process() -> None:
    shelf, clock = Shelf(), FakeClock()
    store = _store(load=shelf.load, save=shelf.save, clock=clock)
    _write(store, "s", {1: 2, 3: 1}, seed=1, born=7, kind="memory", meta={"why": 1}, ttl_steps=5, ttl_seconds=60.0)
    last = _write(store, "s", {1: 1}, seed=2, pinned=True)
    store.tick("s", 3)
    store.flush("s")
    _write(store, "s", {5: 1})  # never flushed, so it may be lost
    again = _store(load=shelf.load, save=shelf.save, clock=clock)
    assert [info.id for info in again.segments("s")] == [last - 1, last]
    assert again.segments("s") == store.segments("s")[:2]
    assert same_view(again.view("s"), {layer: store.view("s")[layer] for layer in (1, 3)})
    assert _write(again, "s", {1: 1}) > last
    again.tick("s", 2)
    assert again.segments("s")[0].id == last
    clock.now += 60
    again.check_invariants()


def test_time_goes_on_while_the_process_is_down() -> None:
    shelf, clock = Shelf(), FakeClock()
    store = _store(load=shelf.load, save=shelf.save, clock=clock)
    _write(store, "s", {1: 2}, ttl_seconds=10.0)
    store.flush("s")
    clock.now += 10
    again = _store(load=shelf.load, save=shelf.save, clock=clock)
    assert again.view("s") == {}
    again.flush("s")
    assert shelf.blobs == {}


def test_a_flush_saves_only_what_is_new() -> None:
    shelf = Shelf()
    store = _store(load=shelf.load, save=shelf.save)
    store.flush("s")
    _write(store, "s", {1: 1})
    store.flush("s")
    store.flush("s")
    store.tick("s", 50)  # nothing counts steps
    store.flush("s")
    assert shelf.saves == ["s"]
    _write(store, "s", {1: 1}, ttl_steps=100)
    store.flush("s")
    store.tick("s")
    store.flush("s")
    assert shelf.saves == ["s", "s", "s"]
    again = _store(load=shelf.load, save=shelf.save)
    assert again.view("s")
    again.flush("s")
    assert shelf.saves == ["s", "s", "s"]


def test_a_session_with_nothing_stored_is_asked_for_once() -> None:
    shelf = Shelf()
    store = _store(load=shelf.load, save=shelf.save)
    for _ in range(3):
        assert store.view("s") == {}
        store.tick("s")
    _write(store, "s", {1: 1})
    store.clear("s")
    store.flush("s")
    assert store.view("s") == {}
    assert (shelf.loads, shelf.saves) == (["s"], [])
    store.check_invariants()


def test_clearing_reaches_persistence_without_reading_it() -> None:
    shelf = Shelf()
    shelf.blobs["s"] = b"damaged"
    store = _store(load=shelf.load, save=shelf.save)
    store.clear("s")
    store.check_invariants()
    assert store.view("s") == {}
    store.flush("s")
    assert (shelf.blobs, shelf.loads) == ({}, [])
    store.check_invariants()


def test_a_damaged_stored_session_is_an_error_that_names_it_and_loses_nothing() -> None:
    shelf = Shelf()
    shelf.blobs["s"] = b"damaged"
    store = _store(load=shelf.load, save=shelf.save)
    for use in (store.view, store.snapshot, store.tick):
        with pytest.raises(InvalidSnapshot, match="the stored virtual tokens of session 's'"):
            use("s")
    store.flush_all()
    store.check_invariants()
    assert shelf.blobs == {"s": b"damaged"}


def test_a_change_during_a_save_is_saved_next_time() -> None:
    shelf = Shelf()

    def save(session: str, blob: bytes | None) -> None:
        if not shelf.saves:
            store.write("s", make_layers({1: 1}, seed=2), born=0, kind="plan")
        shelf.save(session, blob)

    store = _store(load=shelf.load, save=save)
    _write(store, "s", {1: 1}, seed=1)
    store.flush("s")
    assert shelf.blobs["s"] != store.snapshot("s")
    store.flush("s")
    assert shelf.blobs["s"] == store.snapshot("s")


def test_a_session_cleared_during_its_save_stays_cleared() -> None:
    shelf = Shelf()

    def save(session: str, blob: bytes | None) -> None:
        if not shelf.saves:
            store.clear("s")
        shelf.save(session, blob)

    store = _store(load=shelf.load, save=save)
    _write(store, "s", {1: 1}, seed=1)
    store.flush("s")
    assert store.view("s") == {}
    store.flush("s")
    assert shelf.blobs == {}
    store.check_invariants()
    assert store.view("s") == {}


def test_a_session_changed_while_it_is_spilled_stays() -> None:
    shelf = Shelf()

    def save(session: str, blob: bytes | None) -> None:
        shelf.save(session, blob)
        store.drop("s", first)

    store = _store(load=shelf.load, save=save)
    first = _write(store, "s", {1: 2}, seed=1)
    second = _write(store, "s", {1: 1}, seed=2)
    assert not store.spill("s")
    assert [info.id for info in store.segments("s")] == [second]
    assert store.spill("s")
    assert store.sessions() == []
    assert [info.id for info in store.segments("s")] == [second]


def test_a_session_cleared_while_it_is_read_stays_cleared() -> None:
    shelf = Shelf()
    other = _store(load=shelf.load, save=shelf.save)
    _write(other, "s", {1: 2})
    other.flush("s")

    def load(session: str) -> bytes | None:
        store.clear(session)
        return shelf.load(session)

    store = _store(load=load, save=shelf.save)
    assert store.view("s") == {}
    store.check_invariants()
    store.flush("s")
    assert shelf.blobs == {}


def test_lowered_limits_trim_what_was_stored_except_pins() -> None:
    shelf = Shelf()
    store = _store(load=shelf.load, save=shelf.save)
    pinned = [_write(store, "s", {1: 2}, pinned=True), _write(store, "s", {1: 2}, pinned=True)]
    _write(store, "s", {1: 2})
    elsewhere = _write(store, "s", {3: 1})
    store.flush("s")
    tight = _store(load=shelf.load, save=shelf.save, max_tokens_per_layer=3)
    assert [info.id for info in tight.segments("s")] == [*pinned, elsewhere]
    tight.check_invariants()
    tight.unpin("s", pinned[0])
    assert [info.id for info in tight.segments("s")] == [pinned[1], elsewhere]
    tight.check_invariants()


# Threads.


def test_threads_write_view_tick_flush_and_spill_side_by_side() -> None:
    shelf = Shelf()
    limits = {"max_tokens_per_layer": 6, "max_bytes": 18 * TOKEN, "spill_bytes": 30 * TOKEN, "parked_bytes": 12 * TOKEN}
    store = _store(**limits, parking=torch.device("cpu"), load=shelf.load, save=shelf.save)
    errors: list[BaseException] = []
    rounds, names = 120, ["a", "b", "c", "d"]

    def work(index: int) -> None:
        try:
            for number in range(rounds):
                session = names[(index + number) % len(names)]
                seed = index * rounds + number
                store.write(session, make_layers({1: 2, 3: 1}, seed), born=seed, kind="plan", ttl_steps=9)
                view = store.view(session)
                layer = view.get(1)
                if layer is not None:  # births and keys belong together, whoever writes meanwhile
                    assert layer.tokens == layer.birth.shape[1] <= 6
                    birth = int(layer.birth[0, -1])
                    assert torch.equal(layer.keys[:, :, -2:], make_layers({1: 2, 3: 1}, birth)[1][0])
                store.tick(session)
                if number % 7 == index:
                    store.flush(session)
                if number % 11 == index:
                    store.spill(session)
                if number % 29 == index:
                    store.restore(session, store.snapshot(session), source="itself")
                if number % 13 == index:
                    store.check_invariants()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    store.check_invariants()
    totals = store.totals()
    assert totals.writes == 4 * rounds
    assert totals.resident_bytes <= 30 * TOKEN
    store.flush_all()
    again = _store(load=shelf.load, save=shelf.save)
    assert {name: again.snapshot(name) for name in names} == {name: store.snapshot(name) for name in names}
