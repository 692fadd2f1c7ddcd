"""Rows that lie in one tensor attend as one: each gets what it gets alone, whoever lies or lay beside it."""

from __future__ import annotations

import functools
import gc
import math
import random

import psutil
import pytest
import torch

from tests.support.architectures import loaded, stock_model
from workspace import row_slab
from workspace.attention import adopt_attention
from workspace.forward import Forward, Row
from workspace.packed import packed_rows
from workspace.row_cache import RowCache
from workspace.row_slab import Group, Slabs, chosen

SCALING = 0.3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("with_sinks", [False, True])
@torch.inference_mode()
def test_rows_attend_to_what_each_sees(with_sinks: bool, group: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(group)
    lengths = torch.tensor([1, 40, 17, 33])
    query = torch.randn(4, 2, group, 16).to(dtype)
    slab = [torch.randn(6, 2, 90, 16).to(dtype) for _ in range(2)]
    key, value = (whole.narrow(0, 1, 4).narrow(2, 0, 40) for whole in slab)  # views with gaps, as they are in use
    hidden = torch.zeros(4, 40).masked_fill_(torch.arange(40) >= lengths[:, None], -math.inf)[:, None, None]
    sinks = torch.linspace(-1, 2, 2 * group) if with_sinks else None
    found = packed_rows(query, key, value, hidden, SCALING, sinks)
    assert found.shape == query.shape
    assert found.dtype == dtype
    for row, length in enumerate(lengths):
        scores = query[row].double() @ key[row, :, :length].double().transpose(1, 2) * SCALING
        if sinks is not None:
            scores = torch.cat((scores, sinks.double().view(2, group, 1)), dim=-1)
        wanted = torch.softmax(scores, -1)[..., :length] @ value[row, :, :length].double()
        assert (found[row].double() - wanted).norm() <= bound * wanted.norm()


def rows_of(places: list[int], ends: list[int], room: int = 2048) -> tuple[int, ...]:
    group = chosen(places, ends, room)
    if group is None:
        return ()
    assert sorted((*group.rows, *group.alone)) == list(range(len(places)))
    return group.rows


def test_rows_of_similar_lengths_are_taken_together() -> None:
    assert rows_of([0, 1, 2, 3], [100, 120, 90, 200]) == (0, 1, 2, 3)
    assert rows_of([3, 0, 2, 1], [100, 120, 90, 200]) == (0, 1, 2, 3)


def test_a_long_row_is_left_out_instead_of_padding_all_others() -> None:
    assert rows_of([0, 1, 2, 3], [100, 1900, 90, 110]) == (0, 2, 3)


def test_places_far_apart_are_not_taken_together() -> None:
    assert rows_of([0, 7], [300, 300]) == ()
    assert rows_of([0, 1], [300, 300]) == (0, 1)
    assert rows_of([30, 0, 1, 2], [300] * 4) == (1, 2, 3)
    assert rows_of([4, 30, 31, 5, 32, 33], [300] * 6) == (1, 2, 4, 5), "the run that saves more"


def test_the_choice_is_the_best_of_all_runs() -> None:
    dice = random.Random(3)
    for _ in range(300):
        count = dice.randrange(1, 9)
        places = dice.sample(range(10), count)
        ends = [dice.choice((20, 90, 200, 700, 1500)) + dice.randrange(40) for _ in places]
        best, most = (), 0.0
        for tokens in {end + 1 for end in ends}:
            for first in range(10):
                for last in range(first + 1, 10):
                    rows = [row for row, place in enumerate(places) if first <= place <= last and ends[row] < tokens]
                    held = {places[row] for row in rows}
                    if len(rows) > 1 and {first, last} <= held:
                        gain = sum(row_slab._alone(ends[row] + 1) for row in rows)
                        gain -= row_slab._TOGETHER + (last - first + 1) * tokens
                        if gain > most + 1e-6:
                            best, most = tuple(rows), gain
        assert rows_of(places, ends) == best


def test_rows_without_a_place_or_without_room_are_alone() -> None:
    assert rows_of([0, -1, 1, 2], [50, 50, 50, 50]) == (0, 2, 3)
    assert rows_of([0, 1, 2], [500, 600, 599], room=600) == (0, 2)
    assert rows_of([-1, -1], [50, 50]) == ()
    assert rows_of([4], [50]) == ()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("seed", [1, 2])
def test_sequences_that_come_and_go_get_the_logits_of_single_passes(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six sequences at most and four places of 24 tokens: some have none, some outgrow theirs, rows change order."""
    monkeypatch.setattr("workspace.forward.Slabs", functools.partial(Slabs, tokens=24, forced=True))
    groups: list[int] = []
    attend = Group.attend
    monkeypatch.setattr(Group, "attend", lambda self, *args: groups.append(len(self.rows)) or attend(self, *args))
    model = stock_model(name, "sdpa" if name == "llama" else "eager")
    assert adopt_attention(model)
    forward = Forward(loaded(model), rows=4)
    slabs = forward._slabs
    assert slabs is not None
    rng = random.Random(seed)
    pairs: list[tuple[RowCache, RowCache, list[int]]] = []
    with torch.inference_mode():
        for _ in range(60):
            if len(pairs) < 6 and rng.random() < 0.4:
                prompt = [rng.randrange(100) for _ in range(rng.randrange(1, 22))]
                mine, other = forward.new_cache(len(prompt) + 2), RowCache(model.config)
                forward(prompt, mine, 0, {})
                forward(prompt, other, 0, {})
                pairs.append((mine, other, prompt))
            if pairs and rng.random() < 0.15:
                pairs.pop(rng.randrange(len(pairs)))
            taken = rng.sample(pairs, rng.randrange(len(pairs) + 1))
            if not taken:
                continue
            token = rng.randrange(100)
            wanted = [forward([token], other, len(text), {}) for _, other, text in taken]
            found = forward.together([Row(token, len(text), mine) for mine, _, text in taken])
            torch.testing.assert_close(found, torch.stack(wanted), atol=2e-4, rtol=1e-4)
            for mine, other, text in taken:
                text.append(token)
                mine.check_invariants()
                for left, right in zip(mine.layers, other.layers, strict=True):
                    torch.testing.assert_close(left.keys, right.keys, atol=5e-4, rtol=1e-3)
            slabs.check_invariants()
    assert {2, 3} <= set(groups)
    pairs.clear()
    del taken, mine, other
    gc.collect()
    slabs.check_invariants()


def of_llama(rows: int) -> Forward:
    model = stock_model("llama", "sdpa")
    assert adopt_attention(model)
    return Forward(loaded(model), rows=rows)


def filled(forward: Forward, prompt: list[int]) -> RowCache:
    cache = forward.new_cache()
    forward(prompt, cache, 0, {})
    return cache


def test_what_a_sequence_left_is_not_felt_by_the_next() -> None:
    """Numbers that are none, beyond the end of a padded row: zero times them would be none either."""
    forward = of_llama(8)
    with torch.inference_mode():
        first, second = filled(forward, [5] * 30), filled(forward, [6] * 30)
        for layer in first.layers:
            layer.keys.fill_(math.nan)
            layer.values.fill_(math.inf)
        place = first.layers[0].place
        del first, layer
        third = filled(forward, [7, 8])
        assert third.layers[0].place == place
        found = forward.together([Row(9, 2, third), Row(9, 30, second)])
        torch.testing.assert_close(found[0], forward([9], filled(forward, [7, 8]), 2, {}), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], forward([9], filled(forward, [6] * 30), 30, {}), atol=2e-4, rtol=1e-4)


def test_nor_where_one_came_between_that_never_wrote() -> None:
    """A prompt that is too long for a place takes none; one that is cancelled before it is read leaves it as it was."""
    forward = of_llama(2)
    slabs = forward._slabs
    assert slabs is not None
    with torch.inference_mode():
        beside, first = filled(forward, [6] * 30), filled(forward, [5] * 30)
        first.layers[1].keys.fill_(math.nan)
        del first
        slabs.check_invariants()
        assert forward.new_cache(3000).layers[0].place == -1
        never_read = forward.new_cache()
        del never_read
        third = filled(forward, [7, 8])
        assert third.layers[1].place == 1
        found = forward.together([Row(9, 2, third), Row(9, 30, beside)])
        assert found.isfinite().all()


def test_layers_that_are_kept_without_their_cache_keep_the_place() -> None:
    forward = of_llama(2)
    with torch.inference_mode():
        cache = filled(forward, [5] * 30)
        layers = cache.layers
        before = layers[0].keys.clone()
        del cache
        other = filled(forward, [6] * 30)
        assert other.layers[0].place == 1
        assert torch.equal(layers[0].keys, before)


@pytest.mark.parametrize("rows", [2, 8])
def test_attending_as_one_is_tried_before_it_is_done(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = of_llama(rows)
    held = [forward.new_cache() for _ in range(rows)]
    assert forward.rows_agree()
    attend = Group.attend
    monkeypatch.setattr(Group, "attend", lambda self, *args: attend(self, *args).flip(0))
    assert not forward.rows_agree()
    assert len(held) == rows


def test_a_layer_whose_keys_were_replaced_has_buffers_of_its_own() -> None:
    """A capped cache keeps a part of them, which may be a view of where they lay."""
    forward = of_llama(8)
    with torch.inference_mode():
        cache, beside = filled(forward, list(range(20))), filled(forward, [3] * 9)
        apart = RowCache(forward._model.config)
        forward(list(range(20)), apart, 0, {})
        for layer in (*cache.layers, *apart.layers):
            layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
        assert all(layer.place == -1 for layer in cache.layers)
        for step in range(3):
            wanted = forward([4], apart, 20 + step, {})
            found = forward.together([Row(4, 20 + step, cache), Row(4, 9 + step, beside)])[0]
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_memory_is_given_back_with_the_last_sequence() -> None:
    forward = of_llama(2)
    slabs = forward._slabs
    assert slabs is not None
    with torch.inference_mode():
        caches = [filled(forward, [1, 2, 3]) for _ in range(3)]
        assert [cache.layers[0].place for cache in caches] == [0, 1, -1]
        slabs.layer(0)
        caches.clear()
    with pytest.raises(KeyError):
        slabs.layer(0)
    slabs.check_invariants()


def test_memory_is_taken_as_it_is_written_to() -> None:
    """Half a gigabyte of places, of which one is used."""
    slabs, process = Slabs(64, tokens=8192), psutil.Process()
    like = torch.zeros(1, 4, 1, 64)
    before = process.memory_info().rss
    lease = slabs.take()
    assert lease is not None
    part = slabs.part(0, lease.place, like, like)
    assert part is not None
    assert slabs.layer(0)[0].nbytes == 64 * 4 * 8192 * 64 * 4
    for tensor in part:
        assert not tensor[:, :, :100].any()
        tensor[:, :, :100] = 1
    assert process.memory_info().rss - before < 20e6
    beside = slabs.take()
    del lease
    with torch.inference_mode():
        again = slabs.take()
        assert beside is not None
        assert again is not None
        assert (beside.place, again.place) == (1, 0)
        fresh = slabs.part(0, again.place, like, like)
        assert fresh is not None
        assert not fresh[0].any()


def test_a_machine_without_memory_for_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Slabs, like: torch.Tensor) -> object:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Slabs, "_made", refuse)
    forward = of_llama(8)
    with torch.inference_mode():
        caches = [filled(forward, [1, 2, 3]), filled(forward, [4, 5])]
        found = forward.together([Row(6, 3, caches[0]), Row(6, 2, caches[1])])
        torch.testing.assert_close(found[1], forward([6], filled(forward, [4, 5]), 2, {}), atol=2e-4, rtol=1e-4)
