"""The layout of pairs and prompts: nothing overflows, nothing is cut inside a character, the mask is exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qig_core.errors import InvalidInput
from qig_core.vocabulary import (
    BOS,
    EOS,
    PAD,
    SEP,
    VOCAB_SIZE,
    decode_ids,
    encode_pair,
    encode_prompt,
    encode_text,
)


def test_marks_follow_the_bytes():
    assert (PAD, BOS, SEP, EOS, VOCAB_SIZE) == (256, 257, 258, 259, 260)


@given(st.text(max_size=80))
def test_text_survives(text: str):
    assert decode_ids(encode_text(text)) == text.encode("utf-8", errors="replace").decode()


def test_broken_bytes_are_replaced_and_marks_skipped():
    assert decode_ids([BOS, 0x68, 0xFF, 0x69, EOS, PAD]) == "h�i"


def test_a_short_pair_is_laid_out_in_full():
    pair = encode_pair("hi", "ok", 64)
    assert pair.ids == [BOS, *b"hi", SEP, *b"ok", EOS]
    assert pair.loss_mask == [False, False, False, False, True, True, True]
    assert (pair.action, pair.truncated) == ("ok", False)


def test_an_empty_observation_is_plain_text():
    assert encode_pair("", "text", 64).ids == [BOS, SEP, *b"text", EOS]


def test_the_observation_is_cropped_from_the_left_first():
    pair = encode_pair("0123456789" * 3, "yes", 23)
    assert pair.ids == [BOS, *b"34567890123456789", SEP, *b"yes", EOS]
    assert not pair.truncated


def test_a_long_action_takes_half_unless_the_observation_leaves_room():
    both = encode_pair("o" * 100, "a" * 100, 43)
    assert both.action == "a" * 20
    assert both.truncated
    assert both.loss_mask[-1] is False, "an action that was cut must not teach its end"
    alone = encode_pair("oo", "a" * 100, 43)
    assert alone.action == "a" * 38


@given(st.text(max_size=60), st.text(max_size=60), st.integers(16, 80))
def test_pairs_fit_and_are_valid_utf8(observation: str, action: str, context: int):
    pair = encode_pair(observation, action, context)
    assert len(pair.ids) == len(pair.loss_mask) <= context
    middle = pair.ids.index(SEP)
    kept = bytes(pair.ids[1:middle]).decode()  # strict: raises where a character was cut
    assert observation.encode(errors="replace").decode().endswith(kept)
    assert bytes(pair.ids[middle + 1 : -1]).decode() == pair.action
    masked = [i for i, m in zip(pair.ids, pair.loss_mask, strict=True) if m]
    assert masked == [*encode_text(pair.action), *([] if pair.truncated else [EOS])]


@given(st.text(max_size=80), st.integers(0, 14))
def test_prompts_leave_the_reserve(observation: str, reserve: int):
    ids = encode_prompt(observation, 20, reserve)
    assert len(ids) + reserve <= 20
    assert (ids[0], ids[-1]) == (BOS, SEP)


def test_a_prompt_is_the_start_of_its_pair():
    assert encode_pair("seen", "done", 64).ids[:6] == encode_prompt("seen", 64, 8)


def test_impossible_sizes_are_errors():
    with pytest.raises(InvalidInput, match="too small"):
        encode_pair("a", "b", 8)
    with pytest.raises(InvalidInput, match="reserve"):
        encode_prompt("a", 20, 19)
