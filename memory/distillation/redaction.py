"""Takes personal data and secrets out of texts before a dataset is made of them, and counts what it took.

The same value gets the same placeholder throughout a run (``[EMAIL_1]``), so that what refers to it still does.
Counts by kind are for the report and the audit; the texts themselves are kept nowhere but in memory, and only so long.

Card numbers must satisfy Luhn's check and IBANs ISO 7064 (mod 97), so that order numbers stay. This finds shapes, not
meanings: names and addresses of people are not found. A further pattern can be given for what has a shape of its own.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from memory.distillation.answers import CORRECTION
from memory.distillation.config import RedactionConfig
from memory.history import Record

Check = Callable[[str], bool]

_SECRETS = (
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,})",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bAIza[\w-]{30,}",
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    r"(?<=bearer )[\w.~+/=-]{16,}",
    r"(?:(?<=password)|(?<=passwd)|(?<=secret))[\"']?\s*[:=]\s*[\"']?[^\s\"']{6,}",
    r"(?:(?<=api[_ -]key)|(?<=apikey)|(?<=token))[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d)[^\s\"']{6,}",
)


def _luhn(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _mod97(text: str) -> bool:
    plain = text.replace(" ", "").upper()
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(char.isdigit() for char in text)  # "::" and "a::b" are addresses, and much else


def _phone(text: str) -> bool:
    digits = sum(char.isdigit() for char in text)
    return 7 <= digits <= 15 and not re.fullmatch(r"(?:19|20)\d\d[-/. ]\d\d?[-/. ]\d\d?", text)


def _always(_: str) -> bool:
    return True


#: In the order in which they are looked for: what is longer and surer comes first.
_KINDS: dict[str, tuple[re.Pattern[str], Check]] = {
    "api_key": (re.compile("|".join(_SECRETS), re.IGNORECASE | re.DOTALL), _always),
    "email": (
        re.compile(r"(?<![\w.!#$%&'*+/=?^`{|}~-])[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}"),
        _always,
    ),
    "iban": (re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?\b"), _mod97),
    "card": (re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])"), _luhn),
    "ip": (
        re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7})(?![\w:]|\.\d)", re.I),
        _address,
    ),
    "phone": (
        re.compile(
            r"(?<![\w.+-])(?:"
            r"(?:\+|00)\d(?:[ ()/.-]{0,2}\d){6,14}"  # +49 (30) 123-4567
            r"|\(\d{2,5}\)[ /-]?\d{3,4}[ -]?\d{2,5}"  # (555) 123-4567
            r"|\d{3}[ .-]\d{3}[ .-]\d{4}"  # 555-123-4567
            r"|0\d{2,5}[ /-]?\d{3,4}(?:[ -]?\d{2,4}){0,2}"  # 030/1234567, 07911 123456
            r")(?![\w-])"
        ),
        _phone,
    ),
}


class Redactor:
    """Redacts many texts with one numbering. Not for several threads at once."""

    def __init__(self, config: RedactionConfig):
        self.counts: Counter[str] = Counter()
        self._numbers: dict[str, dict[str, int]] = {}
        self._patterns: list[tuple[str, re.Pattern[str], Check]] = []
        if config.enabled:
            self._patterns += [(name, re.compile(pattern), _always) for name, pattern in config.patterns.items()]
            self._patterns += [(kind, *_KINDS[kind]) for kind in _KINDS if kind in config.kinds]

    def text(self, text: str) -> str:
        """``text`` with placeholders."""
        for kind, pattern, check in self._patterns:
            text = pattern.sub(functools.partial(self._replaced, kind, check), text)
        return text

    def record(self, record: Record) -> Record:
        """``record`` with what rows are made of redacted, and without what they are not made of."""
        correction = record.meta.get(CORRECTION)
        return replace(
            record,
            observation=self.text(record.observation),
            action=self.text(record.action),
            feedback=None if record.feedback is None else self.text(record.feedback),
            messages=None,
            meta={CORRECTION: self.text(correction)} if isinstance(correction, str) else {},
        )

    def _replaced(self, kind: str, check: Check, match: re.Match[str]) -> str:
        found = match[0]
        if not check(found):
            return found
        self.counts[kind] += 1
        numbers = self._numbers.setdefault(kind, {})
        number = numbers.setdefault(" ".join(found.casefold().split()), len(numbers) + 1)
        return f"[{kind.upper()}_{number}]"
