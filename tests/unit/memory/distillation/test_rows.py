"""Rows: what is valid, and which of the teacher's candidates are kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memory.distillation.errors import BadRow
from memory.distillation.rows import FlatTopLogprobs, Row, RowMessage, flatten_topk


def top(tokens: int = 2) -> FlatTopLogprobs:
    return flatten_topk([[5, 6, 7]] * tokens, np.log([[0.6, 0.3, 0.05]] * tokens))


def test_candidates_are_kept_until_their_mass_is_reached() -> None:
    flat = flatten_topk([[1, 2, 3], [4, 5, 6]], np.log([[0.995, 0.003, 0.001], [0.5, 0.495, 0.004]]), mass=0.99)
    assert flat.token_idx.tolist() == [0, 1, 1]
    assert flat.token_id.tolist() == [1, 4, 5]
    assert np.exp(flat.logprobs) == pytest.approx([0.995, 0.5, 0.495])
    assert flat.shape == (2, 3)
    assert (flat.token_idx.dtype, flat.token_id.dtype, flat.logprobs.dtype) == (np.int32, np.int32, np.float32)


def test_a_flat_position_keeps_every_candidate() -> None:
    """Upstream keeps one there, because argmax over an all-false condition is 0."""
    flat = flatten_topk(np.arange(20)[None], np.full((1, 20), math.log(0.01)))
    assert len(flat.token_id) == 20


def test_candidates_come_sorted_whatever_their_order_was() -> None:
    flat = flatten_topk([[1, 2, 3]], np.log([[0.1, 0.7, 0.2]]), mass=0.85)
    assert flat.token_id.tolist() == [2, 3]


def test_what_is_impossible_is_dropped_and_what_is_no_number_refused() -> None:
    assert flatten_topk([[1, 2]], [[0.0, -np.inf]], mass=1.0).token_id.tolist() == [1]
    with pytest.raises(BadRow, match="numbers"):
        flatten_topk([[1, 2]], [[-0.1, np.nan]])
    with pytest.raises(BadRow, match="at most 0"):
        flatten_topk([[1, 2]], [[0.5, -1.0]])
    with pytest.raises(BadRow, match="shapes"):
        flatten_topk([[1, 2]], [[-0.5]])
    with pytest.raises(BadRow, match="mass"):
        flatten_topk([[1]], [[-0.5]], mass=0.0)


@given(
    weights=arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.floats(0.01, 1)),
    mass=st.floats(0.05, 1),
)
def test_as_few_candidates_as_reach_the_mass_or_all(weights: Any, mass: float) -> None:
    probabilities = weights / weights.sum(axis=1, keepdims=True) * 0.9
    flat = flatten_topk(np.tile(np.arange(weights.shape[1]), (len(weights), 1)), np.log(probabilities), mass)
    for position, row in enumerate(probabilities):
        kept = np.sort(np.exp(flat.logprobs[flat.token_idx == position]))[::-1]
        assert kept == pytest.approx(np.sort(row)[::-1][: len(kept)], rel=1e-5)
        assert kept.sum() >= mass - 1e-5 or len(kept) == len(row)
        assert kept[:-1].sum() < mass + 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_id": [1]}, "equally long"),
        ({"token_idx": [1, 0]}, "ascend"),
        ({"token_idx": [0, 2]}, "outside"),
        ({"token_idx": [-1, 0]}, "outside"),
        ({"token_id": [1, -1]}, "negative"),
        ({"logprobs": [0.0, math.nan]}, "finite"),
        ({"logprobs": [0.0, 1.0]}, "at most 0"),
        ({"shape": (2,)}, "shape"),
        ({"shape": (2, -1)}, "shape"),
        ({"shape": (2, 0)}, "do not fit"),
        ({"token_id": [1, "x"]}, "token_id"),
    ],
)
def test_log_probabilities_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {"token_idx": [0, 1], "token_id": [1, 2], "logprobs": [-0.5, -1.0], "shape": (2, 3)}
    FlatTopLogprobs(**sound)
    with pytest.raises(BadRow, match=message):
        FlatTopLogprobs(**{**sound, **change})


def test_equality_is_by_content() -> None:
    assert top() == top()
    assert top() != top(3)
    assert top() != "top"
    assert dataclasses.replace(top(), logprobs=top().logprobs - 1) != top()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "tool"}, "role"),
        ({"content": None}, "content"),
        ({"token_ids": (1, -2)}, "token_ids"),
        ({"top_logprobs": top()}, "without token_ids"),
        ({"top_logprobs": top(), "token_ids": (1, 2, 3)}, "3 token_ids"),
    ],
)
def test_messages_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        RowMessage(**{"role": "user", "content": "x", **fields})


ASK, SAY = RowMessage("user", "q"), RowMessage("assistant", "a")


@pytest.mark.parametrize(
    ("messages", "metadata", "message"),
    [
        ((), {}, "last one"),
        ((SAY, ASK), {}, "last one"),
        ((ASK, RowMessage("assistant", "")), {}, "empty"),
        ((ASK, SAY), {"split": "test"}, "split"),
        ((ASK, SAY), {"target": "gold"}, "target"),
        ((ASK, SAY), {"weight": -1.0}, "weight"),
        ((ASK, SAY), {"weight": math.inf}, "weight"),
        ((ASK, SAY), {"weight": True}, "weight"),
        ((ASK, SAY), {"note": math.nan}, "JSON"),
        ((ASK, SAY), {"note": {1, 2}}, "JSON"),
    ],
)
def test_rows_are_checked(messages: tuple[RowMessage, ...], metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        Row(messages, "", metadata)


def test_a_row_says_what_it_is_for() -> None:
    plain = Row((ASK, SAY))
    assert plain.prompt() == [{"role": "user", "content": "q"}]
    assert Row((ASK, SAY), "be brief").prompt()[0] == {"role": "system", "content": "be brief"}
    assert (plain.answer, plain.split, plain.weight, plain.target) == (SAY, "train", 1.0, "feedback")
    taught = Row((ASK, RowMessage("assistant", "a", (1, 2), top())), metadata={"split": "eval", "weight": 2})
    assert (taught.split, taught.weight, taught.target) == ("eval", 2.0, "teacher")
