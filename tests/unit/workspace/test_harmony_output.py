"""Harmony tokens to channels: what is reasoning, what is the answer, what is a tool call."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import Role, StreamableParser

from tests.support.harmony import (
    CALL,
    CHANNEL,
    END,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    SPECIALS,
    START,
    harmony_encoding,
    harmony_tokenizer,
)
from workspace.channels import Channel
from workspace.harmony_output import HarmonyOutput
from workspace.harmony_tokens import HarmonyTokens, find_harmony_tokens


def encode(text: str) -> list[int]:
    """Token ids; control tokens written out are such."""
    return list(harmony_encoding().encode(text, allowed_special="all"))


PROMPT = encode("<|start|>user<|message|>Hi<|end|><|start|>assistant")


@pytest.fixture(scope="module")
def tokens() -> HarmonyTokens:
    found = find_harmony_tokens(harmony_tokenizer())
    assert found is not None
    return found


@dataclass
class Heard:
    """What a client of one answer heard."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str | None, str]] = field(default_factory=list)
    channels: list[Channel | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reasoning_tokens: int = 0
    ended: bool = False


def listen(
    tokens: HarmonyTokens, answer: str | list[int], prompt: list[int] = PROMPT, tools: tuple[str, ...] = ()
) -> Heard:
    ids = encode(answer) if isinstance(answer, str) else answer
    parser = HarmonyOutput(harmony_tokenizer(), tokens, prompt, tools)
    ended_by = ids[-1] if ids and ids[-1] in (RETURN, CALL) else None
    outputs = [parser.push(token) for token in (ids[:-1] if ended_by else ids)]
    heard = Heard()
    for output in [*outputs, parser.flush(ended_by)]:
        heard.content += output.content
        heard.reasoning += output.reasoning
        heard.pieces.append(output.content)
        for call in output.tool_calls:
            if call.name is not None:
                assert call.index == len(heard.calls)
                heard.calls.append((call.name, ""))
            name, arguments = heard.calls[call.index]
            heard.calls[call.index] = (name, arguments + call.arguments)
    heard.channels = [output.channel for output in outputs]
    heard.reasoning_tokens, heard.ended = parser.reasoning_tokens, parser.ended
    return heard


def test_the_vocabulary_is_recognised(tokens: HarmonyTokens) -> None:
    assert tokens.start == START
    assert len(tokens.controls) == 21
    assert {tokens.controls[number] for number in (START, CHANNEL, MESSAGE)} == {"start", "channel", "message"}
    # openai/gpt-oss-20b lists <|return|>, <|endoftext|> and <|call|>; a conversion that lists <|end|> is put right.
    assert tokens.ends(frozenset({RETURN, 199_999, CALL})) == {RETURN, 199_999, CALL}
    assert tokens.ends(frozenset({END})) == {RETURN, CALL}


def test_reasoning_and_answer(tokens: HarmonyTokens) -> None:
    heard = listen(
        tokens,
        "<|channel|>analysis<|message|>Easy one.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>",
    )
    assert (heard.reasoning, heard.content, heard.calls) == ("Easy one.", "Paris.", [])
    assert heard.reasoning_tokens == len(encode("Easy one."))
    named = [None, None, None, *["reasoning"] * 3, None, None, None, None, None, None, "content", "content"]
    assert heard.channels == named
    assert heard.pieces[-3:-1] == ["Paris", "."], "the text streams token by token"


def test_a_tool_call(tokens: HarmonyTokens) -> None:
    for header in (
        "<|channel|>commentary to=functions.find <|constrain|>json",
        " to=functions.find<|channel|>commentary json",
        "<|channel|>analysis to=functions.find",
    ):
        heard = listen(
            tokens, f'<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{header}<|message|>{{"a": 1}}<|call|>'
        )
        assert (heard.reasoning, heard.content, heard.calls) == ("Look.", "", [("find", '{"a": 1}')])
        assert heard.channels[-1] == "tool"


def test_several_messages_of_a_kind(tokens: HarmonyTokens) -> None:
    heard = listen(
        tokens,
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.a<|message|>1<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.b<|message|><|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Done.<|return|>",
    )
    assert heard.reasoning == "One.\n\nTwo."
    assert heard.content == "I look.\n\nDone."
    assert heard.calls == [("a", "1"), ("b", "")]


def test_tools_that_nobody_offered(tokens: HarmonyTokens) -> None:
    for header, tools, calls in (
        ("<|channel|>commentary to=python code", (), []),
        ("<|channel|>analysis to=browser.search code", (), []),
        ("<|channel|>commentary to=find json", (), []),
        ("<|channel|>commentary to=find json", ("find",), [("find", "x")]),
        ("<|channel|>commentary to=functions.other json", ("find",), [("other", "x")]),
    ):
        heard = listen(tokens, f"{header}<|message|>x<|call|>", tools=tools)
        assert (heard.content, heard.calls) == ("", calls)
        assert heard.reasoning == ("" if calls else "x")


def test_someone_elses_turn_is_left_out_and_ends_the_answer(tokens: HarmonyTokens) -> None:
    heard = listen(tokens, "<|channel|>final<|message|>Paris.<|end|><|start|>user<|message|>And Italy?")
    assert (heard.content, heard.ended) == ("Paris.", True)
    heard = listen(tokens, "<|channel|>final<|message|>Paris.<|end|><|start|>functions.f to=assistant<|message|>[1]")
    assert (heard.content, heard.ended) == ("Paris.", True)
    assert not listen(tokens, "<|channel|>final<|message|>Paris.<|end|>").ended


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("<|start|>assistant<|channel|>analysis<|message|>Let", " me.<|end|>", ("", " me.", [])),
        ("<|start|>assistant<|channel|>final<|message|>Par", "is.<|return|>", ("is.", "", [])),
        ("<|start|>assistant<|channel|>", "final<|message|>x<|return|>", ("x", "", [])),
        ("<|start|>assistant to=functions.f<|channel|>commentary<|message|>{", "}<|call|>", ("", "", [("f", "}")])),
        ("<|start|>assistant to=functions.f", "<|channel|>commentary<|message|>{}<|call|>", ("", "", [("f", "{}")])),
        ("<|start|>user<|message|>Hi<|end|>", "<|start|>assistant<|channel|>final<|message|>x", ("x", "", [])),
        ("<|start|>user<|message|>How are", " you?", (" you?", "", [])),
        ("<|start|>user", "<|message|>How are you?", ("How are you?", "", [])),
        ("Once upon", " a time", (" a time", "", [])),
        ("<|start|>assistant", "Yes.<|return|>", ("Yes.", "", [])),
    ],
)
def test_the_prompt_says_where_the_answer_begins(
    prompt: str, answer: str, expected: tuple[str, str, list[tuple[str, str]]], tokens: HarmonyTokens
) -> None:
    heard = listen(tokens, answer, encode(prompt))
    assert (heard.content, heard.reasoning, heard.calls) == expected
    assert not heard.ended


