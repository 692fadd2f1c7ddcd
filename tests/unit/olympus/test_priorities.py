"""The sum tree and the priorities over it: shares, weights, persistence."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from olympus.priorities import ALPHA, CLIP, EPSILON, Priorities
from olympus.sum_tree import SumTree


@hypothesis_settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_the_tree_finds_what_a_cumulative_sum_finds(values: list[float], seed: int) -> None:
    tree = SumTree(len(values))
    order = list(range(len(values)))
    random.Random(seed).shuffle(order)
    for index in order:
        tree[index] = values[index]
        tree.check_invariants()
    assert tree.total == pytest.approx(sum(values))
    if tree.total == 0:
        with pytest.raises(ValueError, match="outside"):
            tree.find(0.0)
        return
    ends = np.cumsum(values)
    for point in np.linspace(0, tree.total, 23, endpoint=False).tolist():
        found = tree.find(point)
        assert values[found] > 0
        assert ends[found] - values[found] - 1e-9 <= point <= ends[found] + 1e-9


def test_the_tree_does_not_depend_on_the_order_of_changes() -> None:
    drawer = random.Random(0)
    values = [drawer.random() for _ in range(37)]
    once, often = SumTree(37), SumTree(37)
    for index, value in enumerate(values):
        once[index] = value
    for _ in range(300):
        often[drawer.randrange(37)] = drawer.random()
    for index, value in enumerate(values):
        often[index] = value
    assert once.total == often.total
    points = [drawer.random() * once.total for _ in range(200)]
    assert [once.find(point) for point in points] == [often.find(point) for point in points]


def test_the_tree_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SumTree(0)
    tree = SumTree(3)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            tree[0] = bad
    with pytest.raises(IndexError):
        tree[3] = 1.0
    with pytest.raises(IndexError):
        _ = tree[-1]


def test_draws_follow_the_priorities_and_weights_correct_them() -> None:
    ranks = Priorities(8)
    losses = {1: 0.1, 2: 0.5, 3: 2.0}
    for item, loss in losses.items():
        ranks.add(item)
        ranks.observe(item, loss)
    drawer, drawn = random.Random(0), Counter[int]()
    for _ in range(2000):
        drawn.update(item for item, _ in ranks.draw(4, drawer, step=0))
    shares = {item: (loss + EPSILON) ** ALPHA for item, loss in losses.items()}
    for item, share in shares.items():
        assert drawn[item] / drawn.total() == pytest.approx(share / sum(shares.values()), abs=0.02)
    late = dict(ranks.draw(64, drawer, step=10**6))  # beta = 1: weights undo the preference
    assert late[1] == 1.0
    assert late[3] == pytest.approx(shares[1] / shares[3])
    assert dict(ranks.draw(64, drawer, step=0))[3] > late[3]


def test_new_items_are_seen_first_and_noise_does_not_take_over() -> None:
    ranks = Priorities(200)
    for item in range(1, 101):
        ranks.add(item)
        ranks.observe(item, 0.3)
    for item in range(101, 104):  # nobody can know these
        ranks.add(item)
        ranks.observe(item, 50.0)
    ranks.add(200)
    drawer, drawn = random.Random(1), Counter[int]()
    for _ in range(500):
        drawn.update(item for item, _ in ranks.draw(8, drawer, step=0))
    clipped = (CLIP + EPSILON) ** ALPHA / (0.3 + EPSILON) ** ALPHA
    typical = sum(drawn[item] for item in range(1, 101)) / 100
    assert drawn[200] / typical == pytest.approx(clipped, rel=0.25)
    assert sum(drawn[item] for item in (101, 102, 103)) / drawn.total() < 0.15


def test_what_is_no_number_or_unknown_passes_by() -> None:
    ranks = Priorities(4)
    ranks.add(1)
    before = ranks.state_dict()
    ranks.observe(1, float("nan"))
    ranks.observe(9, 1.0)
    assert ranks.state_dict() == before


@hypothesis_settings(max_examples=60, deadline=None)
@given(operations=st.lists(st.tuples(st.sampled_from(["add", "remove", "observe"]), st.integers(1, 20)), max_size=80))
def test_restored_priorities_draw_the_same(operations: list[tuple[str, int]]) -> None:
    ranks = Priorities(20)
    for operation, item in operations:
        if operation == "add" and item not in ranks:
            ranks.add(item)
        elif operation == "remove" and item in ranks:
            ranks.remove(item)
        elif operation == "observe":
            ranks.observe(item, item / 7)
        ranks.check_invariants()
    restored = Priorities(20)
    restored.load_state_dict(ranks.state_dict(), ranks.ids())
    restored.check_invariants()
    assert restored.state_dict() == ranks.state_dict()
    if len(ranks):
        assert ranks.draw(8, random.Random(3), 5) == restored.draw(8, random.Random(3), 5)
    free = next((item for item in range(1, 21) if item not in ranks), None)
    if free is not None:  # the next newcomer takes the same slot in both
        ranks.add(free)
        restored.add(free)
        assert restored.state_dict() == ranks.state_dict()


def test_who_is_gone_is_dropped_and_who_is_unknown_is_new() -> None:
    ranks = Priorities(4)
    for item in (1, 2, 3):
        ranks.add(item)
        ranks.observe(item, 0.5)
    restored = Priorities(4)
    restored.load_state_dict(ranks.state_dict(), {2, 3, 7})
    restored.check_invariants()
    assert restored.ids() == [2, 3, 7]
    with pytest.raises(ValueError, match="do not fit"):
        Priorities(2).load_state_dict(ranks.state_dict(), {1, 2})
