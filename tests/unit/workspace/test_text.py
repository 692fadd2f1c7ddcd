"""Streaming text: pieces joined equal the whole, and nothing is ever taken back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workspace.text import IncrementalDetokenizer, StopMatcher


@pytest.fixture(scope="module")
def byte_level(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama-2-like: a metaspace for blanks, bytes as fallback, the first blank of a text stripped."""
    words = ["▁the", "▁cat", "▁", "s", "at", "▁on", "é", "<eos>"]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def stream(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> tuple[list[str], str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    pieces = [detokenizer.push(token) for token in ids]
    return pieces, detokenizer.flush()


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@given(text=st.text(max_size=60))
@settings(max_examples=150)
def test_valid_text_streams_exactly_and_needs_no_flush(text: str, byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode(text.replace("\ufffd", "").replace("\x00", ""), add_special_tokens=False)
    pieces, rest = stream(byte_level, [], ids)
    assert "".join(pieces) == decode(byte_level, ids)
    assert rest == ""
    assert not any("\ufffd" in piece for piece in pieces)


@given(seed=st.integers(0, 10**6), length=st.integers(0, 80))
@settings(max_examples=150)
def test_random_tokens_stream_to_what_decode_says(seed: int, length: int, byte_level: PreTrainedTokenizerFast) -> None:
    chooser = random.Random(seed)
    ids = [chooser.randrange(len(byte_level)) for _ in range(length)]
    pieces, rest = stream(byte_level, [], ids)
    assert "".join(pieces) + rest == decode(byte_level, ids).replace("\x00", "\ufffd")


def test_a_nul_is_shown_as_what_a_database_can_keep(byte_level: PreTrainedTokenizerFast) -> None:
    pieces, rest = stream(byte_level, [], byte_level.encode("a\x00b👍\x00", add_special_tokens=False))
    assert "".join(pieces) + rest == "a\ufffdb👍\ufffd"


def test_an_emoji_of_many_tokens_comes_out_whole(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("a👩‍💻z", add_special_tokens=False)
    assert len(ids) > 4
    pieces, _ = stream(byte_level, [], ids)
    assert [piece for piece in pieces if piece] == ["a", "👩", "\u200d", "💻", "z"]


def test_special_tokens_leave_no_text(byte_level: PreTrainedTokenizerFast) -> None:
    ids = [*byte_level.encode("one", add_special_tokens=False), 0, 1, *byte_level.encode(" two")]
    pieces, rest = stream(byte_level, [0, 1], ids)
    assert "".join(pieces) + rest == "one two"


def test_a_leading_blank_survives_after_a_prompt(sentencepiece: PreTrainedTokenizerFast) -> None:
    the, cat, on = sentencepiece.convert_tokens_to_ids(["▁the", "▁cat", "▁on"])
    assert decode(sentencepiece, [cat]) == "cat"  # what decoding the answer alone would give
    pieces, _ = stream(sentencepiece, [the], [cat, on, the])
    assert pieces == [" cat", " on", " the"]


@given(words=st.lists(st.sampled_from(["the", "cat", "日", "👍", "é", "s"]), max_size=12))
def test_byte_fallback_streams_exactly(words: list[str], sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = sentencepiece.encode(" ".join(words), add_special_tokens=False)
    pieces, rest = stream(sentencepiece, [], ids)
    assert "".join(pieces) == decode(sentencepiece, ids)
    assert rest == ""


def test_an_unfinished_character_is_given_out_at_the_end(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("ok👍", add_special_tokens=False)[:-1]
    pieces, rest = stream(byte_level, [], ids)
    assert "".join(pieces) == "ok"
    assert rest == "\ufffd"


def test_endless_invalid_bytes_do_not_pile_up(byte_level: PreTrainedTokenizerFast) -> None:
    continuation = byte_level.convert_tokens_to_ids("Ģ")  # byte 0x80, invalid on its own
    pieces, rest = stream(byte_level, [], [continuation] * 300)
    assert "".join(pieces) + rest == "\ufffd" * 300
    assert len("".join(pieces)) >= 200


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the stop that is complete first, of those the longest, ends the text before itself."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text(alphabet="abn\n", max_size=40),
    stops=st.lists(st.text(alphabet="abn\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
@settings(max_examples=400)
def test_stops_do_not_depend_on_how_the_stream_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    given_out = ""
    for start, end in itertools.pairwise(places):
        given_out += matcher.push(text[start:end])
    wanted, stopped = reference(text, stops)
    assert (matcher.matched is not None) == stopped
    assert wanted.startswith(given_out)
    assert given_out + ("" if stopped else matcher.flush()) == wanted


def test_only_what_could_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "END"])
    assert matcher.push("hello\nUs") == "hello"
    assert matcher.push("ually E") == "\nUsually "
    assert matcher.push("N") == ""
    assert matcher.flush() == "EN"
