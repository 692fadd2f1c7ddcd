"""From the token strings of OpenAI's ``logprobs`` back to token ids, as far as they say which ids they were.

Several ids can look the same once decoded (with and without a leading space, parts of a character), so the way back
is not always there. A chosen token that is not certain makes the whole trace useless and is refused; a candidate that
is not certain is dropped, and its place holds ``ABSENT``: its probability is then simply not part of the row.
Servers that give ids need none of this (``tokasaurus_client.py``; vLLM with ``return_tokens_as_token_ids``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.errors import AmbiguousTokens, InvalidResponse
from lm.types import Trace

#: The log-probability of an empty place in a row: OpenAI's own number for "practically never".
ABSENT = -9999.0
_REPLACEMENT = "\ufffd"
_WRITTEN_ID = re.compile(r"token_id:(\d+)")  # vLLM's way to write an id as a string


class TokenStrings:
    """The ids of one tokenizer by the strings that they decode to."""

    def __init__(self, tokenizer: Any):
        self._ids: dict[str, int | None] = {}  # None: several ids look like that
        for number in range(len(tokenizer)):
            text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
            if text and _REPLACEMENT not in text:
                self._ids[text] = None if text in self._ids else number

    def find(self, text: str) -> int | None:
        """The one id that decodes to ``text``; None when there is none, or several."""
        return self._ids.get(text)


def find_written_id(text: str) -> int | None:
    """The id that a string of the form ``token_id:7`` states."""
    match = _WRITTEN_ID.fullmatch(text)
    return int(match.group(1)) if match else None


def read_trace(logprobs: object, strings: TokenStrings | None, top_logprobs: int) -> Trace:
    """A trace from ``choices[0].logprobs``; ``strings`` None reads ids only where they are written out.

    Rows have ``top_logprobs`` places, most probable first. Raises ``AmbiguousTokens`` or ``InvalidResponse``.
    """
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        raise InvalidResponse("the answer holds no log-probabilities; does the server give them, and for this model?")
    chosen: list[int] = []
    ids = np.zeros((len(content), top_logprobs), np.int32)  # [T, K]
    values = np.full((len(content), top_logprobs), ABSENT, np.float32)  # [T, K]
    for row, entry in enumerate(content):
        text, _ = _entry(entry)
        number = _id_of(text, strings)
        if number is None:
            raise AmbiguousTokens(
                f"token {row} of the answer, {text!r}, does not say which id it is with this tokenizer; "
                "take a server that gives ids (toka:, engine:), or check that the tokenizer is the model's own"
            )
        chosen.append(number)
        candidates = _candidates(entry.get("top_logprobs"), strings, top_logprobs)
        for place, (candidate, value) in enumerate(candidates):
            ids[row, place], values[row, place] = candidate, value
        ids[row, len(candidates) :] = candidates[-1][0] if candidates else number
    return Trace(tuple(chosen), ids, values)


def _candidates(found: object, strings: TokenStrings | None, limit: int) -> list[tuple[int, float]]:
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise InvalidResponse(f"top_logprobs must be a list, got {type(found).__name__}")
    certain = []
    for item in found:
        text, value = _entry(item)
        number = _id_of(text, strings)
        if number is not None:
            certain.append((number, value))
    return sorted(certain, key=lambda pair: -pair[1])[:limit]


def _entry(item: object) -> tuple[str, float]:
    if not isinstance(item, Mapping):
        raise InvalidResponse(f"an entry of logprobs must be an object, got {type(item).__name__}")
    text, value = item.get("token"), item.get("logprob")
    if not isinstance(text, str) or not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidResponse(f"an entry of logprobs needs token and logprob, got {str(dict(item))[:80]}")
    return text, min(0.0, float(value))


def _id_of(text: str, strings: TokenStrings | None) -> int | None:
    return find_written_id(text) if strings is None else strings.find(text)
