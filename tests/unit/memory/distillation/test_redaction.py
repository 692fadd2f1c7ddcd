"""Redaction: what has the shape of a secret goes, what only looks like it stays, and only counts are kept."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.distillation.config import RedactionConfig
from memory.distillation.redaction import Redactor
from tests.support.experiences import record


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to Ada.L+x@example.co.uk.", "write to [EMAIL_1]."),
        ("grüße@bücher.example", "[EMAIL_1]"),
        ("card 4111 1111 1111 1111, please", "card [CARD_1], please"),
        ("5500-0000-0000-0004", "[CARD_1]"),
        ("IBAN DE89 3704 0044 0532 0130 00 ok", "IBAN [IBAN_1] ok"),
        ("gb82west12345698765432", "[IBAN_1]"),
        ("call +49 (30) 123 45-67 now", "call [PHONE_1] now"),
        ("(555) 123-4567 or 555-123-4567", "[PHONE_1] or [PHONE_2]"),
        ("0044 7911 123457", "[PHONE_1]"),
        ("from 192.168.0.17 and 2001:db8::ff00:42", "from [IP_1] and [IP_2]"),
        ("sk-proj-abcdefghijklmnop1234", "[API_KEY_1]"),
        ("ghp_abcdefghijklmnopqrst12", "[API_KEY_1]"),
        ("key AKIAIOSFODNN7EXAMPLE.", "key [API_KEY_1]."),
        ("hf_abcdefghijklmnopqrstuvwx", "[API_KEY_1]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "[API_KEY_1]"),
        ("Authorization: Bearer abcdef0123456789abcd", "Authorization: Bearer [API_KEY_1]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----!", "[API_KEY_1]!"),
        ("password: hunter22x", "password[API_KEY_1]"),
        ('"api_key": "q1w2e3r4"', '"api_key[API_KEY_1]"'),
    ],
)
def test_what_has_the_shape_of_a_secret_goes(text: str, redacted: str) -> None:
    assert Redactor(RedactionConfig()).text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "on 2026-11-27 at 12:30:45",
        "order 4111 1111 1111 1112",  # fails Luhn's check
        "GB82 WEST 1234 5698 7654 33",  # fails mod 97
        "0000 0000 0000 0000",
        "999.1.1.300",
        "std::vector and x :: Int",
        "version 1.2.3",
        "it costs 1,000,000.50 dollars",
        "the token: generation of text",
        "user@localhost",
        "e = mc^2, 3 @ 4",
        "OPS-RED",
        "pi is 3.14159265358979",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert Redactor(RedactionConfig()).text(text) == text


def test_the_same_value_has_the_same_placeholder_and_only_counts_are_kept() -> None:
    redactor = Redactor(RedactionConfig())
    assert redactor.text("a@b.io, c@d.io") == "[EMAIL_1], [EMAIL_2]"
    assert redactor.text("C@D.IO and 10.0.0.1") == "[EMAIL_2] and [IP_1]"
    assert dict(redactor.counts) == {"email": 3, "ip": 1}


def test_own_patterns_come_first_and_kinds_can_be_chosen() -> None:
    config = RedactionConfig(kinds=("ip",), patterns={"employee": r"E-\d{6}"})
    assert Redactor(config).text("E-123456 a@b.io 10.0.0.1") == "[EMPLOYEE_1] a@b.io [IP_1]"


def test_it_can_be_switched_off() -> None:
    assert Redactor(RedactionConfig(enabled=False)).text("a@b.io") == "a@b.io"


def test_a_record_is_redacted_where_rows_are_made_of_it() -> None:
    item = record(
        1,
        "I am a@b.io",
        "hello a@b.io",
        "Incorrect! The correct answer is c@d.io.",
        messages=[{"role": "user", "content": "I am a@b.io"}],
        meta={"correction": "c@d.io", "client": "a@b.io"},
    )
    clean = Redactor(RedactionConfig()).record(item)
    assert (clean.observation, clean.action) == ("I am [EMAIL_1]", "hello [EMAIL_1]")
    assert clean.feedback == "Incorrect! The correct answer is [EMAIL_2]."
    assert clean.messages is None
    assert clean.meta == {"correction": "[EMAIL_2]"}
    assert "b.io" not in repr(clean)


@given(st.text(alphabet="ab1 .:-@+()/[]", max_size=200))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = Redactor(RedactionConfig()).text(text)
    second = Redactor(RedactionConfig())
    assert second.text(once) == once


@pytest.mark.parametrize("piece", ["a", "a.", "1", "1 ", "0:", "eyJa", "+1", "a@", "-----BEGIN PRIVATE KEY-----"])
def test_no_text_makes_it_slow(piece: str) -> None:
    started = time.process_time()
    Redactor(RedactionConfig()).text(piece * (40_000 // len(piece)))
    assert time.process_time() - started < 2.0
