"""What the history says about an experience's answer: whether it was right, and what would have been.

Three sources, the first that says anything wins: an explicit correction (``meta["correction"]``), the feedback of the
environments ("Correct!" / "Incorrect! The correct answer is X."), the score (1 is right, below 0.5 is wrong).

Also here: when two experiences are about the same thing (``content_key``), and which of them counts
(``latest_by_content``). Not here: what a model makes of it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from memory.history import Record

#: The key of ``Record.meta`` under which a person or a program says what should have been answered.
CORRECTION = "correction"
_RIGHT = re.compile(r"\s*(?:that(?:'s| is) )?(?:correct|right)\b", re.IGNORECASE)
_WRONG = re.compile(r"\s*(?:that(?:'s| is) )?(?:incorrect|wrong|not (?:correct|right))\b", re.IGNORECASE)
_GIVEN = re.compile(r"\bthe (?:correct|right) answer (?:is|was)\s*:?\s*(?P<answer>\S[^\n]*)", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}


@functools.lru_cache(maxsize=8192)  # a strategy asks for each experience's once per sample
def content_key(observation: str) -> str:
    """Equal for observations that differ only in case, white space or Unicode form: 32 hexadecimal digits."""
    normal = " ".join(unicodedata.normalize("NFKC", observation).casefold().split())
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def corrected_answer(record: Record) -> str | None:
    """The answer that is known to be right: the corrected one, or the one given if it was right; else None."""
    explicit = _explicit(record)
    if explicit is not None:
        return explicit
    feedback = record.feedback or ""
    if _WRONG.match(feedback):
        return _given(feedback)
    if _RIGHT.match(feedback):
        return record.action or None
    given = _given(feedback)
    if given is not None:
        return given
    if record.score is not None and record.score >= 1.0:
        return record.action or None
    return None


def went_wrong(record: Record) -> bool | None:
    """True when the action is known to have been wrong, False when it was right, None when nobody said."""
    explicit = _explicit(record)
    if explicit is not None:
        return not same_answer(record.action, explicit)
    feedback = record.feedback or ""
    if _WRONG.match(feedback):
        return True
    if _RIGHT.match(feedback):
        return False
    given = _given(feedback)
    if given is not None:
        return not same_answer(record.action, given)
    if record.score is not None:
        return True if record.score < 0.5 else (False if record.score >= 1.0 else None)
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers say the same: case, white space and a full stop at the end do not count."""
    return _bare(one) == _bare(other)


def latest_by_content(records: Iterable[Record]) -> list[Record]:
    """Of the experiences with equal observations the one that counts, by increasing id; tombstones are left out.

    The newest that was judged wins over newer ones that nobody judged: conventions change, and the last word on
    them is feedback.
    """
    chosen: dict[str, Record] = {}
    for record in sorted(records, key=lambda item: item.id):
        if record.deleted:
            continue
        key = content_key(record.observation)
        old = chosen.get(key)
        if old is None or is_judged(record) or not is_judged(old):
            chosen[key] = record
    return sorted(chosen.values(), key=lambda item: item.id)


def is_judged(record: Record) -> bool:
    """Whether anything was said about the action: feedback, a score or a correction."""
    return bool(record.feedback) or record.score is not None or _explicit(record) is not None


def failures(records: Sequence[Record]) -> list[Record]:
    """Those whose action is known to have been wrong."""
    return [record for record in records if went_wrong(record)]


def _explicit(record: Record) -> str | None:
    value = record.meta.get(CORRECTION)
    return value.strip() or None if isinstance(value, str) else None


def _given(feedback: str) -> str | None:
    found = _GIVEN.search(feedback)
    if found is None:
        return None
    answer = found["answer"].strip()
    answer = answer.removesuffix(".").rstrip()  # the sentence's full stop, not the answer's
    if len(answer) > 2 and _QUOTES.get(answer[0]) == answer[-1]:
        answer = answer[1:-1].strip()
    return answer or None


def _bare(answer: str) -> str:
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()
