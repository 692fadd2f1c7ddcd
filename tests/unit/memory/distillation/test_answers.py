"""What the history says about an answer, and which of equal experiences counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.distillation.answers import (
    content_key,
    corrected_answer,
    failures,
    latest_by_content,
    same_answer,
    went_wrong,
)
from tests.support.experiences import record, tagged


@pytest.mark.parametrize(
    ("feedback", "fields", "answer", "wrong"),
    [
        ("Correct!", {}, "a", False),
        ("correct", {}, "a", False),
        ("That's right, thanks", {}, "a", False),
        ("Incorrect! The correct answer is OPS-RED.", {}, "OPS-RED", True),
        ("Incorrect! The correct answer is v1.2.", {}, "v1.2", True),
        ("Wrong. The right answer was: 'card arrival'.", {}, "card arrival", True),
        ('Incorrect! The correct answer is "a b".', {}, "a b", True),
        ("Incorrect! The correct answer is e.g..", {}, "e.g.", True),
        ("incorrect! the correct answer is x\nbecause of the rules.", {}, "x", True),
        ("Not right, try again", {}, None, True),
        ("Incorrect!", {"score": 1.0}, None, True),
        ("The correct answer is a.", {}, "a", False),
        ("The correct answer is b.", {}, "b", True),
        ("Interesting", {}, None, None),
        ("correctness matters", {}, None, None),
        (None, {}, None, None),
        (None, {"score": 1.0}, "a", False),
        (None, {"score": 0.0}, None, True),
        (None, {"score": 0.7}, None, None),
        ("Correct!", {"meta": {"correction": "OPS-BLUE"}}, "OPS-BLUE", True),
        ("Incorrect! The correct answer is c.", {"meta": {"correction": " A. "}}, "A.", False),
        ("Correct!", {"meta": {"correction": "  "}}, "a", False),
        ("Correct!", {"meta": {"correction": 7}}, "a", False),
        ("Correct!", {"action": ""}, None, False),
    ],
)
def test_answers_are_read_from_feedback_corrections_and_scores(
    feedback: str | None, fields: dict[str, Any], answer: str | None, wrong: bool | None
) -> None:
    item = record(1, "o", fields.pop("action", "a"), feedback, **fields)
    assert corrected_answer(item) == answer
    assert went_wrong(item) is wrong


@given(st.text(st.characters(exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1, max_size=30))
def test_the_environments_feedback_gives_its_answer_back(answer: str) -> None:
    if answer != answer.strip() or answer[0] in ":\"'`“‘«":
        return
    item = record(1, "o", "a", f"Incorrect! The correct answer is {answer}.")
    assert corrected_answer(item) == answer


def test_same_answers_and_same_contents() -> None:
    assert same_answer("OPS-RED", " ops-red.")
    assert not same_answer("OPS-RED", "OPS-RE")
    assert content_key("Where  is\nmy card?") == content_key("where is my card?")
    assert content_key("ﬁne") == content_key("fine")
    assert content_key("a b") != content_key("ab")


def test_the_latest_judged_experience_of_equal_ones_counts() -> None:
    records = [
        record(1, "Where is my card?", "x", "Incorrect! The correct answer is OLD."),
        record(2, "other"),
        record(3, "where is my  card?", "y", "Incorrect! The correct answer is NEW."),
        record(4, "WHERE is my card?", "z"),
        record(5, "gone", deleted=True),
        record(6, "other", "later"),
    ]
    assert [item.id for item in latest_by_content(reversed(records))] == [3, 6]


def test_failures() -> None:
    assert [item.id for item in failures(tagged(7))] == [3, 6]
