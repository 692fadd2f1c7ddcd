"""Bytes and four marks: the whole vocabulary. Nothing to train, nothing out of vocabulary.

A pair is laid out as ``BOS observation SEP action EOS``. The loss mask is aligned with the ids: ``mask[i]`` is true
where ``ids[i]`` is a byte of the action, or its EOS, so where the network's logits at ``i - 1`` are judged.

What does not fit into the context is cropped at character borders: the observation from the left, and only then the
action from the right. An action that was cropped has an EOS that is not trained: the text did not end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qig_core.errors import InvalidInput

PAD = 256
BOS = 257
SEP = 258  # end of the observation, start of the action
EOS = 259
VOCAB_SIZE = 260
_MARKS = 3  # BOS, SEP, EOS
MIN_CONTEXT = 16


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """An (observation, action) pair as the network sees it. ``action`` is what is left of it after cropping."""

    ids: list[int]
    loss_mask: list[bool]
    action: str
    truncated: bool


def encode_text(text: str) -> list[int]:
    """UTF-8 bytes. Lone surrogates (possible in JSON) become '?'."""
    return list(text.encode("utf-8", errors="replace"))


def decode_ids(ids: Sequence[int]) -> str:
    """Text of the byte ids among ``ids``; marks are skipped, broken UTF-8 becomes U+FFFD."""
    return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _last_bytes(data: list[int], count: int) -> list[int]:
    """At most ``count`` trailing bytes, starting at a character border."""
    start = max(0, len(data) - count)
    while start < len(data) and start > 0 and _is_continuation(data[start]):
        start += 1
    return data[start:]


def _first_bytes(data: list[int], count: int) -> list[int]:
    """At most ``count`` leading bytes, ending at a character border."""
    end = min(len(data), max(count, 0))
    while 0 < end < len(data) and _is_continuation(data[end]):
        end -= 1
    return data[:end]


def _check_context(context: int) -> None:
    if context < MIN_CONTEXT:
        raise InvalidInput(f"a context of {context} ids is too small; it must be at least {MIN_CONTEXT}")


def encode_pair(observation: str, action: str, context: int) -> EncodedPair:
    """``BOS observation SEP action EOS`` in at most ``context`` ids; an empty observation means plain text.

    A long action may take half of the context, and more where the observation leaves room.
    """
    _check_context(context)
    seen, done = encode_text(observation), encode_text(action)
    room = context - _MARKS
    kept = _first_bytes(done, max(room // 2, room - len(seen)))
    seen = _last_bytes(seen, room - len(kept))
    truncated = len(kept) < len(done)
    ids = [BOS, *seen, SEP, *kept, EOS]
    mask = [False] * (len(seen) + 2) + [True] * len(kept) + [not truncated]
    return EncodedPair(ids, mask, decode_ids(kept), truncated)


def encode_prompt(observation: str, context: int, reserve: int = 1) -> list[int]:
    """``BOS observation SEP``, cropped from the left so that ``reserve`` more ids fit into the context."""
    _check_context(context)
    if not 0 <= reserve <= context - 2:
        raise InvalidInput(f"cannot reserve {reserve} of {context} ids; the marks alone need 2")
    return [BOS, *_last_bytes(encode_text(observation), context - 2 - reserve), SEP]
