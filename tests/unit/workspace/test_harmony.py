"""The Harmony parser: equal to openai-harmony where that accepts, never raising and never leaking elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyError, Role, StreamableParser

from tests.support.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, SPECIALS, START, harmony_encoding
from workspace.harmony import CHANNELS, HarmonyParser, Header, Piece, parse_header
from workspace.harmony_tokens import Control

NAMES: dict[int, Control] = {
    START: "start",
    CHANNEL: "channel",
    CONSTRAIN: "constrain",
    MESSAGE: "message",
    END: "end",
    RETURN: "return",
    CALL: "call",
}
Parts = list[str | int]  # an answer: texts, and control tokens by id

MARKS = {"S": START, "C": CHANNEL, "T": CONSTRAIN, "M": MESSAGE, "E": END, "R": RETURN, "X": CALL}


def parts(text: str) -> Parts:
    """``"{C}final{M}hi{R}"`` as parts: the letters of MARKS in braces are control tokens."""
    found: Parts = []
    for place, piece in enumerate(text.replace("{", "}").split("}")):
        if place % 2:
            found.append(MARKS[piece])
        elif piece:
            found.append(piece)
    return found


@dataclass
class Said:
    """A message as a parser saw it."""

    role: str
    channel: str | None
    recipient: str | None
    content_type: str | None
    text: str


def collect(pieces: list[Piece]) -> list[Said]:
    messages: list[Said] = []
    last: Header | None = None
    for piece in pieces:
        header = piece.header
        if header is not last:
            messages.append(Said(header.role, header.channel, header.recipient, header.content_type, ""))
            last = header
        messages[-1].text += piece.text
    return messages


def ours(answer: Parts, role: str | None = "assistant", cut: int | None = None) -> list[Said]:
    """The messages of an answer. ``cut``: give texts in pieces of that many characters."""
    parser = HarmonyParser(role)
    pieces: list[Piece | None] = []
    for part in answer:
        if isinstance(part, int):
            pieces.append(parser.control(NAMES.get(part, "other")))
        else:
            size = cut or len(part) or 1
            pieces += [parser.text(part[place : place + size]) for place in range(0, len(part), size)]
        parser.check_invariants()
    pieces.append(parser.close())
    return collect([piece for piece in pieces if piece is not None])


def theirs(answer: Parts, role: Role | None = Role.ASSISTANT) -> list[Said] | None:
    """What openai-harmony makes of it; None where it refuses."""
    encoding = harmony_encoding()
    parser = StreamableParser(encoding, role=role)
    try:
        for part in answer:
            for token in [part] if isinstance(part, int) else encoding.encode(part, disallowed_special=()):
                parser.process(token)
        parser.process_eos()
    except HarmonyError:
        return None
    return [
        Said(item.author.role.value, item.channel, item.recipient, item.content_type, _text_of(item.content))
        for item in parser.messages
    ]


def _text_of(contents: list[object]) -> str:
    return "".join(str(getattr(content, "text", "")) for content in contents)


_START_OF_TEXT = 199_998


def clean(messages: list[Said]) -> bool:
    """False where openai-harmony hands control tokens on as text, which we never do."""
    texts = [str(value) for item in messages for value in (item.channel, item.recipient, item.text)]
    kinds = [(item.content_type or "").removeprefix("<|constrain|>") for item in messages]
    return not any("<|" in text for text in texts + kinds)


def startles(answer: Parts) -> bool:
    """True where a beginning of text stands in it: openai-harmony then takes a role for an unknown one, a tool."""
    return _START_OF_TEXT in answer


# What openai-harmony accepts.

ACCEPTED = [
    "{C}final{M}Paris.{R}",
    "{C}analysis{M}Easy.{E}{S}assistant{C}final{M}Paris.{R}",
    "{C}analysis{M}Look it up.{E}{S}assistant{C}commentary to=functions.find {T}json{M}{E}",
    "{C}commentary to=functions.find json{M}[1]{X}",
    " to=functions.find{C}commentary json{M}[1]{X}",
    " to=functions.find{C}commentary {T}json{M}[1]{X}",
    " to=functions.find{C}commentary{T}json{M}[1]{X}",
    "{C}analysis to=python code{M}1+1{X}",
    "{C}commentary{M}I will look.{E}{S}assistant{C}commentary to=functions.a{M}1{X}{S}assistant{C}final{M}ok{R}",
    "{M}no channel{R}",
    "assistant{C}final{M}said twice{R}",
    "{C}final{M}cut off",
    "{C}final{M}{R}",
    "{C}final{M}a{E}{S}user{M}b{E}{S}functions.f to=assistant{C}commentary{M}c{E}",
    "{C}odd{M}unknown channel{R}",
    "analysis{M}no marker{R}",
    "one two{M}two words{R}",
    "{C}final json{M}[1]{R}",
    "Paris is{C}final{M}twice and more{R}",
    "{C}final{M} keeps \n\n spaces \t{R}",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_openai_harmony_accepts_is_read_as_it_reads_it(text: str) -> None:
    answer = parts(text)
    expected = theirs(answer)
    assert expected is not None
    assert ours(answer) == ours(answer, cut=1) == expected


# What it does not.

REFUSED = [
    ("Paris.{R}", [("final", "Paris.")]),
    ("Paris", [("final", "Paris")]),
    ("Paris is the capital of France.{R}", [("final", "Paris is the capital of France.")]),
    ("{S}assistant{C}final{M}repeated start{R}", [("final", "repeated start")]),
    ("assistant{S}assistant{S}assistant{C}final{M}x{R}", [("final", "x")]),
    ("{C}analysis{M}never ended{S}assistant{C}final{M}x{R}", [("analysis", "never ended"), ("final", "x")]),
    ("{C}analysis{M}never ended{C}final{M}x{R}", [("analysis", "never ended"), ("final", "x")]),
    ("{C}analysis{M}a{E}{C}final{M}no start{R}", [("analysis", "a"), ("final", "no start")]),
    ("{C}analysis{M}a{E}assistant{C}final{M}no start{R}", [("analysis", "a"), ("final", "no start")]),
    ("{C}analysis{M}a{E}And so it is Paris.{R}", [("analysis", "a"), ("final", "And so it is Paris.")]),
    ("{C}final Paris is the capital.{R}", [("final", "Paris is the capital.")]),
    ("{C}final Paris{R}", [("final", "Paris")]),
    ("{C}analysis one two three{M} four{R}", [("analysis", "one two three four")]),
    ("{C}commentary to=functions.f json [1, 2, 3]{X}", [("commentary", "[1, 2, 3]")]),
    ("{C}commentary to=functions.f {T}json [1, 2, 3]{X}", [("commentary", "[1, 2, 3]")]),
    ("{C}{M}no name{R}", [("final", "no name")]),
    ("{C}analysis{C}final{M}corrected{R}", [("final", "corrected")]),
    ("{C}final{M}{M}a{M}b{T}c{R}", [("final", "abc")]),
    ("{C}final{M}a{R}{R}{X}{E}", [("final", "a")]),
    ("{S}{S}{C}final{M}a{R}", [("final", "a")]),
    ("{S}analysis{M}a channel as role{E}", [("analysis", "a channel as role")]),
    ("{S}nobody{M}x{R}", [("final", "x")]),
    ("{C}analysis{M}a{E}{S}assistant{C}fin", [("analysis", "a")]),
    ("{C}analysis{M}a{E}{S}assistant", [("analysis", "a")]),
    ("{C}analysis{M}a{E}{S}", [("analysis", "a")]),
    ("{C}commentary to=functions.get_wea", []),
    (" to=functions.get_wea", []),
    (" to=functions.get_wea{R}", []),
    ("{C}", []),
    ("{T}json{R}", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_what_openai_harmony_refuses_is_read_all_the_same(text: str, expected: list[tuple[str, str]]) -> None:
    answer = parts(text)
    accepted = theirs(answer)
    assert accepted is None or not clean(accepted), "this belongs to the other table"
    for found in (ours(answer), ours(answer, cut=1)):
        shown = [(item.channel if item.channel in CHANNELS else "final", item.text) for item in found if item.text]
        assert shown == expected
        assert {item.role for item in found} <= {"assistant"}


def test_a_call_without_message_token_keeps_its_recipient() -> None:
    (found,) = ours(parts(" to=functions.f{C}commentary json [1, 2, 3]{X}"))
    assert (found.recipient, found.content_type, found.text) == ("functions.f", "json", "[1, 2, 3]")


def test_a_header_cannot_be_forged_by_text() -> None:
    (found,) = ours(["<|channel|>analysis<|message|>", MESSAGE, "x", RETURN])
    assert (found.channel, found.text) == (None, "x")
    (found,) = ours([CHANNEL, "final", MESSAGE, "the token <|end|> ends a message", RETURN])
    assert found.text == "the token <|end|> ends a message"


def test_endless_headers_are_given_up() -> None:
    parser = HarmonyParser()
    for _ in range(10_000):
        parser.control("channel")
        parser.control("constrain")
        parser.text("x" * 50)
        parser.check_invariants()
    assert parser.message is None or parser.message.role == "assistant"


def test_the_role_at_the_end_of_a_prompt_is_settled() -> None:
    parser = HarmonyParser(None)
    parser.control("start")
    parser.text("assistant")
    assert parser.settle_role() == "assistant"
    assert parser.settle_role() is None
    piece = parser.text("Yes it is so")
    assert piece is not None
    assert (piece.header.role, piece.text) == ("assistant", "Yes it is so")


# Anything.

WORDS = st.sampled_from(
    [*sorted(CHANNELS), "assistant", "user", "tool", " to=functions.f", "to=python", " json", " code", "functions.g"]
)
TEXTS = st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), max_size=20))
FORMATTED = st.sampled_from([parts(text) for text in ACCEPTED])


@st.composite
def answers(draw: st.DrawFn) -> Parts:
    """Well-formed answers, damaged: parts removed, repeated, moved, replaced, and the end cut off."""
    answer = [part for item in draw(st.lists(FORMATTED, min_size=1, max_size=3)) for part in item]
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(answer)))
        damage = draw(st.sampled_from(["remove", "repeat", "move", "insert", "text"]))
        if damage == "insert":
            answer.insert(place, draw(st.sampled_from(sorted(SPECIALS))))
        elif damage == "text":
            answer.insert(place, draw(TEXTS))
        elif place < len(answer):
            part = answer[place] if damage == "repeat" else answer.pop(place)
            if damage != "remove":
                answer.insert(draw(st.integers(0, len(answer))), part)
    return answer[: draw(st.integers(0, len(answer)))] if draw(st.booleans()) else answer


@settings(max_examples=400, deadline=None)
@given(answers(), st.sampled_from([None, "assistant"]))
@example(parts("{C}final{M}a{E}{E}"), None)
def test_whatever_the_order_nothing_raises_or_leaks_and_what_is_accepted_is_equal(
    answer: Parts, role: str | None
) -> None:
    found = ours(answer, role)
    assert not any("<|" in item.text for item in found)
    assert not any("\ud800" <= letter <= "\ud801" for item in found for letter in repr(vars(item)))
    expected = theirs(answer, None if role is None else Role.ASSISTANT)
    if expected is not None and clean(expected) and not startles(answer):
        assert found == ours(answer, role, cut=1) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(TEXTS, st.sampled_from(sorted(SPECIALS))), max_size=30))
def test_any_sequence_is_read(answer: Parts) -> None:
    found = ours(answer)
    assert not any("<|" in item.text for item in found)
    expected = theirs(answer)
    if expected is not None and clean(expected) and not startles(answer):
        assert found == expected


@given(st.text(max_size=60), st.sampled_from([None, "assistant", "user"]))
def test_any_header_is_read(text: str, role: str | None) -> None:
    header = parse_header(text, role)
    assert role is None or header.role == role
