"""Snapshots: equal states, equal bytes; and whatever is wrong with them is refused, naming the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.support.virtual_tokens import LAYERS, FakeClock, make_layers, make_shape, same_view
from workspace.errors import InvalidSnapshot, SnapshotError, SnapshotMismatch, SnapshotVersion, WorkspaceError
from workspace.virtual_kv import VirtualKVStore
from workspace.virtual_kv_limits import StoreLimits, StoreShape

KEY = "olympus.virtual_kv"


def _filled(dtype: torch.dtype = torch.float32) -> VirtualKVStore:
    store = VirtualKVStore(make_shape(dtype), clock=FakeClock())
    store.write("s", make_layers({1: 2, 3: 1}, 1), born=5, kind="plan", ttl_steps=9, meta={"Φ": 1.25})
    store.write("s", make_layers({1: 3}, 2), born=8, kind="memory", pinned=True, ttl_seconds=60, distance=4)
    store.tick("s", 2)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit_and_every_word(dtype: torch.dtype) -> None:
    store = _filled(dtype)
    blob = store.snapshot("s")
    other = VirtualKVStore(make_shape(dtype), clock=FakeClock())
    other.restore("t", blob, source="test")
    other.check_invariants()
    assert same_view(other.view("t"), store.view("s"))
    assert other.segments("t") == store.segments("s")
    assert other.snapshot("t") == blob == store.snapshot("s")
    assert torch.equal(other.view("t")[1].distance, torch.tensor([0, 0, 4, 4, 4]))
    assert other.write("t", make_layers({1: 1}), born=0, kind="plan") > store.segments("s")[-1].id


def test_the_snapshot_of_nothing_restores_nothing() -> None:
    store = _filled()
    store.restore("s", store.snapshot("nobody"), source="test")
    assert store.view("s") == {}
    assert store.sessions() == []
    store.check_invariants()


def test_restoring_applies_limits_and_time() -> None:
    blob = _filled().snapshot("s")
    clock = FakeClock()
    clock.now += 1000
    store = VirtualKVStore(make_shape(), StoreLimits(max_tokens_per_layer=4), clock=clock)
    store.restore("s", blob, source="test")
    assert [info.pinned for info in store.segments("s")] == [True]  # overdue, and held
    store.unpin("s", store.segments("s")[0].id)
    assert store.view("s") == {}
    store.check_invariants()


def _header(blob: bytes) -> dict[str, Any]:
    length = int.from_bytes(blob[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][KEY])
    return header


def _rewritten(blob: bytes, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> bytes:
    header, tensors = _header(blob), load(blob)
    change(header, tensors)
    return save(tensors, metadata={KEY: json.dumps(header)})


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], object]:
    def change(header: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        target: Any = header
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = to

    return change


def _poison(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.values"][0, 0, 0, 0] = float("nan")


def _alter(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.values"][0, 0, 0, 0] += 1


def _replace(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], object]:
    return lambda _, tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_set("version", to=2), SnapshotVersion, "schema version 2, this program reads 1"),
        (_set("version", to=None), SnapshotVersion, "schema version None"),
        (_set("model", to="model-b"), SnapshotMismatch, "fingerprint model-b, here model-a"),
        (_set("dtype", to="bfloat16"), SnapshotMismatch, "dtype bfloat16, here float32"),
        (_set("kv_heads", to=4), SnapshotMismatch, "key-value heads 4, here 2"),
        (_set("head_dim", to=8), SnapshotMismatch, "head size 8, here 4"),
        (_set("segments", 0, "tokens", to={"2": 1}), SnapshotMismatch, r"layers \[2\], but hooked are \[1, 3, 5\]"),
        (_set("segments", 0, "tokens", to={"x": 1}), InvalidSnapshot, "wrong at segments.0.tokens"),
        (_set("segments", 0, "tokens", to={"01": 1}), InvalidSnapshot, "wrong at segments.0.tokens"),
        (_set("segments", 0, "tokens", to={}), InvalidSnapshot, "wrong at segments.0.tokens"),
        (_set("segments", 0, "tokens", to={"1": 0}), InvalidSnapshot, "wrong at segments.0.tokens"),
        (_set("segments", 0, "tokens", to={"1": 7}), InvalidSnapshot, "missing|its segments say"),
        (_set("segments", 0, "born", to=-1), InvalidSnapshot, "wrong at segments.0.born"),
        (_set("segments", 0, "born", to="0"), InvalidSnapshot, "wrong at segments.0.born"),
        (_set("segments", 0, "written_at", to=float("nan")), InvalidSnapshot, "wrong at segments.0.written_at"),
        (_set("segments", 0, "surprise", to=1), InvalidSnapshot, "wrong at segments.0.surprise"),
        (_set("segments", 0, "id", to=7), InvalidSnapshot, r"ids are not increasing: \[7, 2\]"),
        (_set("segments", 0, "id", to=2), InvalidSnapshot, r"ids are not increasing: \[2, 2\]"),
        (_set("segments", to=None), InvalidSnapshot, "wrong at segments"),
        (_set("step", to=-3), InvalidSnapshot, "wrong at step"),
        (_set("step", to=1 << 53), InvalidSnapshot, "counting on"),
        (_set("segments", 1, "id", to=1 << 53), InvalidSnapshot, "counting on"),
        (_set("sha256", to="0"), InvalidSnapshot, "altered"),
        (_alter, InvalidSnapshot, "altered"),
        (_poison, InvalidSnapshot, "1.values holds NaN"),
        (_replace("1.keys", torch.zeros(1, 2, 4, 4)), InvalidSnapshot, r"1.keys is .*\[1, 2, 4, 4\].*\[1, 2, 5, 4\]"),
        (_replace("1.keys", torch.zeros(1, 2, 5, 4).half()), InvalidSnapshot, "1.keys is float16"),
        (_replace("1.bias", torch.zeros(1, 1, 5)), InvalidSnapshot, "1.bias is"),
        (_replace("5.keys", torch.zeros(1, 2, 5, 4)), InvalidSnapshot, "superfluous"),
        (lambda _, tensors: tensors.pop("3.bias"), InvalidSnapshot, r"missing \(\['3.bias'\]\)"),
    ],
)
def test_a_wrong_snapshot_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object], error: type[SnapshotError], words: str
) -> None:
    store = _filled()
    before = store.snapshot("s")
    wrong = _rewritten(before, change)
    assert wrong != before
    with pytest.raises(error, match=words) as caught:
        store.restore("s", wrong, source="upload.safetensors")
    assert str(caught.value).startswith("upload.safetensors: ")
    assert caught.value.source == "upload.safetensors"
    assert isinstance(caught.value, WorkspaceError)
    assert store.snapshot("s") == before
    store.check_invariants()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not a snapshot",
        b"\xff" * 64,
        save({"a": torch.zeros(2)}),
        save({"a": torch.zeros(2)}, metadata={"other": "thing"}),
        save({}, metadata={KEY: "[" * 5000}),
        save({}, metadata={KEY: "[1]"}),
        save({}, metadata={KEY: "{"}),
    ],
)
def test_what_is_no_snapshot_at_all_is_refused(blob: bytes) -> None:
    store = VirtualKVStore(make_shape())
    with pytest.raises(InvalidSnapshot, match=r"^a file: "):
        store.restore("s", blob, source="a file")


def test_a_snapshot_cut_off_anywhere_is_refused() -> None:
    blob = _filled().snapshot("s")
    store = VirtualKVStore(make_shape())
    for length in range(len(blob)):
        with pytest.raises(InvalidSnapshot):
            store.restore("s", blob[:length], source="a file")


BLOB = _filled().snapshot("s")


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_single_altered_byte_is_never_believed(place: int, difference: int) -> None:
    """Either it is refused, or the byte was white space or a description, never a tensor."""
    altered = bytearray(BLOB)
    altered[place] ^= difference
    store = VirtualKVStore(make_shape(), clock=FakeClock())
    try:
        store.restore("s", bytes(altered), source="a file")
    except SnapshotError:
        assert store.sessions() == []
    else:
        assert place < 8 + int.from_bytes(BLOB[:8], "little")
    store.check_invariants()


def test_a_snapshot_of_fewer_hooked_layers_fits_and_of_more_does_not() -> None:
    fewer = StoreShape("model-a", (1, 3), 2, 4, torch.float32, torch.device("cpu"))
    store = VirtualKVStore(make_shape())
    store.restore("s", VirtualKVStore(fewer).snapshot("s"), source="test")
    assert set(store.shape.layers) == set(LAYERS)
    store.write("s", make_layers({5: 1}), born=0, kind="plan")
    with pytest.raises(SnapshotMismatch, match=r"layers \[5\]"):
        VirtualKVStore(fewer).restore("s", store.snapshot("s"), source="test")
