"""Tool calls out of a stream of text: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

The form of Hermes, Qwen and others. A call is told as it is written: its name as soon as the arguments begin, then
their text. What stands between the marks and is no call is given out as text, marks included: nothing that the model
wrote is lost. Blanks beside a call belong to neither. The prompt's side is ``tool_prompt.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from workspace.channels import Output, ToolCallDelta
from workspace.text import IncrementalDetokenizer
from workspace.tool_prompt import CLOSE, OPEN

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=[\[{])')
_OPENING, _CLOSING = "{[", "}]"


class HermesOutput:
    """Parses the tokens of one generation. ``one_call``: the answer is over after the first call."""

    reasoning_tokens = None

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], *, one_call: bool = False):
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
        self._one_call = one_call
        self._held = ""  # text that is not decided yet
        self._call: _Call | None = None  # the call that is being written
        self._calls = 0  # that were told of
        self._after_call = False  # its closing mark, and blanks, may follow

    @property
    def ended(self) -> bool:
        """True when the only call that is wanted is whole."""
        return self._one_call and self._calls > 0 and self._call is None

    def push(self, token_id: int) -> Output:
        """Take the next token."""
        return self._take(self._detokenizer.push(token_id), last=False)

    def flush(self, ended_by: int | None) -> Output:
        """What is left at the end; a call that was cut off stays as far as it was written."""
        return self._take(self._detokenizer.flush(), last=True)

    def _take(self, text: str, *, last: bool) -> Output:
        channel = "content" if self._call is None else "tool"
        self._held += text
        said: list[str] = []
        deltas: list[ToolCallDelta] = []
        while self._call is not None or self._step(said, last):
            assert self._call is not None
            if not self._read(self._call, said, deltas, last):
                break
        return Output(channel, "".join(said), tool_calls=tuple(deltas))  # type: ignore[arg-type]

    def _step(self, said: list[str], last: bool) -> bool:
        """Give out text up to the next call; True when one begins."""
        if self._after_call and not self._skip_closing(last):
            return False
        before, mark, after = self._held.partition(OPEN)
        if mark:
            said.append(before.rstrip())
            self._call, self._held = _Call(self._calls), after
            return True
        keep = 0 if last else _undecided(self._held)
        self._say(said, self._held[: len(self._held) - keep], last)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _say(self, said: list[str], text: str, last: bool) -> None:
        said.append(text.rstrip() if last and self._calls else text)

    def _skip_closing(self, last: bool) -> bool:
        """Leave out the blanks and the mark that end a call; False while that is not decided."""
        rest = self._held.lstrip()
        if rest.startswith(CLOSE):
            rest = rest[len(CLOSE) :].lstrip()
        elif CLOSE.startswith(rest) and not last:
            return False
        if not rest and not last:  # more blanks may come
            self._held = CLOSE if CLOSE in self._held else ""
            return False
        self._held, self._after_call = rest, False
        return True

    def _read(self, call: _Call, said: list[str], deltas: list[ToolCallDelta], last: bool) -> bool:
        """Feed the call; True when it has ended, and text goes on."""
        rest = call.feed(self._held)
        self._held = ""
        deltas.extend(call.deltas())
        if rest is None and not last:
            return False
        self._call = None
        if call.told:
            self._calls += 1
        else:
            said.append(OPEN + call.text)
        self._held, self._after_call = rest or "", call.told
        return rest is not None


class _Call:
    """One JSON object between the marks, as far as it is written."""

    def __init__(self, index: int):
        self.text = ""
        self.told = False  # its name was given out
        self._index = index
        self._whole = _Scan()
        self._value: _Scan | None = None  # of the arguments
        self._ended = False
        self._given = 0  # up to where the arguments were given out

    def feed(self, text: str) -> str | None:
        """Take more text; what follows the object, or None while it has not ended."""
        if not self.text:
            text = text.lstrip()
        if text and not self.text and not text.startswith("{"):
            self._ended = True
            return text
        end = self._whole.end(text)
        self.text += text if end is None else text[:end]
        self._ended = end is not None
        return None if end is None else text[end:]

    def deltas(self) -> list[ToolCallDelta]:
        """What can be told since the last time."""
        if not self.told and (head := _HEAD.match(self.text)) is not None:
            self.told, self._value, self._given = True, _Scan(), head.end()
            return [ToolCallDelta(self._index, _string(head.group(1)), ""), *self._arguments()]
        if self.told:
            return self._arguments()
        return self._in_one_piece() if self._ended else []

    def _arguments(self) -> list[ToolCallDelta]:
        if self._value is None:
            return []
        fresh = self.text[self._given :]
        end = self._value.end(fresh)
        self._given = len(self.text)
        if end is not None:
            fresh, self._value = fresh[:end], None
        return [ToolCallDelta(self._index, None, fresh)] if fresh else []

    def _in_one_piece(self) -> list[ToolCallDelta]:
        """A whole object in another order, or without arguments."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return []
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return []
        arguments = found.get("arguments", found.get("parameters", {}))
        self.told = True
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [ToolCallDelta(self._index, found["name"], ""), ToolCallDelta(self._index, None, text)]


class _Scan:
    """Finds where a JSON object or array that begins at the first character ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def end(self, text: str) -> int | None:
        """How many characters of ``text``, the next piece, belong to it; None: all, and it goes on."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in _OPENING:
                self._depth += 1
            elif character in _CLOSING:
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def _undecided(text: str) -> int:
    """Length of the end of ``text`` that may be the beginning of a mark, with the blanks before it."""
    marked = next((size for size in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:size])), 0)
    rest = text[: len(text) - marked]
    return len(text) - len(rest.rstrip())


def _string(text: str) -> str:
    """A JSON string's value; as it stands where its escapes are wrong."""
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]