def test_characters_of_several_tokens(tokens: HarmonyTokens) -> None:
    text = "👩‍💻 größer 日本語 🏳️‍🌈"
    assert len(encode("👩‍💻")) > 2
    heard = listen(tokens, f"<|channel|>final<|message|>{text}<|return|>")
    assert heard.content == text
    assert not any("�" in piece for piece in heard.pieces)
    cut = [CHANNEL, *encode("final"), MESSAGE, *encode("👩‍💻")[:1], END]
    assert set(listen(tokens, cut).content) == {"�"}, "a character that never ends is not lost"


def test_padding_rows_of_the_embedding_and_reserved_tokens_say_nothing(tokens: HarmonyTokens) -> None:
    heard = listen(
        tokens, [CHANNEL, *encode("final"), MESSAGE, 200_000, 201_087, *encode("x"), 200_018, 199_998, RETURN]
    )
    assert heard.content == "x"


IDS = st.one_of(
    st.sampled_from(sorted(SPECIALS)),
    st.sampled_from(
        [token for name in ("final", "analysis", "assistant", " to=functions.f") for token in encode(name)]
    ),
    st.integers(0, FIRST_SPECIAL - 1),
    st.integers(0, 255),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS, max_size=40))
def test_any_tokens_are_read_and_no_control_token_leaks(answer: list[int]) -> None:
    found = find_harmony_tokens(harmony_tokenizer())
    assert found is not None
    heard = listen(found, answer)
    # Ordinary tokens may spell anything; control tokens may not appear.
    spelled = harmony_encoding().decode([token for token in answer if token < FIRST_SPECIAL])
    for name in SPECIALS.values():
        for text in (heard.content, heard.reasoning, *(part or "" for call in heard.calls for part in call)):
            assert text.count(name) <= spelled.count(name)
    assert heard.reasoning_tokens == heard.channels.count("reasoning")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, FIRST_SPECIAL - 1)), max_size=30), st.booleans())
def test_texts_of_any_bytes_equal_openai_harmonys(text: list[int], ended: bool) -> None:
    """Tokens that are no valid UTF-8, alone or at all, and texts that are cut off."""
    found = find_harmony_tokens(harmony_tokenizer())
    assert found is not None
    answer = [CHANNEL, *encode("final"), MESSAGE, *text, *[RETURN] * ended]
    parser = StreamableParser(harmony_encoding(), role=Role.ASSISTANT)
    for token in answer:
        parser.process(token)
    parser.process_eos()
    (message,) = parser.messages
    assert listen(found, answer).content == "".join(part.text for part in message.content)
