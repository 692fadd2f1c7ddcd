"""Text out of tokens, piece by piece: an incremental detokenizer and a stop-string matcher.

Both only ever give out text that cannot change any more, so what was streamed is a prefix of the final answer. The
two-offset window follows vLLM's and TGI's incremental detokenizers; here the replacement characters of an
incomplete UTF-8 sequence are cut off, rather than the whole piece being held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt: SentencePiece-like decoders drop a leading space only at the very start
_LONGEST_WINDOW = 64  # tokens that may stay undecided; only endless invalid UTF-8 reaches it


class IncrementalDetokenizer:
    """Turns tokens into text one by one; the pieces joined are the text that follows the prompt.

    Handles characters spread over several byte tokens, byte-fallback vocabularies and decoders that treat the first
    token specially. Special tokens are left out. A NUL is shown as U+FFFD: PostgreSQL cannot store one, and an answer
    shall be the same when it is streamed, when it is kept, and when it is asked for again.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])  # what is decoded each time
        self._context = len(self._window)  # its tokens before this index were given out entirely
        self._given = len(self._decode(self._window))  # characters of the decoded window that were given out

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now, often one word, sometimes nothing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = text.rstrip(_REPLACEMENT)
        if len(settled) <= self._given and len(self._window) - self._context < _LONGEST_WINDOW:
            return ""
        complete = len(settled) == len(text)
        fresh = settled[self._given :]
        if complete:
            self._move_window()
        elif len(self._window) - self._context >= _LONGEST_WINDOW:
            fresh = text[self._given :]
            self._move_window()
        else:
            self._given = len(settled)
        return fresh.replace("\x00", _REPLACEMENT)

    def flush(self) -> str:
        """What is left at the end: replacement characters for a sequence that was never completed."""
        fresh = self._decode(self._window)[self._given :]
        self._given += len(fresh)
        return fresh.replace("\x00", _REPLACEMENT)

    def _move_window(self) -> None:
        """Keep the tokens since the last move as context: enough for a decoder that looks one token back."""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._given = len(self._decode(self._window))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopMatcher:
    """Finds stop strings in a stream of text and holds back what could be the beginning of one.

    The match that is complete first ends the text, before its beginning; of several that end at the same character,
    the longest. The result does not depend on how the stream is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what may be given out. Once ``matched`` is set, nothing more will be."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = self._open_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the stream has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in self._stops):
                return length
        return 0
