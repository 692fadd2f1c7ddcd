"""Prompts: the exact texts of both styles, budgets, corrections, and that the student never sees the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.distillation.errors import ObservationTooLong
from memory.distillation.prompt_builder import (
    INSTRUCTIONS,
    PromptBuilder,
    Style,
    as_corrected,
    estimate_tokens,
    student_messages,
    teacher_messages,
)
from tests.support.experiences import record, tagged

LIVED = [
    record(1, "where is my card", "OPS-GREY", "Incorrect! The correct answer is OPS-RED."),
    record(2, "top up failed", "OPS-BLUE", "Correct!"),
]


def words(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(str(message["content"]).split()) for message in messages)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_style_turns() -> None:
    assert teacher_messages("turns", "Label it.", "new", LIVED) == [
        {"role": "system", "content": "Label it."},
        user("where is my card"),
        assistant("OPS-GREY"),
        user("Incorrect! The correct answer is OPS-RED."),
        user("top up failed"),
        assistant("OPS-BLUE"),
        user("Correct!"),
        user("new"),
    ]
    assert student_messages("turns", "", "new") == [user("new")]


def test_turns_can_be_merged_for_templates_that_insist_on_alternation() -> None:
    merged = teacher_messages("turns", "", "new", LIVED, merge_turns=True)
    assert [turn["role"] for turn in merged] == ["user", "assistant"] * 2 + ["user"]
    assert merged[2] == user("Incorrect! The correct answer is OPS-RED.\n\ntop up failed")
    assert merged[4] == user("Correct!\n\nnew")


def test_the_style_list() -> None:
    assert teacher_messages("list", "Label it.", "new", LIVED) == [
        {"role": "system", "content": f"Label it.\n\n{INSTRUCTIONS}"},
        user(
            "Here is a list of your previous experiences:\n\n"
            "OBSERVATION: where is my card\n\nACTION: OPS-GREY\n\n"
            "FEEDBACK: Incorrect! The correct answer is OPS-RED.\n\n"
            "OBSERVATION: top up failed\n\nACTION: OPS-BLUE\n\nFEEDBACK: Correct!\n\n"
            "Here is the current observation:\n\nnew"
        ),
    ]
    empty = teacher_messages("list", "", "new", [])
    assert empty[0]["content"] == INSTRUCTIONS
    assert "No previous experiences." in empty[1]["content"]
    assert student_messages("list", "Label it.", "new") == [
        {"role": "system", "content": "Label it."},
        user("Here is the current observation:\n\nnew"),
    ]


def test_corrections_can_be_applied() -> None:
    assert as_corrected(LIVED[0]).entries() == record(1, "where is my card", "OPS-RED").entries()
    assert as_corrected(LIVED[1]).entries() == record(2, "top up failed", "OPS-BLUE").entries()
    unknown = record(3, "o", "a", "hm")
    assert as_corrected(unknown) is unknown
    prompt = PromptBuilder("turns", "", words, 100, apply_corrections=True).build("new", LIVED)
    assert [turn["content"] for turn in prompt.teacher_messages] == [
        "where is my card",
        "OPS-RED",
        "top up failed",
        "OPS-BLUE",
        "new",
    ]


@pytest.mark.parametrize("style", ["turns", "list"])
def test_the_student_sees_no_memory_but_what_is_recent(style: Style) -> None:
    builder = PromptBuilder(style, "Label it.", words, 1000)
    prompt = builder.build("new", LIVED)
    assert "OPS" not in str(prompt.student_messages)
    assert "OPS-BLUE" in str(prompt.teacher_messages)
    hybrid = builder.build("new", LIVED, recent=LIVED[1:])
    assert "OPS-BLUE" in str(hybrid.student_messages)
    assert "OPS-GREY" not in str(hybrid.student_messages)
    assert hybrid.teacher_messages == prompt.teacher_messages


def test_the_oldest_go_first_and_it_is_said_how_many() -> None:
    records = tagged(10)
    builder = PromptBuilder("turns", "", words, 30)
    prompt = builder.build("one two", records)
    assert prompt.included == tuple(range(10 - len(prompt.included) + 1, 11))
    assert prompt.dropped == 10 - len(prompt.included) > 0
    assert prompt.tokens == words(prompt.teacher_messages) <= 30


def test_a_shuffled_memory_keeps_its_order_and_loses_its_oldest() -> None:
    records = list(reversed(tagged(10)))
    prompt = PromptBuilder("turns", "", words, 30).build("one two", records)
    assert list(prompt.included) == sorted(prompt.included, reverse=True)
    assert min(prompt.included) == 10 - len(prompt.included) + 1


def test_an_observation_that_does_not_fit_alone_is_an_error() -> None:
    with pytest.raises(ObservationTooLong, match=r"raise teacher\.max_prompt_tokens"):
        PromptBuilder("turns", "", words, 3).build("one two three four", tagged(3))
    assert PromptBuilder("turns", "", words, 4).build("one two three four", tagged(3)).dropped == 3


@given(count=st.integers(0, 30), budget=st.integers(1, 200), style=st.sampled_from(["turns", "list"]))
def test_as_much_as_fits_and_not_one_more(count: int, budget: int, style: Style) -> None:
    records = tagged(count)
    builder = PromptBuilder(style, "", words, budget)
    least = words(teacher_messages(style, "", "now", []))
    if least > budget:
        with pytest.raises(ObservationTooLong):
            builder.build("now", records)
        return
    prompt = builder.build("now", records)
    assert prompt.tokens <= budget
    assert len(prompt.included) + prompt.dropped == count
    if prompt.dropped:
        one_more = records[prompt.dropped - 1 :]
        assert words(teacher_messages(style, "", "now", one_more)) > budget


def test_the_estimate_is_no_less_than_real_tokenizers_say() -> None:
    assert estimate_tokens([user("hello"), assistant("x" * 300)]) == 8 + 1 + 8 + 100
